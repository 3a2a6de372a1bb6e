"""Federated averaging: Algorithm 1 of McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017 (arXiv 1602.05629).

    python fedavg.py --dataset synthetic                                # no download
    python fedavg.py --dataset mnist --iid 0 --frac 0.1 --gpu 0
    python fedavg.py --help                                             # every flag, with the paper's symbol

The paper's symbols, here and in the code:
    K    clients in all                     S_t   the clients of round t, m of them
    C    fraction of them in a round        n_k   examples that client k holds
    E    local epochs                       m_t   examples of S_t together, the sum of its n_k
    B    local batch size                   w     weights, a state_dict; w_k those of client k
    lr   eta, the local learning rate

    Server:             initialise w_0; for each round t = 1, 2, ...
                            m = max(round(C K), 1); S_t = m clients at random
                            w_k = ClientUpdate(k, w) for each k in S_t          w goes down and w_k up the wire, as bytes
                            w = sum over S_t of (n_k / m_t) w_k
    ClientUpdate(k, w): for E epochs, for each batch b of B of the client's shuffled examples: w = w - lr grad loss(w; b)
"""
import argparse
import contextlib
import copy
import csv
import functools
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import signal
import struct
import sys
import time
import weakref

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import TensorDataset

from compress import STEPS, SecureClient, clip, decode, encode, epsilon, least_noise, prune, secure_sum, sparsity, term
from models import build, narrowed, split
from options import args_parser, fail, shown
from sampling import augmented, corrupted, durations, in_time, lacking, load, lose, partition, poisson, rng, select, tutorial

#############################################
#               ClientUpdate                #
#############################################

class LocalUpdate:
    """ClientUpdate(k, w) of Algorithm 1: E epochs of SGD in batches of B over the examples that one client holds.

    args: needs local_ep (E), local_bs (B, math.inf for all at once), lr, momentum, device. It may have optimizer, 'sgd' or 'adamw'; mu
    (FedProx); augment, with dataset and model; teacher, distill and temperature (labels are then those of `taught`); cut and server
    (SplitFed, the device of the back half); dp 'example', clip and noise: DP-SGD (Abadi et al. 2016, Algorithm 1), whose batches are Poisson samples of rate B / n_k.
    dataset: any map-style (float32 image tensor, label) data set. A client's tensors are made once, for all LocalUpdates of
    this data set and idxs: a random transform is drawn once, and a later change of the data set is not seen.
    idxs: the client's indices into it. Raises ValueError if there are none.
    """
    def __init__(self, args, dataset, idxs):
        self.args = args
        self.x, self.y = examples(dataset, idxs, args.device)      # (n_k, ...), (n_k,)

    def train(self, net, lr=None, mask=None, epochs=None, cross=None):
        """(state_dict, mean loss per example) after training from net's weights; net is left as it was. lr: default args.lr.

        The optimizer is a new one each time. Shuffles and dropout are drawn from torch's own generators. mask: {name: bool
        tensor}; where it is False there is no gradient, so that a weight pruned to zero stays zero. epochs: default args.local_ep;
        of a fraction of one the steps that fit in. cross: with args.cut, what happens to a tensor between client and server.
        """
        args, start = self.args, [p.detach() for p in net.parameters()]
        net = copy.deepcopy(net).to(args.device).train()
        gradients, change, mu = gradients_of(args, net, len(self.y), cross), augmentation(args)[0], getattr(args, 'mu', 0)
        step = optimizer(args, net.parameters(), args.lr if lr is None else lr)
        n_k, epochs, seen, total = len(self.y), epochs or args.local_ep, 0, torch.zeros((), device=self.x.device)
        order = (samples if getattr(args, 'dp', None) == 'example' else shuffled)(n_k, math.ceil(epochs), min(args.local_bs, n_k), self.x.device)
        for batch in itertools.islice(order, steps(n_k, epochs, args.local_bs)):
            x, y = change(self.x[batch]), self.y[batch]
            step.zero_grad()
            loss = gradients(net, x, y)
            for p, p_0 in zip(net.parameters(), start) if mu else (): p.grad.add_(p.detach() - p_0.to(p.device), alpha=mu)      # Li et al. 2020
            for name, p in net.named_parameters() if mask else (): p.grad *= mask[name].to(p.device)
            step.step()
            total.add_(loss, alpha=len(y))      # stays on the device: no waiting for it
            seen += len(y)
        return net.to(args.device).state_dict(), float(total) / max(seen, 1)

def steps(n_k, epochs, B):
    """The whole steps in so many epochs, a fraction maybe, of batches of B."""
    return int(epochs * math.ceil(n_k / min(B, n_k)) + 1e-9)

def gradients_of(args, net, n_k, cross=None):
    """The function of (net, x, y) that leaves in net the gradient of args' loss and gives the loss."""
    criterion = criterion_of(args)
    if getattr(args, 'dp', None) == 'example':
        return lambda net, x, y: private_gradients(net, x, y, args.clip, args.noise, min(args.local_bs, n_k), criterion)
    if getattr(args, 'cut', None):
        front, back = split(net, args.cut)
        back.to(getattr(args, 'server', args.device))
        return lambda net, x, y: split_gradients(front, back, x, y, criterion, cross)
    return functools.partial(gradients, criterion=criterion)

def gradients(net, x, y, criterion=F.cross_entropy):
    """Leaves in net the gradient of its mean loss on x, y; the loss."""
    loss = criterion(net(x), y)
    loss.backward()
    return loss.detach()

def split_gradients(front, back, x, y, criterion=F.cross_entropy, cross=None):
    """As gradients, for a net that is cut: the client sends the front's activations and the labels up, and the back's gradient with
    respect to them comes down (SplitFed: Thapa et al. 2022, Algorithm 1). cross(tensor, up): what the other side receives."""
    cross, there = cross or (lambda v, up: v), next(back.parameters()).device
    a = front(x)
    sent = cross(torch.cat([a.detach().flatten(1), y.view(len(y), -1).to(a.dtype)], 1), True).to(there)        # (B, activations + labels)
    received, labels = sent[:, :a[0].numel()].view(a.shape).requires_grad_(), sent[:, a[0].numel():].view(y.shape).to(y.dtype)
    loss = criterion(back(received), labels)
    loss.backward()
    a.backward(cross(received.grad, False).to(a.device))
    return loss.detach().to(a.device)

def criterion_of(args):
    """The loss as a function of (logits, labels, reduction): cross-entropy, or with args.teacher its mixture with distillation."""
    if not getattr(args, 'teacher', None): return F.cross_entropy
    return functools.partial(distillation, a=args.distill, T=args.temperature)

def distillation(logits, y, a, T, reduction='mean'):
    """(1 - a) cross-entropy + a T^2 KL(teacher || student), both softened by T (Hinton et al. 2015); y as `taught` makes it."""
    label, teacher = y[:, 0].long(), y[:, 1:]                                                       # (B,), (B, classes)
    kl = F.kl_div(F.log_softmax(logits / T, 1), F.log_softmax(teacher / T, 1), reduction='none', log_target=True).sum(1)
    losses = (1 - a) * F.cross_entropy(logits, label, reduction='none') + a * T**2 * kl             # (B,)
    return losses.mean() if reduction == 'mean' else losses

@torch.no_grad()
def taught(net, x, y, bs):
    """Labels (n, 1 + classes): y (n,), and the logits of net, the teacher, for x."""
    net.eval()
    return torch.cat([y[:, None].float(), torch.cat([net(xb) for xb in x.split(bs)])], 1)

def augmentation(args):
    """(what happens to a batch of images in training, what to those that are evaluated), as args.augment says."""
    same = lambda x: x
    if not getattr(args, 'augment', 0): return same, same
    if args.dataset == 'cifar' and args.model == 'paper_cnn': return tutorial, functools.partial(tutorial, train=False)
    return functools.partial(augmented, flip=args.dataset == 'cifar'), same

def private_gradients(net, x, y, S, noise, B, criterion=F.cross_entropy):
    """Leaves in net (the sum of each example's gradient clipped to S, plus noise of deviation noise S) / B; the mean loss.

    Abadi et al. 2016, Algorithm 1; B is the expected size of a batch, which may be of any size, 0 too.
    """
    w = dict(net.named_parameters())
    one = lambda w, x, y: criterion(functional_call(net, w, (x[None],)), y[None])
    loss, seen, total = torch.zeros((), device=x.device), len(y), {name: torch.zeros_like(p) for name, p in w.items()}
    at = {name: p.detach() for name, p in w.items()}
    for x, y in zip(x.split(64), y.split(64)) if len(y) else ():       # as many gradients at a time
        grads, losses = vmap(grad_and_value(one), (None, 0, 0), randomness='different')(at, x, y)
        norms = sum(g.flatten(1).double().square().sum(1) for g in grads.values()).sqrt()               # (64,)
        scale = (S / norms.clamp(min=S)).nan_to_num(0).to(x.dtype)
        for name, g in grads.items(): total[name] += torch.tensordot(scale, g if norms.isfinite().all() else g.nan_to_num(0, 0, 0), 1)
        loss += losses.detach().sum()
    for name, p in w.items(): p.grad = (total[name] + noise * S * torch.randn_like(p)) / B
    return loss / max(seen, 1)

def shuffled(n_k, E, B, device):
    """The indices of each batch of E epochs."""
    for shuffle in shuffles(n_k, E).to(device): yield from shuffle.split(B)

def samples(n_k, E, B, device):
    """As many batches as shuffled has, each a Poisson sample: every example is in it with probability B / n_k."""
    for _ in range(E * math.ceil(n_k / B)): yield (torch.rand(n_k) < B / n_k).nonzero().flatten().to(device)

def shuffles(n_k, E):
    """The orders in which a client goes through its n_k examples, (E, n_k), drawn from torch's generator before all else."""
    return torch.stack([torch.randperm(n_k) for _ in range(E)])

def optimizer(args, parameters, lr):
    """The local optimizer that args.optimizer names: SGD, the paper's if args.momentum is 0, or AdamW."""
    if getattr(args, 'optimizer', 'sgd') == 'adamw': return torch.optim.AdamW(parameters, lr=lr)
    return torch.optim.SGD(parameters, lr=lr, momentum=args.momentum)

MADE = weakref.WeakKeyDictionary()      # {data set: {(indices, device): tensors}}

def examples(dataset, idxs, device):
    """The images (n, ...) and labels (n,) at idxs as tensors on the device; remembered, unless they are tensors already."""
    idxs = np.fromiter(idxs, np.int64)
    if not len(idxs): raise ValueError('a client without examples cannot train; leave it out of S_t')
    if isinstance(dataset, TensorDataset):
        x, y = (v[torch.from_numpy(idxs).to(v.device)].to(device) for v in dataset.tensors)
        return x, y if y.is_floating_point() else y.long()
    try: made = MADE.setdefault(dataset, {})
    except TypeError: made = {}             # a list, say: nothing to remember it by
    key = idxs.tobytes(), str(device)
    if key not in made:
        x, y = zip(*(dataset[i] for i in idxs.tolist()))
        made[key] = torch.stack([torch.as_tensor(v) for v in x]).to(device), torch.tensor([int(v) for v in y], device=device)
    return made[key]

def seed_torch(*keys):
    """Seeds torch's own generators (initialisation, shuffles, dropout) from rng's keys."""
    torch.manual_seed(int(rng(*keys).integers(2**63)))

def local_updates(args, net, dataset, parts, S_t, t, mask=None, own=None, cross=None):
    """Yields (k, w_k, mean loss) for each k in S_t, {k: local epochs}, one client after the other, each from net's weights.

    own: {k: {name: tensor}}, weights that client k starts from instead. cross: as LocalUpdate.train's.
    """
    for k, epochs in S_t.items():
        start = net
        if own and k in own: (start := copy.deepcopy(net)).load_state_dict(own[k], strict=False)
        seed_torch(args.seed, 'train', t, k)
        w_k, loss = LocalUpdate(args, dataset, parts[k]).train(start, args.lr * args.lr_decay ** (t - 1), mask, epochs, cross)
        yield k, w_k, loss

#############################################
#       ClientUpdate, many at a time        #
#############################################

class Stacked:
    """local_updates' equal: up to `size` clients train side by side, their weights stacked to (m, ...) under torch.func.vmap.

    Every client has the loop's batches. Those with the most steps come first in a stack, so the ones still at work are its
    first few; a client that is done is copied out and leaves it, with its optimizer state.
    """
    def __init__(self, args, net, size):
        self.args, self.net, self.size = args, copy.deepcopy(net).train(), size
        self.names, self.left = [name for name, _ in net.named_parameters()], None
        self.criterion, self.change = criterion_of(args), augmentation(args)[0]

    def __call__(self, args, net, dataset, parts, S_t, t, mask=None, own=None):
        """Yields (k, w_k, mean loss) for each k in S_t, {k: local epochs}, those with the most steps first."""
        self.left = mask and [mask[name].float() for name in self.names]
        order = sorted(S_t, key=lambda k: -steps(len(parts[k]), S_t[k], self.args.local_bs))
        for i in range(0, len(order), self.size): yield from self.train(net, dataset, parts, {k: S_t[k] for k in order[i:i + self.size]}, t, own or {})

    def train(self, net, dataset, parts, S_t, t, own):
        """Yields (k, w_k, mean loss) for each k in S_t, in descending order of their steps."""
        B = self.batch(max(len(parts[k]) for k in S_t))
        plans = []
        for k, epochs in S_t.items():
            seed_torch(self.args.seed, 'train', t, k)
            index, weight = batches(parts[k], shuffles(len(parts[k]), math.ceil(epochs)), B)
            n = steps(len(parts[k]), epochs, self.args.local_bs)
            plans.append((index[:n], weight[:n]))
        index, weight = (self.pad(pad_sequence(v)).to(self.args.device) for v in zip(*plans))   # (steps, m, B) each
        total, seen = torch.zeros(index.shape[1], device=self.args.device), [int((v > 0).sum()) for _, v in plans]      # (m,) each
        self.stack(net, index.shape[1], self.args.lr * self.args.lr_decay ** (t - 1))
        for i, k in enumerate(S_t):
            for name, v in zip(self.names, self.w):
                if name in own.get(k, ()): v.data[i] = own[k][name]
        if self.args.mu:
            for v_0, v in zip(self.start, self.w): v_0.copy_(v.detach())
        seed_torch(self.args.seed, 'dropout', t, next(iter(S_t)))
        x, y = dataset.tensors
        done, w = [len(plan[0]) for plan in plans], [None] * len(plans)                         # steps, descending
        for s in range(done[0]):
            self.narrow(sum(d > s for d in done))
            m = len(self.w[0])
            total[:m] += self.step(x, y, index[s, :m], weight[s, :m])
            for i in range(len(done)):
                if done[i] == s + 1: w[i] = {name: v[i].detach().clone() for name, v in zip(self.names, self.w)}
        for k, w_k, loss, n in zip(S_t, w, total.tolist(), seen):           # only here does the program wait for the device
            yield k, w_k, loss / n

    def batch(self, n):
        """The batch size of a stack whose largest client has n examples."""
        return min(self.args.local_bs, n)

    def pad(self, plans):
        """The stack's plans, (steps, m, B), for as many clients as its weights are for."""
        return plans

    def stack(self, net, m, lr):
        """m copies of net's weights and a fresh optimizer for them."""
        copies = (p.detach().expand(m, *p.shape).clone(memory_format=torch.contiguous_format) for p in net.parameters())
        self.w = [v.requires_grad_() for v in copies]
        self.start = [torch.empty_like(v) for v in self.w] if self.args.mu else []
        self.optimizer = optimizer(self.args, self.w, lr)

    def narrow(self, m):
        """Keeps the first m of the stack, and their optimizer state."""
        if m == len(self.w[0]): return
        state, group = self.optimizer.state, self.optimizer.param_groups[0]
        self.start = [v[:m] for v in self.start]
        for i, v in enumerate(self.w):
            self.w[i] = v.detach()[:m].requires_grad_()
            if v in state: state[self.w[i]] = {name: u[:m] if u.shape == v.shape else u for name, u in state.pop(v).items()}
        group['params'] = self.w

    @torch.no_grad()
    def step(self, x, y, index, weight):
        """One optimizer step of every client on the examples at index, (m, B); the sum of each client's losses before it, (m,)."""
        images = x[index]                                                                       # (m, B, 1, 28, 28)
        images = self.change(images.flatten(0, 1)).unflatten(0, index.shape)
        grads, losses = self.gradients(images, y[index], weight)
        for v, g in zip(self.w, grads): v.grad = g
        for v, v_0 in zip(self.w, self.start): v.grad = v.grad + self.args.mu * (v - v_0)       # FedProx (Li et al. 2020)
        # Without the wrappers around it (hooks, profiling), which would cut the compiled step in pieces.
        inspect.unwrap(type(self.optimizer).step)(self.optimizer)
        for v, left in zip(self.w, self.left or ()): v.mul_(left)      # not the gradients, whose strides are others': slow
        for v in self.w: v.grad = None
        return losses.detach() * (weight > 0).sum(1)

    def gradients(self, x, y, weight):
        """Each client's gradient of its own loss, (m, ...) for every weight, and the losses, (m,)."""
        with torch.enable_grad(): total, losses = self.loss(self.w, x, y, weight)
        return torch.autograd.grad(total, self.w), losses

    def loss(self, w, x, y, weight):
        """The sum over clients of their losses, whose gradient is each client's own, and the losses, (m,)."""
        forward = lambda w_k, x_k: functional_call(self.net, dict(zip(self.names, w_k)), (x_k,))
        logits = vmap(forward, randomness='different')(list(w), x)                              # (m, B, classes)
        losses = self.criterion(logits.flatten(0, 1), y.flatten(0, 1), reduction='none').view(weight.shape) * weight
        return losses.sum(), losses.sum(1)

class Compiled(Stacked):
    """Stacked with its step under torch.compile. Another shape would be compiled anew, so every stack has the same size and B;
    its weights and optimizer are set back, not made anew, and clients that are done are copied out and ignored."""
    def __init__(self, args, net, size, B):
        super().__init__(args, net, size)
        super().stack(net, size, torch.tensor(args.lr, device=args.device))
        self.B = B
        for v in self.w: v.requires_grad_(False).grad = torch.zeros_like(v)
        self.optimizer.step()       # makes the optimizer's state
        state = [u for kept in self.optimizer.state.values() for u in kept.values() if isinstance(u, torch.Tensor)]
        for v in self.w + self.start + state: torch._dynamo.mark_static_address(v)       # or no CUDA graph is made of a step that changes them
        mode = 'reduce-overhead' if args.device.type == 'cuda' else 'max-autotune-no-cudagraphs'
        self.step = torch.compile(self.step, mode=mode)

    def compile(self, dataset, masked):
        """Compiles the step, with a mask or without, and says how long that took; exits with one line if it cannot be."""
        began = time.perf_counter()
        if masked: self.left = [torch.ones_like(v[0]) for v in self.w]
        index = torch.zeros(self.size, self.B, dtype=torch.int64, device=self.args.device)
        torch._logging.set_logs(dynamo=logging.ERROR)
        try:
            self.step(*dataset.tensors, index, index.float())
        except Exception as e:      # whatever torch.compile and the C++ compiler raise
            reason = str(getattr(e, 'inner_exception', e)).strip().splitlines()[0]
            fail(f'--compile 1: torch.compile does not work here ({reason}); leave the flag out', everyone=True)
        print(f'--compile 1: compiled in {time.perf_counter() - began:.0f} s')

    def batch(self, n): return self.B

    def pad(self, plans): return F.pad(plans, (0, 0, 0, self.size - plans.shape[1]))

    def narrow(self, m): pass

    def stack(self, net, m, lr):
        for v, p in zip(self.w, net.parameters()): v.copy_(p.detach())
        for state in self.optimizer.state.values():
            for v in state.values():
                if isinstance(v, torch.Tensor): v.zero_()
        self.optimizer.param_groups[0]['lr'].fill_(lr)

    def gradients(self, x, y, weight):
        return torch.func.grad(self.loss, has_aux=True)(self.w, x, y, weight)       # torch.compile takes no autograd.grad

def batches(idxs, order, B):
    """A client's batches as indices, (steps, B), and weights, (steps, B): 1/b for each of a batch's b examples, 0 for padding."""
    pad = -order.shape[1] % B
    index = F.pad(torch.as_tensor(idxs)[order], (0, pad)).view(-1, B)
    real = F.pad(torch.ones(order.shape), (0, pad)).view(-1, B)
    return index, real / real.sum(1, keepdim=True)

def unstackable(net):
    """Why a net cannot train stacked, or None: what BatchNorm keeps of a batch cannot be updated under vmap."""
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) or list(module.buffers(recurse=False)):
            return f'{name or type(net).__name__} keeps running statistics or other buffers'

def engine(args, net, m, B, cross=None):
    """local_updates or a Stacked for m clients of batches of B, as --engine says; auto takes what was measured to be faster
    (README, "Speed")."""
    why, cpu = unstackable(net) or args.dp == 'example' and 'DP-SGD clips examples', args.device.type == 'cpu'
    if why and (args.engine == 'stacked' or args.compile):
        fail(f'--engine {args.engine}, --compile {args.compile}: the net cannot train stacked, {why}; take --engine loop and no --compile')
    slower = args.model == 'paper_cnn' or (args.model == 'cnn' and args.local_bs > 20)       # grouped convolutions, on a CPU
    if args.cut: return functools.partial(local_updates, cross=cross)
    if args.engine == 'loop' or why or (args.engine == 'auto' and cpu and slower and not args.compile): return local_updates
    # On a CPU as many as fit its caches; on a GPU as many as 2 GiB hold, at 16 bytes a weight and 1 MiB an example. Even stacks.
    size = (2 if args.compile else 10) if cpu else max(1, 2**31 // (16 * sum(p.numel() for p in net.parameters()) + B * 2**20))
    size = math.ceil(m / math.ceil(m / size))
    return Compiled(args, net, size, B) if args.compile else Stacked(args, net, size)

def narrow(w, like):
    """The leading parts of the tensors of w, {name: tensor}, in the shapes of like's."""
    return {name: v[tuple(map(slice, like[name].shape))] for name, v in w.items()}

class Widths:
    """local_updates for clients of several widths (HeteroFL: Diao et al. 2021, Algorithm 1): client k trains the leading part of
    each of w's tensors, those of the net that is args.widths[k mod n] as wide; what it does not hold stays as it was.

    make: gives the engine for a net.
    """
    def __init__(self, args, net, make):
        self.nets = [narrowed(net, r) for r in args.widths]
        self.engines = [make(net) for net in self.nets]

    def __call__(self, args, net, dataset, parts, S_t, t, mask=None, own=None):
        """Yields (k, w_k, mean loss) for each k in S_t, {k: local epochs}, one width after the other."""
        w, n = net.state_dict(), len(self.nets)
        for i, (small, clients) in enumerate(zip(self.nets, self.engines)):
            like = small.state_dict()
            small.load_state_dict(narrow(w, like))
            for k, w_k, loss in clients(args, small, dataset, parts, {k: E for k, E in S_t.items() if k % n == i}, t, mask and narrow(mask, like)):
                whole = copy.deepcopy(w)
                for name, v in narrow(whole, like).items(): v.copy_(w_k[name])
                yield k, whole, loss

    def compile(self, *more):
        for clients in self.engines: clients.compile(*more)

def crossing(args, net):
    """[which values of flat(w) go between the server and client k, (d,) bool: at k modulo the list's length]: those of its width,
    not --personal_layers, which stay with it, nor the layers from --cut on, which stay with the server."""
    here = list(net.stages)[args.cut:] if args.cut else args.personal_layers or ()
    goes = {name: torch.full_like(v, name.split('.')[0] not in here) for name, v in net.state_dict().items()}
    masks = []
    for r in args.widths or [1]:
        like, mask = narrowed(net, r).state_dict(), {name: torch.zeros_like(v) for name, v in goes.items()}
        for name, v in narrow(mask, like).items(): v.copy_(narrow(goes, like)[name])
        masks.append(flat(mask).bool())
    return masks

#############################################
#              Server: average              #
#############################################

def FedAvg(w, n=None, all_sum=lambda tensors: None):
    """The weighted mean of state_dicts, sum of n_k w_k over sum of n_k (Algorithm 1, last line of the server's loop).

    w: an iterable of state_dicts with their n_k in n (without n the plain mean), or one of pairs (state_dict, n_k); taken
    one by one, so that a few models are in memory at a time. An n_k may be {name: tensor}, one for each value: 0 for those that the
    client does not hold; what nobody holds is the first's. Floating point tensors, buffers too, are averaged (summed in
    float64); others are the first's (of this process). The result shares no memory with what went in; None if nothing did, or
    n_k of 0 only.
    all_sum: adds a list of tensors up over all processes, in place; each of them then has the mean over the clients of all. Each has
    to put in at least one term, (w, 0) if no other.
    Raises ValueError if state_dicts differ in their keys or shapes, or if n is of another length.
    """
    pairs = zip(w, n, strict=True) if n is not None else (u if isinstance(u, tuple) else (u, 1) for u in w)
    first = None
    for w_k, n_k in pairs:
        if first is None:
            first, m_t = copy.deepcopy(w_k), None
            total = {name: torch.zeros_like(v, dtype=torch.float64) for name, v in first.items() if v.is_floating_point()}
        if w_k.keys() != first.keys() or any(w_k[name].shape != v.shape for name, v in first.items()):
            raise ValueError('the state_dicts to be averaged differ in their keys or shapes')
        n_k = n_k if isinstance(n_k, dict) else {name: torch.tensor(float(n_k), dtype=torch.float64, device=v.device) for name, v in total.items()}
        for name, v in total.items(): v.addcmul_(w_k[name].double(), n_k[name])
        m_t = {name: m_t[name] + n_k[name] if m_t else n_k[name] for name in total}
    if first is None: return None
    all_sum([*m_t.values(), *total.values()])
    if not any(m.any() for m in m_t.values()): return None
    for name, v in total.items(): first[name].copy_(torch.where(m_t[name] > 0, v / m_t[name], first[name]))
    return first

@torch.no_grad()
def answers(net, x, y, bs):
    """The loss of each example and whether net's answer is right, (n,) each; x (n, ...), y (n,), bs at a time. net stays as it is."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    logits = [net(xb) for xb in x.split(bs)] if len(x) else [torch.zeros(0, 1, device=x.device)]
    for module, mode in modes: module.training = mode
    logits = torch.cat(logits)                                                          # (n, classes)
    return F.cross_entropy(logits, y, reduction='none'), logits.argmax(1) == y

def evaluate(net, x, y, bs, all_sum=lambda tensors: None):
    """(mean loss, accuracy in [0, 1]) of net on x (n, ...), y (n,), bs at a time; net's weights and modes stay as they are.

    all_sum: as FedAvg's; x and y are then one process's share.
    """
    losses, right = answers(net, x, y, bs)
    sums = torch.stack([losses.double().sum(), right.double().sum(), torch.tensor(len(x), dtype=torch.float64, device=x.device)])
    all_sum([sums])
    loss, right, n = sums.tolist()
    return loss / n, right / n

#############################################
#         More than one process             #
#############################################

def processes(device):
    """(rank, number of processes): joins the others if torchrun started this one; (0, 1) without it.

    CPU tensors are reduced by gloo, those on GPUs by nccl.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ: return 0, 1
    if device.type == 'cuda': torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous('env://'))
    # torchrun keeps one store over its restarts, and what dead processes left in it would be taken for the living ones'.
    # Machines count their restarts apart, so this mends it on one machine only; see README for several.
    if os.environ.get('GROUP_WORLD_SIZE') == '1': store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', store=store, rank=rank, world_size=size)
    GROUP['gloo'], GROUP['store'] = dist.new_group(backend='gloo'), store
    return rank, size

GROUP = {}      # to find out who does not come: gloo's processes and their store

def all_sum(tensors):
    """Adds each tensor up over all processes, in place. A process alone has nothing to add."""
    if not dist.is_initialized(): return
    with others():
        dist.monitored_barrier(GROUP['gloo'])
        for v in tensors: dist.all_reduce(v)

def gone(error):
    """Who has gone, as a line: what the barrier says, or, if a sum broke off, where all are at once, who does not report now."""
    line = str(error).splitlines()[0]
    if 'Rank ' in line: return line
    try:
        GROUP['store'].set(f'alive {dist.get_rank()}', '')
        time.sleep(3)
        missing = [rank for rank in range(dist.get_world_size()) if not GROUP['store'].check([f'alive {rank}'])]
    except RuntimeError: missing = [0]      # with whom the store was
    return f'rank {", ".join(map(str, missing))} ({line})'

@contextlib.contextmanager
def others():
    """What is done together with other processes: one that has died ends this one too, with a line that names it."""
    try: yield
    except RuntimeError as e:
        print(f'process {dist.get_rank()}: another process has gone: {gone(e)}', file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)     # at once: an orderly exit would wait for the one that has gone

def all_summed(numbers, device):
    """The numbers, each added up over all processes."""
    sums = torch.tensor([float(v) for v in numbers], dtype=torch.float64, device=device)
    all_sum([sums])
    return sums.tolist()

def from_rank_0(value):
    """Rank 0's value, in every process."""
    box = [value]
    if dist.is_initialized():
        with others(): dist.broadcast_object_list(box, device=torch.device('cpu'))
    return box[0]

def at_home(S_t, n_k, size):
    """S_t as shares gives it, when each process is one client."""
    return [[k] if k in S_t else [] for k in range(size)]

def shares(S_t, n_k, size):
    """S_t dealt to `size` processes by work, a list for each: the client with the most examples first, to the least loaded."""
    dealt, load = [[] for _ in range(size)], [0] * size
    for k in sorted(S_t, key=lambda k: -n_k[k]):
        least = load.index(min(load))
        dealt[least].append(k)
        load[least] += n_k[k]
    return [sorted(ks) for ks in dealt]

def send(blob, rank):
    """Bytes to another process, which calls receive."""
    with others():
        dist.send(torch.tensor([len(blob)]), rank, group=GROUP['gloo'])
        if blob: dist.send(torch.frombuffer(bytearray(blob), dtype=torch.uint8), rank, group=GROUP['gloo'])

def receive(rank):
    """The bytes that the process `rank` sends."""
    length = torch.zeros(1, dtype=torch.int64)
    with others():
        dist.recv(length, rank, group=GROUP['gloo'])
        blob = torch.zeros(int(length), dtype=torch.uint8)
        if len(blob): dist.recv(blob, rank, group=GROUP['gloo'])
    return blob.numpy().tobytes()

#############################################
#         Differential privacy              #
#############################################

def noised(updates, w, S, noise, weights, draw, first, index=slice(None)):
    """DP-FedAvg's average (McMahan et al. 2018, Algorithm 1): (w_k, n_k) in; out, each as far from w as S allows (None: it is
    already), noise of deviation `noise` on their sum, and w itself as often as makes all weights add up to `weights`, C K.

    Of several processes each has its own clients, the first the rest. The noise is drawn whoever came, from draw, a NumPy generator,
    for the values at index, those that are not pruned.
    """
    v, m = flat(w), 0
    for w_k, n_k in updates:
        m += n_k
        yield (w_k if S is None else unflat(v + clip(flat(w_k) - v, S), w)), n_k        # v: not noised yet
    v[index] += torch.from_numpy(draw.normal(0, noise, len(v[index]))).float()
    if first: yield unflat(v, w), 1
    yield w, (weights - 1 if first else 0) - m

def private(args, updates, w, n_k, S_t, t, first, index):
    """The terms of --dp user's average: noised, with what the flags say. Under --secagg the clients have clipped."""
    return noised(updates, w, None if args.secagg else args.clip, args.noise * args.clip, args.frac * len(n_k),
                  rng(args.seed, 'noise', t), first, index)

def unasked(args, updates, w, n_k, S_t, t, first, index):
    """The terms of Algorithm 1's average: those that came, and under --all_clients w for every client that was not asked."""
    yield from updates
    yield w, int(n_k.sum() - n_k[S_t].sum()) if args.all_clients and first else 0

def planned(args, n_k, asked):
    """The noise with which --epochs rounds cost --epsilon at most."""
    try: noise = least_noise(lambda noise: spent(args, n_k, asked, args.epochs, noise), args.epsilon)
    except ValueError as e: fail(f'--epsilon {args.epsilon}: {e}; take more')
    print(f'--epsilon {args.epsilon}: noise {noise:.4g} for {args.epochs} rounds')
    return noise

def spent(args, n_k, asked, t, noise):
    """The epsilon that t rounds cost: of a client under --dp user, of an example of the client that it costs most under example.

    asked: the clients that round t asks, a function of t. Those that are lost count too.
    """
    if args.dp == 'user': return epsilon(args.frac, noise, t, args.delta or 1 / max(len(n_k), 2))
    took = np.bincount([k for s in range(1, t + 1) for k in asked(s)], minlength=len(n_k))
    most = {n: took[n_k == n].max() for n in set(n_k.tolist())}
    E, B = args.local_ep, args.local_bs
    return max(epsilon(min(B, n) / n, noise, int(rounds) * steps(n, E, B), args.delta or 1 / max(n, 2)) for n, rounds in most.items())

#############################################
#      The wire: down and up, in bytes      #
#############################################

def flat(w):
    """The floating point tensors of the state_dict w, weights and buffers, as one vector on the CPU, (d,) float32."""
    return torch.cat([v.detach().flatten().float() for v in w.values() if v.is_floating_point()]).cpu()

def shaped(vector, w):
    """{name: its part of vector, (d,), in its shape and on its device} for the floating point tensors of w."""
    like = {name: v for name, v in w.items() if v.is_floating_point()}
    parts = vector.to(next(iter(like.values())).device).split([v.numel() for v in like.values()])
    return {name: part.view(v.shape) for (name, v), part in zip(like.items(), parts)}

def unflat(vector, w):
    """The state_dict like w with its floating point tensors from vector, (d,)."""
    return w | {name: v.to(w[name].dtype) for name, v in shaped(vector, w).items()}

def unpruned(w, s):
    """Which values of flat(w) are left when the fraction s of the weights in its matrices and filters goes, the smallest of them
    all: (d,) bool. Biases stay."""
    left = torch.cat([torch.full((v.numel(),), v.dim() < 2) for v in w.values() if v.is_floating_point()])
    left[~left] = prune(flat(w)[~left], s)
    return left

MESSAGE = struct.Struct('<qd')      # k and loss, which go before the payload

def feedback(args):
    """Whether clients keep what they did not send."""
    return bool(args.topk and args.error_feedback)

def keeps(args):
    """Whether something of w_k stays with the client: feedback's rest, or layers of its own."""
    return bool(feedback(args) or args.personal_layers)

class Wire:
    """What crosses between the server and its clients in a round, as bytes, counted: w down, w_k up, or, if --quantize or --topk
    makes it smaller, w_k - w; of weights that are pruned, nothing. Float buffers count as weights.

    held: crossing's. kept: {k: tensor}, what client k keeps, at the values `stay`: of those that cross, what it has not sent of its
    updates yet (error feedback), of others (--personal layers) its own. Rank 0 keeps those of simulated clients and lends them to the processes that
    train these; a silo keeps its own. left: (d,) bool, the pruning mask; holders: the clients that have it. A round changes these
    three by commit() alone. fp32: the bytes of a whole w.
    """
    def __init__(self, args, w, n_k=(), rank=0, size=1, held=None):
        self.args, self.n_k, self.rank, self.d, self.fp32 = args, n_k, rank, len(flat(w)), len(encode(flat(w)))
        self.kept, self.left, self.holders = {}, torch.ones(self.d, dtype=torch.bool), set()
        self.held = held or [self.left]
        self.feedback, self.keeps, self.tally = feedback(args), keeps(args), dict.fromkeys(TALLY, 0)
        self.stay = slice(None) if self.feedback else (~self.held[0]).nonzero().flatten()
        self.remote = bool(args.silo and rank)
        # Silos' payloads, and smaller ones, go to rank 0; simulated fp32 is summed up where it is trained.
        self.gathers = size > 1 and bool(args.silo or args.quantize or args.topk or args.prune or args.secagg or self.keeps or args.cut)
        self.saved, self.new = {}, {}
        self.indexed(self.left)

    def downlink(self, w, s, S_t, tally):
        """(w, mask) as S_t receive them: w in fp32 without the fraction s that is pruned (None: nothing ever), and the mask, {name:
        bool tensor} or None, sent to those that do not hold it. tally: what this round counts, from here on."""
        self.tally, self.new = tally, {}
        if self.remote: return self.received(w, S_t)
        v, left = flat(w), self.left if s is None else unpruned(w, s)
        holders = self.holders if torch.equal(left, self.left) else set()
        self.indexed(left)
        lacking = set() if left.all() else set(S_t) - holders
        payloads, n = [encode(v[at]) for at in self.index], len(self.held)
        masks = [encode(left[held].float(), quantize=1) for held in self.held] if lacking else [b'']        # 0 and 1 are exact
        if self.rank == 0: tally['down_bytes'] += sum(len(payloads[k % n]) for k in S_t) + sum(len(masks[k % n]) for k in lacking)
        for k in S_t if self.args.silo else ():
            if k: send(payloads[k % n], k), send(masks[k % n] if k in lacking else b'', k)
        self.next = left, holders | set(S_t)
        return (w, None) if s is None else (unflat(v * left, w), shaped(left, w))

    def received(self, w, S_t):
        """(w, mask) as rank 0 has sent them to this silo, if it asks it in this round."""
        left = self.left
        if self.rank in S_t:
            payload, of_mask = receive(0), receive(0)
            if of_mask:
                held = self.held[self.rank % len(self.held)]
                left = left.masked_scatter(held, decode(of_mask, int(held.sum())).bool())
            self.indexed(left)
            v = flat(w) * left
            v[self.at(self.rank)] = decode(payload, len(v[self.at(self.rank)]))
            w = unflat(v, w)
        self.next = left, set()
        return w, shaped(left, w) if self.args.prune else None

    def indexed(self, left):
        """Where flat(w) is left by pruning and crosses: what this round's vectors are indexed with, for each of held."""
        self.index = [slice(None) if (left & held).all() else (left & held).nonzero().flatten() for held in self.held]

    def at(self, k):
        """The values of flat(w) that go to and come from client k."""
        return self.index[k % len(self.index)]

    def own(self, w, dealt):
        """{k: {name: tensor}}, what clients of this process start from instead of w's: the layers that stayed with them. Rank 0 lends
        what it keeps to the processes that train the clients, dealt."""
        if self.keeps and self.gathers and not self.args.silo: self.lend(dealt)
        layers = self.args.personal_layers or ()
        return {k: {name: v for name, v in shaped(self.spread(self.kept[k], flat(w)), w).items() if name.split('.')[0] in layers}
                for k in dealt[self.rank] if layers and k in self.kept}

    def spread(self, kept, v):
        """v, (d,), with kept's values where they stay."""
        v = v.clone()
        v[self.stay] = kept
        return v

    def cross(self, v, up):
        """What the other side of a net that is cut receives of the tensor v, which goes up from a client, or down. Counts its bytes."""
        payload = encode(v.flatten().float().cpu())
        self.tally['up_bytes' if up else 'down_bytes'] += len(payload)
        try: return decode(payload, v.numel()).view(v.shape)
        except ValueError: return v         # not finite; nor will the client's update be, which is refused for it

    def uplink(self, updates, w, t, dealt, lost, corrupt=()):
        """(k, w_k, loss) in, (w_k, n_k) out for those that the server accepts; where payloads are gathered, at rank 0 alone.

        dealt: the clients of each process; lost: {k: stage} of those that are lost, of use to SecureWire alone; corrupt: {k: kind} of
        those that send damaged payloads. Counts tally's senders, clients, rejected and up_bytes, and sums the accepted n_k (m_t) and
        n_k loss (loss).
        """
        tally, delta = self.tally, bool(self.args.quantize or self.args.topk)
        base = flat(w) if delta else torch.zeros(self.d)
        if self.args.widths: yield w, self.weights(w, None, 0)      # so that all processes sum in one form, and what nobody holds stays
        for k, payload, loss, rest in self.gathered(self.packed(updates, base, t, corrupt), dealt):
            n_k, at, v = int(self.n_k[k]), self.at(k), flat(w)
            tally['up_bytes'] += len(payload)
            tally['senders'] += 1
            try: v[at] = base[at] + decode(payload, len(v[at]))
            except ValueError as e:
                tally['rejected'] += 1
                print(f'client {k} is left out: {e}')
                continue
            if self.args.verbose: print(f'    client {k:5d}   n_k {n_k:6d}   loss {loss:.4f}   {len(payload)} bytes')
            tally['clients'] += 1
            tally['m_t'] += n_k
            tally['loss'] += n_k * loss
            if self.args.cut: v = torch.where(self.held[0], v, self.spread(rest, v))        # the server's half was never away
            if self.keeps and rest is not None: self.new[k] = rest
            yield unflat(v, w), self.weights(w, k, 1 if self.args.dp == 'user' else n_k)

    def weights(self, w, k, n_k):
        """n_k, or where clients differ in width {name: n_k for the values that client k holds, 0 for others} (None: holds none)."""
        if not self.args.widths: return n_k
        return shaped(self.held[k % len(self.held)].double() * n_k if k is not None else torch.zeros(self.d).double(), w)

    def packed(self, updates, base, t, corrupt):
        """The clients' side: (k, w_k, loss) in, (k, payload, loss, what stays or None) out."""
        for k, w_k, loss in updates:
            at, v, rest = self.at(k), flat(w_k), None
            x = v[at] - base[at]
            if k in self.kept and self.feedback: x += self.kept[k][at]
            coded = functools.partial(encode, quantize=self.args.quantize, topk=self.args.topk,
                                      draw=self.args.quantize and rng(self.args.seed, 'quantize', t, k))
            payload = coded(x)
            if self.keeps or self.args.cut:
                try: v[at] = x - decode(payload, len(x))
                except ValueError: pass     # it will be refused: what was kept before stays
                else: rest = v[self.stay]
            if k in corrupt: payload, rest = damaged(x, payload, corrupt[k], coded, rng(self.args.seed, 'garbage', t, k)), None
            if self.remote and rest is not None: self.new[k] = rest
            yield k, payload, loss, rest

    def gathered(self, messages, dealt):
        """The messages of all processes at rank 0, and none elsewhere; where nothing is gathered, this process's own."""
        if not self.gathers or self.rank == 0: yield from messages
        if not self.gathers: return
        messages = list(messages) if self.rank else []
        all_sum([])         # all have trained
        for k, payload, loss, rest in messages:
            send(MESSAGE.pack(k, loss), 0)
            send(payload, 0)
            send(b'' if rest is None or self.args.silo else rest.numpy().tobytes(), 0)
        for rank, ks in enumerate(dealt):
            for _ in ks if rank and not self.rank else ():
                (k, loss), payload, rest = MESSAGE.unpack(receive(rank)), receive(rank), receive(rank)
                yield k, payload, loss, torch.frombuffer(bytearray(rest), dtype=torch.float32) if rest else None

    def lend(self, dealt):
        """What rank 0 keeps for clients that other processes train, to these."""
        if self.rank: self.kept = {}
        for rank, ks in enumerate(dealt):
            for k in ks if rank else ():
                if self.rank == 0: send(self.kept[k].numpy().tobytes() if k in self.kept else b'', rank)
                elif self.rank == rank and (rest := receive(0)): self.kept[k] = torch.frombuffer(bytearray(rest), dtype=torch.float32)

    def commit(self):
        """Takes over what the round has changed."""
        self.kept, (self.left, self.holders) = self.kept | self.new, self.next

    def state(self, t):
        """What a checkpoint after round t holds of it; of silos, which save one after the other, also the one before."""
        if t not in self.saved: self.saved = dict(list(self.saved.items())[-1:] if self.args.silo else ()) | {t: self.kept}
        return {'kept': self.saved, 'left': self.left, 'holders': sorted(self.holders)}

    def resume(self, state, t):
        """Goes on from state, a checkpoint's (None: there is none here), after round t. Silos started again do not hold the mask."""
        kept = state['kept'] if state else {}
        if self.args.silo and self.keeps and t not in kept:
            print(f'silo {self.rank}: no checkpoint of round {t} here; what it had kept is lost', file=sys.stderr)
        self.kept = kept.get(t, {})
        self.saved = {t: self.kept}
        if state: self.left, self.holders = state['left'], set() if self.args.silo else set(state['holders'])

def damaged(x, payload, kind, coded, draw):
    """What a corrupt client sends instead of x's payload: NaN, infinity, garbage of its length, or a value too few."""
    if kind < 2: return coded(torch.full_like(x, (math.nan, math.inf)[kind]))
    return draw.bytes(len(payload)) if kind == 2 else coded(x[1:])

class SecureWire(Wire):
    """A Wire of which rank 0 learns the sum of what goes up, not its terms (Bonawitz et al. 2017; compress.secure_sum).

    A client's w_k - w is clamped to plus or minus --range, rounded stochastically to --quantize bits (16), and n_k times that, as
    whole numbers, is its term; its loss is one value more of it, in units of which 16 is the range's end. Simulated clients live in
    rank 0; silos answer it from their own processes.
    """
    LOST_AT = STEPS[1:]         # by sampling.lose's stage, the first step that a client does not come to

    def __init__(self, args, w, n_k=(), rank=0, size=1, held=None):
        super().__init__(args, w, n_k, rank, size, held)
        self.weight = np.ones(len(n_k), int) if args.dp == 'user' else np.array(n_k)
        fits = (2**32 // int(self.weight.sum())).bit_length() - 1       # bits with which the sum of all stays below 2^32
        self.bits = args.quantize or min(16, fits)
        if not 1 <= self.bits <= fits:
            fail(f'--quantize {self.bits}: with --secagg the sum may exceed 32 bits; {fits} fit' if fits > 0 else
                 '--secagg 1: the clients have too many examples for 32 bits; ask fewer')
        self.step, self.least = 2 * args.range / (2**self.bits - 1), 3 if args.silo else 2       # rank 0 knows its own silo's term
        if args.dp == 'user' and self.d ** 0.5 * self.step > args.clip / 2:
            fail(f'--quantize {self.bits}: with --dp user and --secagg the rounding of {self.d} values would be longer than half of --clip; '
                 f'take {math.ceil(math.log2(4 * self.d ** 0.5 + 1))} or more')
        if args.silo and args.dp != 'user' and round(args.frac * size) < self.least:
            fail(f'--secagg 1: a round must ask {self.least} silos, or rank 0 knows what the other has sent; --frac {args.frac} of {size} is fewer')

    def term(self, w_k, loss, base, k, t):
        """What client k adds to the sum, (d + 1,) uint32 (d without what is pruned). Raises ValueError for NaN and infinity."""
        v = (flat(w_k) - base)[self.at(k)].double()
        if self.args.dp == 'user': v = clip(v, self.args.clip - len(v) ** 0.5 * self.step)        # rounding adds that much at most
        v = np.append(v, (loss / 8 - 1) * self.args.range)
        return term(v, self.args.range, self.bits, self.weight[k], rng(self.args.seed, 'quantize', t, k))

    def uplink(self, updates, w, t, dealt, lost, corrupt=()):
        """(k, w_k, loss) in; out, at rank 0, one pair: the survivors' mean and its weight; none if they are too few."""
        asked = sorted({k for ks in dealt for k in ks} | set(lost))
        tally, at = self.tally, self.at(0)
        base, clients, threshold = flat(w), {}, max(math.ceil(round(self.args.threshold * len(asked), 9)), self.least)
        terms = self.terms(updates, base, t)
        for k, payload, _, rest in terms if self.args.silo else self.gathered(terms, dealt):
            if payload:
                clients[k] = SecureClient(k, np.frombuffer(payload, '<u4'), threshold)
                if rest is not None: self.new[k] = rest
            else:
                tally['rejected'] += 1
                print(f'client {k} is left out: it holds NaN or infinity')
        nothing = np.zeros(len(base[at]) + 1, np.uint32)
        clients = {k: SecureClient(k, nothing, threshold) for k in lost} | clients       # lost ones that were not trained never send it
        if self.remote and self.rank in asked: self.serve(clients)
        if self.rank: return
        tally['senders'] += len(asked)
        ks = asked if self.args.silo else sorted(clients)
        try: total, who = secure_sum(self.asker(clients, lost, tally), ks, threshold, len(nothing))
        except ValueError as e:
            print(f'round {t}: secure aggregation is given up: {e}')
            return
        finally:
            for k in asked if self.args.silo else ():
                if k: send(b'', k)
        m_t = int(self.weight[who].sum())
        mean = total * (self.step / m_t) - self.args.range
        v = base.clone()
        v[at] += torch.from_numpy(mean[:-1]).float()
        tally['clients'] += len(who)
        tally['m_t'] += int(self.n_k[who].sum())
        tally['loss'] += int(self.n_k[who].sum()) * (mean[-1] / self.args.range + 1) * 8
        yield unflat(v, w), m_t

    def terms(self, updates, base, t):
        """The clients' side: (k, w_k, loss) in, (k, its term as bytes, loss, what stays or None) out, no bytes for what is not finite."""
        for k, w_k, loss in updates:
            rest = flat(w_k)[self.stay] if self.keeps else None
            try: yield k, self.term(w_k, loss, base, k, t).astype('<u4').tobytes(), loss, rest
            except ValueError: yield k, b'', loss, None

    def asker(self, clients, lost, tally):
        """secure_sum's ask, which counts bytes both ways and has lost clients answer no more from the step on at which they go."""
        def ask(k, step, message):
            if k in lost and STEPS.index(step) >= STEPS.index(self.LOST_AT[lost[k]]): return None
            tally['down_bytes'] += len(message)
            if self.args.silo and k:
                send(step.encode(), k), send(message, k)
                answer = receive(k)
            else: answer = answered(clients.get(k), step, message)
            tally['up_bytes'] += len(answer)
            return answer or None
        return ask

    def serve(self, clients):
        """A silo's side: answers rank 0 until it sends nothing more."""
        while step := receive(0).decode(): send(answered(clients.get(self.rank), step, receive(0)), 0)

def answered(client, step, message):
    """A SecureClient's answer, or none, b'', from one that has left or finds its rules broken."""
    try: return client.answer(step, message) if client else b''
    except ValueError: return b''

#############################################
#      What is kept: log, checkpoint, plot  #
#############################################

COLUMNS = ('round', 'train_loss', 'test_loss', 'test_acc', 'clients', 'rejected', 'lost', 'late', 'up_bytes', 'down_bytes', 'upload_seconds',
           'round_time', 'epsilon', 'seconds')
TALLY = ('clients', 'rejected', 'lost', 'late', 'm_t', 'loss', 'senders', 'up_bytes', 'down_bytes', 'round_time')   # counted in a round
# What may differ between a run and its resumption: nothing that the weights of a round depend on.
LOCAL = {'data_dir', 'gpu', 'bs', 'log', 'checkpoint', 'resume', 'plot', 'verbose'}      # in which silos may differ
FREE = {'epochs', 'data_dir', 'gpu', 'bs', 'target', 'log', 'checkpoint', 'save_every', 'resume', 'plot', 'verbose', 'personal', 'personal_ep', 'mix'}

def rounds_to(target, accuracies):
    """Rounds to the target accuracy by the paper's protocol, or None (Section 3): the curve made monotone (best so far),
    the first round that reaches the target, linear interpolation from the round before. 1.0 if the first does."""
    best = list(itertools.accumulate(accuracies, max))
    for t, (before, now) in enumerate(zip(best[:1] + best, best)):
        if now >= target: return t + (target - before) / (now - before) if t else 1.0

def set_aside(path):
    """Renames what an earlier run left at path to path.old (.old1, ...), so that a new run does not write over it."""
    if path and os.path.exists(path) and os.path.getsize(path):
        names = (f'{path}.old{i or ""}' for i in itertools.count())
        old = next(name for name in names if not os.path.exists(name))
        os.replace(path, old)
        print(f'{path} was there already: it is {old} now')

def rows(f):
    """A writer of rows, each a dict by COLUMNS, to the open file f."""
    return csv.DictWriter(f, COLUMNS, lineterminator='\n')

def open_log(path, options, history):
    """The CSV file at path, open for the rows to come, holding the options as JSON and the rows so far. No path: nowhere."""
    if not path: return open(os.devnull, 'w')
    with open(path + '.tmp', 'w', newline='') as f:
        f.write(f'# {json.dumps(options)}\n')
        rows(f).writeheader()
        rows(f).writerows(history)
    os.replace(path + '.tmp', path)
    return open(path, 'a', newline='')

def save(path, options, w, history, wire, wait=False):
    """The run so far in one file, never half of it: written beside it and renamed. Exits with one line if that fails.

    wait: rank 0 saves after all others, so that its round is one that they have saved too.
    """
    if wait and not wire.rank: all_sum([])
    try:
        torch.save({'options': options, 'w': w, 'history': history, 'wire': wire.state(len(history))}, path + '.tmp')
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as e:    # torch.save raises the latter when the disk is full
        fail(f'--checkpoint {path}: could not be written ({str(e).splitlines()[0]}); an earlier one is as it was', everyone=True)
    if wait and wire.rank: all_sum([])

def opened(flag, path):
    """(options, w, history, the wire's state) of the run saved at path, which flag names. Exits with one line if it is no checkpoint."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        was, w, history, wire = {**vars(args_parser([])), **saved['options']}, dict(saved['w']), list(saved['history']), saved['wire']
        if not {'kept', 'left', 'holders'} <= wire.keys(): raise ValueError('half empty')
        if not w or not all(set(COLUMNS) <= set(row) for row in history): raise ValueError('half empty')
    except Exception as e:      # what torch.load raises for foreign bytes is not documented
        fail(f'--{flag} {path}: not a checkpoint of this program, or of another version of it ({type(e).__name__}); name one, or '
             f'leave {"--resume" if flag == "checkpoint" else f"--{flag}"} out', everyone=True)
    return was, w, history, wire

def restore(path, options):
    """opened's, for a run that goes on under these options. Exits with one line if they are others than it had."""
    was, w, history, wire = opened('checkpoint', path)
    other = [name for name, v in options.items() if name not in FREE and was[name] != v and not (name == 'noise' and was['epsilon'])]
    if other:
        fail('--resume 1: the checkpoint was made with ' + ', '.join(f'--{name} {shown(was[name])} (given: {shown(options[name])})' for name in other)
             + '; give the same, or another --checkpoint', everyone=True)
    return was, w, history, wire

def plot(path, history):
    """Accuracy and loss against rounds, as a picture at path."""
    from matplotlib.figure import Figure
    figure = Figure((9, 3.5), layout='constrained')
    left, right = figure.subplots(1, 2)
    rounds = [row['round'] for row in history]
    left.plot(rounds, [row['test_acc'] for row in history])
    left.set(xlabel='round', ylabel='test accuracy')
    for name in ('train_loss', 'test_loss'): right.plot(rounds, [number(row[name]) for row in history], label=name.replace('_', ' '))
    right.set(xlabel='round', ylabel='loss')
    right.legend()
    figure.savefig(path, dpi=150)

def measured(args, t, tally, cost, seconds):
    """The row of round t."""
    more = {'round': t, 'epsilon': cost, 'seconds': seconds, 'train_loss': tally['loss'] / tally['m_t'] if tally['m_t'] else '',
            'upload_seconds': tally['up_bytes'] / max(tally['senders'], 1) / 1e6 / args.bandwidth}      # side by side
    row = tally | more
    whole = ('clients', 'rejected', 'lost', 'late', 'up_bytes', 'down_bytes')
    return {name: int(row[name]) if name in whole else row[name] for name in COLUMNS}

def progress(args, history):
    """The last round in a line."""
    row = history[-1]
    print(f'round {row["round"]:4d}/{args.epochs}   train loss {number(row["train_loss"]):.4f}   '
          f'test acc {100 * row["test_acc"]:.2f} %   best {100 * max(r["test_acc"] for r in history):.2f} %   '
          + ''.join(f'{row[name]} {name}   ' for name in ('rejected', 'lost', 'late') if row[name]) +
          f'up {row["up_bytes"] / 1e6:.3g} MB ({row["upload_seconds"]:.3g} s a client)   down {row["down_bytes"] / 1e6:.3g} MB   '
          + (f'round time {row["round_time"]:.3g}   ' if timed(args) else '') + (f'epsilon {row["epsilon"]:.3g}   ' if row['epsilon'] != '' else '') +
          f'{row["seconds"]:.2f} s   {row["seconds"] * (args.epochs - row["round"]):.0f} s left', flush=True)

def number(value):
    """A log's value for a picture or a line; where it has none, NaN."""
    return math.nan if value == '' else value

def timed(args):
    """Whether the simulated time of a round is of interest."""
    return args.speeds is not None or args.deadline or args.overselect

def reached(args, history):
    """Rounds to --target, or None. Before the last round of --prune's schedule none counts: the model is not pruned yet."""
    before = (args.prune_end or 1) - 1
    rounds = rounds_to(args.target or math.inf, [row['test_acc'] for row in history[before:]])
    return rounds and before + rounds

def summary(args, history, fp32):
    """The run's end in a few lines: accuracy, time, bytes beside the fp32 bytes of a whole w, and the rounds to --target."""
    accuracies = [row['test_acc'] for row in history]
    best = max(accuracies)
    seconds = sum(row['seconds'] for row in history)
    print(f'{len(history)} rounds in {seconds:.0f} s: best test accuracy {100 * best:.2f} % (round {accuracies.index(best) + 1}), '
          f'last {100 * accuracies[-1]:.2f} %')
    sent = list(itertools.accumulate((row['up_bytes'] for row in history), initial=0))
    payloads = sum(row['clients'] + row['rejected'] for row in history)
    seconds_up = sum(row['upload_seconds'] for row in history)
    print(f'uploaded {sent[-1] / 1e6:.2f} MB (fp32: {payloads * fp32 / 1e6:.2f} MB, {payloads * fp32 / max(sent[-1], 1):.1f} times that), '
          f'{seconds_up:.3g} s in all for a client of each round at {args.bandwidth:g} MB/s; downloaded '
          f'{sum(row["down_bytes"] for row in history) / 1e6:.2f} MB')
    if timed(args):
        print(f'simulated time {sum(row["round_time"] for row in history):.4g}, in units of what the median client takes for its {args.local_ep} '
              f'epochs; {sum(row["late"] for row in history)} clients were late')
    if args.dp:
        delta = args.delta or (f'1/{args.num_users}' if args.dp == 'user' else '1/n_k')
        print(f'epsilon {history[-1]["epsilon"]:.3g} at delta {delta} ({args.dp}, noise {args.noise:.4g}, clip {args.clip:g})')
    if args.target:
        rounds = reached(args, history)
        print(f'rounds to {100 * args.target:.2f} %: ' + (f'{rounds:.1f}, with {np.interp(rounds, range(len(sent)), sent) / 1e6:.2f} MB '
              'uploaded' if rounds else f'not reached in {len(history)} rounds'))

def report(args, accuracies, asked):
    """--personal's lines: how the accuracies, (2, K), are spread over the clients."""
    print(f'accuracy on the labels that a client holds, of {args.num_users} clients, {asked} of which were ever asked:')
    w = 'the global model' if args.personal != 'layers' else f'w, {shown(args.personal_layers)} as at first'
    for name, of in zip((f'--personal {args.personal}', w), accuracies):
        of = of[np.isfinite(of)]        # a silo's test files may have none of its labels
        low, high = np.percentile(of, (10, 90))
        print(f'  {name:22s} mean {100 * of.mean():.2f} %   10th percentile {100 * low:.2f} %   90th {100 * high:.2f} %')

#############################################
#              Algorithm 1: main            #
#############################################

def device_of(gpu):
    """CUDA device `gpu`, under torchrun the LOCAL_RANK-th from it; the CPU for -1 and, which is said, where there is no CUDA."""
    if gpu == -1: return torch.device('cpu')
    if not torch.cuda.is_available():
        if os.environ.get('RANK', '0') == '0': print('no CUDA here, so this runs on the CPU')
        return torch.device('cpu')
    wanted, there = gpu + int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
    if wanted >= there:
        fail(f'--gpu {gpu}: this machine has {there} GPU{"s"[:there != 1]}; take 0 to {there - 1}, a process each, or -1 for the CPU',
             everyone=True)
    return torch.device('cuda', wanted)

def cuttable(args, net):
    """Exits with one line if the net has no such place to cut at, or no such layers."""
    if args.cut:
        try: split(net, args.cut)
        except ValueError as e: fail(f'--cut {args.cut}: {e}', everyone=True)
    unknown = set(args.personal_layers or ()) - set(net.stages)
    if unknown or set(args.personal_layers or ()) == set(net.stages):
        fail(f'--personal_layers {",".join(args.personal_layers)}: {args.model} has {", ".join(net.stages)}; take some of them, not all', everyone=True)

def agree(options, first):
    """Exits with one line if this silo was started under other options than the first, in what the weights depend on."""
    other = [name for name, v in options.items() if name not in LOCAL and v != first[name]]
    if bool(options['checkpoint']) != bool(first['checkpoint']): other.append('checkpoint')
    if other:
        fail('--silo 1: the first silo has ' + ', '.join(f'--{name} {shown(first[name])}' for name in other) + '; give the same',
             everyone=True)

def holdings(args, rank):
    """(train, test, {k: indices}): what the simulation holds, or with --silo this process's own data, it being client `rank`.

    Exits with one line if the data cannot be read or shared.
    """
    first = os.environ.get('LOCAL_RANK', '0') == '0'
    if not first: all_sum([])       # waits: the first process of a machine may have to download what the others then find
    folder, seed = (args.data_dir.replace('{rank}', str(rank)), args.seed + rank) if args.silo else (args.data_dir, args.seed)
    try:
        train, test = load(args.dataset, folder, seed, not args.silo)
        if not args.silo: parts = partition(train.tensors[1], args.num_users, args.iid, args.alpha, args.unequal, args.seed)
    except (OSError, ValueError) as e: fail(e, everyone=True)
    if first: all_sum([])
    if args.silo: parts = {rank: np.arange(len(train))}
    train, test = (TensorDataset(*(v.to(args.device) for v in data.tensors)) for data in (train, test))
    return train, test, parts

def counts(parts, K, silo):
    """How many examples each of the K clients holds, (K,); silos tell each other."""
    n = torch.tensor([len(parts.get(k, ())) for k in range(K)])
    if silo: all_sum([n])
    return n.numpy()

def balanced(train, parts, mean, seed):
    """(train, parts) with augmented copies of what sampling.lacking finds, a client's own behind what it had."""
    x, y = train.tensors
    more, n = lacking(parts, y.cpu(), mean, rng(seed, 'balance')), len(y)
    of = torch.from_numpy(np.concatenate(list(more.values()))).to(y.device)
    ends = n + np.cumsum([len(idxs) for idxs in more.values()])
    parts = {k: np.append(parts[k], np.arange(end - len(idxs), end)) for (k, idxs), end in zip(more.items(), ends)}
    print(f'--balance 1: {len(of)} copies')
    seed_torch(seed, 'copies')
    copies = torch.cat([augmented(part) for part in x[of].split(4000)]) if len(of) else x[of]
    return TensorDataset(torch.cat([x, copies]), torch.cat([y, y[of]])), parts

def teacher_of(args):
    """(--teacher's options, its net). Exits with one line if it is no checkpoint, or not one of a whole net for this data set."""
    was, w, *_ = opened('teacher', args.teacher)
    if was['dataset'] != args.dataset: fail(f'--teacher {args.teacher}: was trained on {was["dataset"]}; take one of {args.dataset}', everyone=True)
    if was['personal_layers']:
        fail(f'--teacher {args.teacher}: has no last word in {shown(was["personal_layers"])}, its clients\' own; take one without', everyone=True)
    was = argparse.Namespace(**was)
    net = build(was).to(args.device)
    try: net.load_state_dict(w)
    except RuntimeError as e:
        fail(f'--teacher {args.teacher}: its weights are not those of {was.model} ({str(e).splitlines()[0]}); take another', everyone=True)
    return was, net

def taught_by(args, was, net, train, test):
    """(train with the logits of teacher_of's net, for the images as they are, beside its labels; that net's line for the summary)."""
    print(f'--teacher {args.teacher}: labels the training set', flush=True)
    show, (x, y) = augmentation(was)[1], train.tensors
    acc = evaluate(net, show(test.tensors[0]), test.tensors[1], args.bs, all_sum)[1]
    return TensorDataset(x, taught(net, show(x), y, args.bs)), f'teacher {was.model}: {size_of(net)}, {100 * acc:.2f} %'

def size_of(net):
    """A net's parameters, and its bytes on the wire, in words."""
    return f'{sum(p.numel() for p in net.parameters()):,} parameters, {len(encode(flat(net.state_dict()))) / 1e6:.3g} MB'

def pace(args, load):
    """sampling.durations for clients with so many examples. Exits with one line if --deadline leaves none of them the time for an epoch."""
    duration = durations(load, args.speeds or 0, args.seed)
    least = duration.min() / args.local_ep
    if args.deadline and args.deadline < least:
        fail(f'--deadline {args.deadline:g}: no client can do an epoch by then; take {math.ceil(100 * least) / 100} or more', everyone=True)
    return duration

def turnout(args, S_t, duration, m, t):
    """What becomes of S_t in round t: ({k: local epochs} of those whose update is sent, {k: stage} of those that are lost or late,
    {k: kind} of those whose update is damaged, what the tally counts of it)."""
    lost = lose(S_t, args.drop, rng(args.seed, 'drop', t))
    there = [k for k in S_t if k not in lost or (args.secagg and lost[k] == 2)]
    work, took = in_time(there, duration, args.local_ep, m if args.overselect else len(S_t), args.deadline or math.inf,
                         rng(args.seed, 'finish', t))
    counted = {'lost': len(lost), 'late': len(there) - len(work), 'round_time': took}
    corrupt = corrupted(work, args.corrupt, rng(args.seed, 'corrupt', t))
    return work, lost | {k: 1 for k in there if k not in work}, corrupt, counted

def own_models(args, clients, net, w, wire, train, parts, dealt, t):
    """Yields (k, weights) for each client of this process: w with the layers that stayed with it (Arivazhagan et al. 2019), or lambda w +
    (1 - lambda) what --personal_ep more epochs make of w (after Mansour et al. 2020); lambda 0 is finetune."""
    print(f'--personal {args.personal}: testing {args.num_users} clients', flush=True)
    own, mask = wire.own(w, dealt), shaped(from_rank_0(wire.left), w) if args.prune else None
    if args.personal == 'layers': yield from ((k, w | own.get(k, {})) for k in dealt[wire.rank])
    else:
        for k, w_k, _ in clients(args, net, train, parts, dict.fromkeys(dealt[wire.rank], args.personal_ep), t, mask):
            yield k, FedAvg([w, w_k], [args.mix, 1 - args.mix])

def personal(args, models, net, w, x, y, labels):
    """Each client's accuracies, (2, K): of its own model, of those in models, and of w; on the test set x, y weighted by the labels
    that it holds, in labels, {k: (n_k,)}."""
    accuracies = torch.zeros(2, args.num_users, dtype=torch.float64, device=args.device)
    in_test = torch.bincount(y, minlength=args.num_classes).clamp(min=1)
    net.load_state_dict(w)
    right = answers(net, x, y, args.bs)[1].double()
    for k, w_k in models:
        weight = (torch.bincount(labels[k], minlength=args.num_classes).double() / in_test)[y]       # (n,)
        at = weight > 0
        net.load_state_dict(w_k)
        accuracies[0, k] = weight[at] @ answers(net, x[at], y[at], args.bs)[1].double() / weight.sum()
        accuracies[1, k] = weight @ right / weight.sum()
        net.load_state_dict(w)          # the next client starts from it
    all_sum([accuracies])
    return accuracies.cpu().numpy()

def main(argv=None):
    """Runs the server of Algorithm 1 for the flags in argv (None: the command line); the log's rows, a dict a round."""
    args = args_parser(argv)
    options = {name: 'inf' if v == math.inf else v for name, v in vars(args).items()}
    args.device, args.server = map(device_of, args.gpu) if isinstance(args.gpu, tuple) else [device_of(args.gpu)] * 2
    if args.plot and not importlib.util.find_spec('matplotlib'):
        fail(f'--plot {args.plot}: needs matplotlib, which is not installed; pip install matplotlib, or leave --plot out')
    seed_torch(args.seed, 'init')
    net = build(args)
    cuttable(args, net)
    teacher = teacher_of(args) if args.teacher else None
    rank, size = processes(args.device)
    if args.silo:
        args.num_users = options['num_users'] = size
        agree(options, from_rank_0(options))
    if rank:
        sys.stdout, args.log, args.plot = open(os.devnull, 'w'), None, None        # rank 0's alone
        args.checkpoint = f'{args.checkpoint}.{rank}' if args.checkpoint and args.silo and keeps(args) else None
    saved = args.checkpoint and args.resume and os.path.exists(args.checkpoint)
    was, w, history, state = restore(args.checkpoint, options) if saved else ({}, None, [], None)
    was, w, history = from_rank_0((was, w, history))

    train, test, parts = holdings(args, rank)
    K, labels = args.num_users, {k: train.tensors[1][idxs] for k, idxs in parts.items()} if args.personal else {}
    n_k = counts(parts, K, args.silo)
    print(f'{args.dataset}: {n_k.sum()} training examples; {K} clients with {n_k.min()} to {n_k.max()} each; {args.model} with '
          f'{sum(p.numel() for p in net.parameters()):,} parameters on {size} x {args.device}')
    if args.balance: train, parts = balanced(train, parts, n_k.mean(), args.seed)
    n_trained = counts(parts, K, args.silo)      # n_k, and what --balance has added
    mine = slice(0, len(test) if rank == 0 else 0) if args.silo else slice(rank, None, size)    # of the test set; silos' is rank 0's
    if teacher: train, teachers = taught_by(args, *teacher, train, TensorDataset(*test[mine]))
    test = TensorDataset(augmentation(args)[1](test.tensors[0]), test.tensors[1])
    net = net.to(args.device)
    if args.device.type == 'cpu': net = net.to(memory_format=torch.channels_last)       # no change but for convolutions
    if w: net.load_state_dict(w)
    w = copy.deepcopy(net.state_dict())
    wire = (SecureWire if args.secagg else Wire)(args, w, n_k, rank, size, crossing(args, net))
    if history: wire.resume(state, len(history))
    draw = poisson if args.dp == 'user' else functools.partial(select, extra=args.overselect)
    asked = functools.lru_cache(None)(lambda t: draw(K, args.frac, rng(args.seed, 'select', t)).tolist())
    m = max(round(args.frac * K), 1)
    B = min(args.local_bs, max(map(len, parts.values())))
    make = functools.partial(engine, args, m=math.ceil(m / size / len(args.widths or [1])), B=B, cross=wire.cross)
    clients = Widths(args, net, make) if args.widths else make(net)
    duration = pace(args, n_trained)
    if args.dp and args.noise is None: options['noise'] = args.noise = was.get('noise') or planned(args, n_k, asked)
    complete = private if args.dp == 'user' else unasked
    deal = functools.partial(at_home if args.silo else shares, size=size)
    average = FedAvg if args.silo else functools.partial(FedAvg, all_sum=all_sum)       # of silos only rank 0 has updates
    if args.compile: clients.compile(train, bool(args.prune))
    if was: print(f'resumed from {args.checkpoint} after round {len(history)}; --epochs is {args.epochs}')
    else: set_aside(args.checkpoint)
    if was.get('log') != args.log: set_aside(args.log)
    log = open_log(args.log, options, history)
    code = 0
    try:
        for t in range(len(history) + 1, args.epochs + 1):
            if reached(args, history): break
            cost = spent(args, n_k, asked, t, args.noise) if args.dp else ''
            if args.epsilon and cost > args.epsilon:
                print(f'--epsilon {args.epsilon} is spent after round {t - 1}')
                break
            began = time.perf_counter()

            S_t = asked(t)
            work, lost, corrupt, counted = turnout(args, S_t, duration, m, t)       # {k: epochs}, {k: stage}, {k: kind}
            dealt = deal(work, n_trained)                                           # the clients of each process
            tally = dict.fromkeys(TALLY, 0) | (counted if rank == 0 else {})
            s = args.prune and sparsity(t, args.prune, args.prune_begin, args.prune_end)
            w_t, mask = wire.downlink(w, s, S_t, tally)
            own = wire.own(w_t, dealt)                                              # {k: the layers that stay with it}
            net.load_state_dict(w_t)
            updates = clients(args, net, train, parts, {k: work[k] for k in dealt[rank]}, t, mask, own)      # (k, w_k, loss), one at a time
            updates = wire.uplink(updates, w_t, t, dealt, lost, corrupt)            # (w_k, n_k) of those that are accepted
            updates = complete(args, updates, w_t, n_k, S_t, t, rank == 0, wire.at(0))      # and what else the average counts
            w_next = average(updates) or w_t

            tally = dict(zip(tally, all_summed(tally.values(), args.device)))
            if tally['rejected'] == len(work) > len(corrupt) and args.dp != 'user':      # not only those that --corrupt has damaged
                print(f'round {t}: no update is finite; the weights stay those of round {t - 1}. Start again with a lower --lr '
                      f'than {args.lr}', file=sys.stderr if rank == 0 else sys.stdout)
                code = 1
                break
            if not tally['clients']: print(f'round {t}: ' + ('no update has come through' if S_t else 'nobody was drawn'))
            net.load_state_dict(w_next)
            tally['test_loss'], tally['test_acc'] = evaluate(net, *test[mine], args.bs, all_sum)
            row = measured(args, t, tally, cost, time.perf_counter() - began)
            w, history = w_next, history + [row]
            wire.commit()

            rows(log).writerow(row)
            log.flush()
            if args.checkpoint and t % args.save_every == 0:
                save(args.checkpoint, options, w, history, wire, wait=args.silo and wire.keeps)
            progress(args, history)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # torchrun sends a second one, which would cut the saving short
        print(f'\ninterrupted after round {len(history)}')
        code = 130
    if args.checkpoint:
        save(args.checkpoint, options, w, history, wire)
        print(f'checkpoint: {args.checkpoint}, after round {len(history)}')
    if history: summary(args, history, wire.fp32)
    if history and teacher: print(f'student {args.model}: {size_of(net)}, {100 * history[-1]["test_acc"]:.2f} %; {teachers}')
    if history and args.plot: plot(args.plot, history)
    if history and args.personal and not code:
        if args.silo:       # only rank 0 has the last average
            net.load_state_dict(from_rank_0({name: v.cpu() for name, v in w.items()}))
            w = copy.deepcopy(net.state_dict())
        models = own_models(args, clients, net, w, wire, train, parts, deal(range(K), n_trained), len(history) + 1)
        ever = {k for row in history for k in asked(row['round'])}
        try:
            accuracies = personal(args, models, net, w, *test.tensors, labels)
            open_log(args.log, options | {'accuracies': accuracies.T.tolist()}, history).close()      # beside the options, in its first line
            report(args, accuracies, len(ever))
        except KeyboardInterrupt:
            print('\ninterrupted: no report of --personal' + (', which --resume makes' if args.checkpoint else ''))
            code = 130
    if code != 130: all_sum([])         # torchrun would end rank 0 at its saving if another left with an error before
    if dist.is_initialized(): dist.destroy_process_group()
    if code: sys.exit(code)
    return history

if __name__ == '__main__':
    try: main()
    except KeyboardInterrupt: sys.exit(130)     # before the first round: nothing to keep
    except BrokenPipeError:                     # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
