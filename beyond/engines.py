"""Engines: several clients train side by side, which is faster than one after the other.

    python fedavg.py --engine stacked --compile 1

In Algorithm 1, "for each k in S_t in parallel": the weights of m clients are stacked to (m, ...)
and trained under torch.func.vmap, through the same hooks as LocalUpdate.train. Every client has
the loop's batches and, but for rounding, its weights; dropout and augmentation are drawn per
stack. --compile 1 runs the step of a stack under torch.compile.
"""
import copy
import hashlib
import inspect
import io
import logging
import math
import time
import tokenize

import torch
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence

from beyond import Room
from options import fail
from sampling import seed_torch

def flags(add):
    """--engine, --compile."""
    add('engine', 'auto', str, 'loop: one client after the other; stacked: several at once; auto: '
        'the faster one', choices=('auto', 'loop', 'stacked'))
    add('compile', 0, bool,
        '1: torch.compile the stacked step; takes from seconds to a minute at the start')

def check(args):
    """Only a stack is compiled."""
    if args.compile and args.engine == 'loop':
        fail('--compile 1: compiles the stacked step; leave out --engine loop')

def wanted(args):
    """Whether the flags ask for stacks; --engine auto takes what was measured to be faster
    (results/README.md, "Speed"): on a CPU, vmap's grouped convolutions are slow."""
    slow = args.model == 'paper_cnn' or (args.model == 'cnn' and args.local_bs > 20)
    slow = slow and args.device.type == 'cpu'
    return args.compile or args.engine == 'stacked' or (args.engine == 'auto' and not slow)

############################### What a stack cannot train ###############################

# Of the source of these methods of LocalUpdate, which a stack does not call but replaces.
REPLACED = '__init__', 'train', 'model', 'gradient'
FINGERPRINT = '18857b3bf7737c87'

def fingerprint(Client):
    """A hash of the source of LocalUpdate's methods that a stack replaces, without comments."""
    kinds = tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT
    words = []
    for name in REPLACED:
        try:
            source = inspect.getsource(getattr(Client, name))
        except (OSError, TypeError):        # written in a shell, say
            return 'unknown'
        lines = io.StringIO(inspect.cleandoc(source)).readline
        words += [token.string for token in tokenize.generate_tokens(lines)
                  if token.type not in kinds and not token.string.startswith('"""')]
    return hashlib.sha256(' '.join(words).encode()).hexdigest()[:16]

def unstackable(Client, net):
    """Why the clients, or their net, cannot train in a stack; None if they can."""
    *subclasses, LocalUpdate = [cls for cls in Client.__mro__ if cls is not object]
    hooks = set(vars(LocalUpdate)) - {'__doc__', '__module__', '__dict__', '__weakref__'}
    for cls in subclasses:
        if hooks & set(vars(cls)) - {'stacks'} and not vars(cls).get('stacks'):
            return f'{cls.__name__} does not say that its hooks take stacks (stacks = True)'
    if fingerprint(LocalUpdate) != FINGERPRINT:
        return f'{", ".join(REPLACED)} of LocalUpdate are not those that a stack stands for'
    for name, module in net.named_modules():
        norm = isinstance(module, torch.nn.modules.batchnorm._NormBase)
        if norm or list(module.buffers(recurse=False)):     # vmap cannot update them
            return f'{name or type(net).__name__} keeps running statistics or other buffers'
    return None

##################################### The server's side ######################################

class Stacked(Room):
    """Trains the clients of S_t in stacks, those with the most steps first."""
    def __init__(self, args):
        super().__init__(args)
        self.reason = unstackable(self.Client, self.net)
        if self.reason and (args.engine == 'stacked' or args.compile):
            fail(f'--engine {args.engine}, --compile {args.compile}: the clients cannot train '
                 f'stacked, {self.reason}; take --engine loop and no --compile', everyone=True)

    def prepare(self):
        super().prepare()
        if self.reason:
            print(f'--engine {self.args.engine}: clients train one after the other, as '
                  f'{self.reason}')
            return
        B = min(self.args.local_bs, max(map(len, self.parts.values())))
        kind, k = CompiledStack if self.args.compile else Stack, next(iter(self.parts))
        self.stack_of = {net: kind(net, self.client(k, self.Round(0)), self.stack_size(net, B), B)
                         for net in self.nets()}
        for stack in self.stack_of.values() if self.args.compile else ():
            stack.compile(*self.train_set.tensors)

    def stack_size(self, net, B):
        """How many clients a stack has: on a CPU what fits its caches, on a GPU what 2 GiB hold at
        16 bytes a weight and 1 MiB an example; all stacks of a round are of like size."""
        size = 2 if self.args.compile else 10
        if self.args.device.type == 'cuda':
            weights = sum(p.numel() for p in net.parameters())
            size = max(1, 2**31 // (16 * weights + B * 2**20))
        m = max(round(self.args.frac * self.K), 1)
        m = math.ceil(m / self.size / len(self.nets()))
        return math.ceil(m / math.ceil(m / size))

    def train(self, w, S_t, r):
        return super().train(w, S_t, r) if self.reason else self.stacked(w, S_t, r)

    def stacked(self, w, S_t, r):
        """Yields the Update of each client of S_t."""
        if not S_t:
            return
        stack, args = self.stack_of[self.net], self.args
        stack.client = self.client(next(iter(S_t)), r)
        lr = args.lr * args.lr_decay ** (r.t - 1)
        plans = {k: self.plan(k, E, stack.client, r) for k, E in S_t.items()}
        order = sorted(S_t, key=lambda k: -len(plans[k][0]))
        for i in range(0, len(order), stack.size):
            ks = order[i:i + stack.size]
            seed_torch(self.args.seed, 'dropout', r.t, ks[0])
            states = [self.start(k, w, r) for k in ks]
            stack.begin(self.net, states, lr)
            results = stack.train(*self.train_set.tensors, [plans[k] for k in ks])
            for k, (w_k, loss) in zip(ks, results):
                yield self.Update(k, w_k, self.weight(k), loss)

    def plan(self, k, E, client, r):
        """Client k's batches as indices, (steps, B), and weights, (steps, B): 1/b for each of the
        b examples of a batch, 0 for padding."""
        seed_torch(self.args.seed, 'train', r.t, k)
        batches = client.batches(len(self.parts[k]), E, self.args.local_bs)
        index = torch.as_tensor(self.parts[k], device=self.args.device)
        sizes = torch.tensor([len(b) for b in batches], device=index.device)
        real = torch.arange(int(sizes.max()), device=index.device) < sizes[:, None]
        padded = index.new_zeros(real.shape)
        padded[real] = index[torch.cat(batches)]
        return padded, real / sizes[:, None]

######################################### A stack ############################################

class Stack:
    """Copies of a net's weights, (m, ...), m at most `size`, and one optimizer for all.

    The clients with the most steps come first, so that those still at work are the first few; one
    that is done is copied out and leaves the stack, with its optimizer state.
    """
    def __init__(self, net, client, size, B):
        self.net, self.client, self.size, self.B = copy.deepcopy(net).train(), client, size, B
        self.names = [name for name, _ in net.named_parameters()]

    def begin(self, net, states, lr):
        """Copies of the weights in states, a state_dict for each client; a fresh optimizer."""
        self.client.model(net)
        self.w = [stacked([w[name] for w in states]).requires_grad_() for name in self.names]
        self.start = [v.detach().clone() for v in self.w]
        self.optimizer = self.client.optimizer(self.w, lr)

    def train(self, x, y, plans):
        """(w_k, mean loss) of each client, whose plans have descending numbers of steps."""
        steps = [len(index) for index, _ in plans]
        seen = [int((weight > 0).sum()) for _, weight in plans]
        index, weight = self.padded(plans)                                      # (steps, m, B)
        total, w = torch.zeros(index.shape[1], device=x.device), [None] * len(plans)
        for s in range(steps[0]):
            self.narrow(sum(n > s for n in steps))
            m = len(self.w[0])
            total[:m] += self.step(x, y, index[s, :m], weight[s, :m])
            for i, n in enumerate(steps):
                if n == s + 1:
                    w[i] = {name: v[i].detach().clone() for name, v in zip(self.names, self.w)}
        # Only here does the program wait for the device.
        return [(w_k, loss / n) for w_k, loss, n in zip(w, total.tolist(), seen)]

    def padded(self, plans):
        """The plans as (steps, m, B) each, zeros where a client has no more."""
        B = max(index.shape[1] for index, _ in plans)
        plans = [[torch.nn.functional.pad(v, (0, B - v.shape[1])) for v in plan] for plan in plans]
        return [pad_sequence(v) for v in zip(*plans)]

    def narrow(self, m):
        """Keeps the first m of the stack, and their optimizer state."""
        if m == len(self.w[0]):
            return
        state, group = self.optimizer.state, self.optimizer.param_groups[0]
        self.start = [v[:m] for v in self.start]
        for i, v in enumerate(self.w):
            self.w[i] = v.detach()[:m].requires_grad_()
            if v in state:
                state[self.w[i]] = {name: u[:m] if u.shape == v.shape else u
                                    for name, u in state.pop(v).items()}
        group['params'] = self.w

    @torch.no_grad()
    def step(self, x, y, index, weight):
        """One optimizer step of every client on the examples at index, (m, B); the sums of their
        losses before it, (m,)."""
        images = x[index].flatten(0, 1)                                         # (m B, 1, 28, 28)
        images = self.client.transform(images).unflatten(0, index.shape)
        grads, losses = self.gradients(images, y[index], weight)
        for v, g in zip(self.w, grads):
            v.grad = g
        self.client.adjust(self.w, self.start)
        # Without the wrappers around it (hooks, profiling), which would cut a compiled step.
        inspect.unwrap(type(self.optimizer).step)(self.optimizer)
        self.client.project(self.w)
        for v in self.w:
            v.grad = None
        return losses.detach() * (weight > 0).sum(1)

    def gradients(self, x, y, weight):
        """Each client's gradient of its own loss, (m, ...) for every weight, and the losses."""
        with torch.enable_grad():
            total, losses = self.losses(self.w, x, y, weight)
        return torch.autograd.grad(total, self.w), losses

    def losses(self, w, x, y, weight):
        """The sum of the clients' losses, whose gradient is each client's own, and each, (m,)."""
        def forward(w_k, x_k):
            return functional_call(self.net, dict(zip(self.names, w_k)), (x_k,))
        logits = vmap(forward, randomness='different')(list(w), x)              # (m, B, classes)
        losses = self.client.loss(logits.flatten(0, 1), y.flatten(0, 1), reduction='none')
        losses = losses.view(weight.shape) * weight
        return losses.sum(), losses.sum(1)

def stacked(tensors):
    """Tensors of one shape as one, (m, ...), in rows whatever their own memory format."""
    return torch.stack(tensors, out=tensors[0].new_empty(len(tensors), *tensors[0].shape))

class CompiledStack(Stack):
    """A Stack with its step under torch.compile. Another shape would be compiled anew, so that
    all stacks have the same size and B; weights and optimizer are set back, not made anew."""
    def __init__(self, net, client, size, B):
        super().__init__(net, client, size, B)
        states = [net.state_dict()] * size
        super().begin(net, states, torch.tensor(client.args.lr, device=client.args.device))
        for v in self.w:
            v.requires_grad_(False).grad = torch.zeros_like(v)
        self.optimizer.step()       # makes the optimizer's state
        for v in self.w + self.start + self.optimizer_state():
            torch._dynamo.mark_static_address(v)        # or no CUDA graph is made of the step
        cuda = client.args.device.type == 'cuda'
        mode = 'reduce-overhead' if cuda else 'max-autotune-no-cudagraphs'
        self.step = torch.compile(self.step, mode=mode)

    def optimizer_state(self):
        """The tensors of the optimizer's state."""
        return [v for state in self.optimizer.state.values() for v in state.values()
                if isinstance(v, torch.Tensor)]

    def compile(self, x, y):
        """Compiles the step and says how long it took; exits with one line if it cannot."""
        began = time.perf_counter()
        index = torch.zeros(self.size, self.B, dtype=torch.int64, device=x.device)
        torch._logging.set_logs(dynamo=logging.ERROR)
        try:
            self.step(x, y, index, index.float())
        except Exception as e:      # whatever torch.compile and the C++ compiler raise
            reason = str(getattr(e, 'inner_exception', e)).strip().splitlines()[0]
            fail(f'--compile 1: torch.compile does not work here ({reason}); leave the flag out',
                 everyone=True)
        print(f'--compile 1: compiled in {time.perf_counter() - began:.0f} s')

    def begin(self, net, states, lr):
        self.client.model(net)
        with torch.no_grad():
            for i in range(self.size):
                w = states[min(i, len(states) - 1)]
                for name, v, v_0 in zip(self.names, self.w, self.start):
                    v[i] = v_0[i] = w[name]
            for v in self.optimizer_state():
                v.zero_()
            self.optimizer.param_groups[0]['lr'].fill_(lr)

    def padded(self, plans):
        """As a Stack's, for `size` clients and B examples."""
        pad = torch.nn.functional.pad
        index, weight = (pad(v, (0, self.B - v.shape[-1])) for v in super().padded(plans))
        missing = self.size - index.shape[1]
        return [pad(v, (0, 0, 0, missing)) for v in (index, weight)]

    def narrow(self, m):
        """Clients that are done stay, and their steps are ignored."""

    def gradients(self, x, y, weight):
        # torch.compile does not take torch.autograd.grad.
        return torch.func.grad(self.losses, has_aux=True)(self.w, x, y, weight)
