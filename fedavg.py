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
                            w_k = ClientUpdate(k, w) for each k in S_t
                            w = sum over S_t of (n_k / m_t) w_k
    ClientUpdate(k, w): for E epochs, for each batch b of B of the client's shuffled examples: w = w - lr grad loss(w; b)
"""
import copy
import csv
import importlib.util
import itertools
import json
import math
import os
import sys
import time
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from compress import check
from models import build
from options import args_parser, fail
from sampling import load, partition, rng, select

#############################################
#               ClientUpdate                #
#############################################

class LocalUpdate:
    """ClientUpdate(k, w) of Algorithm 1: E epochs of SGD in batches of B over the examples that one client holds.

    args: needs local_ep (E), local_bs (B, math.inf for all at once), lr, momentum, device; optimizer is 'sgd' or 'adamw'.
    dataset: any map-style (float32 image tensor, label) data set. A client's tensors are made once, for all LocalUpdates of
    this data set and idxs: a random transform is drawn once, and a later change of the data set is not seen.
    idxs: the client's indices into it. Raises ValueError if there are none.
    """
    def __init__(self, args, dataset, idxs):
        self.args = args
        self.x, self.y = examples(dataset, idxs, args.device)      # (n_k, ...), (n_k,)

    def train(self, net, lr=None):
        """(state_dict, mean loss per example) after training from net's weights; net is left as it was. lr: default args.lr.

        The optimizer is a new one each time. Shuffles and dropout are drawn from torch's own generators.
        """
        net = copy.deepcopy(net).to(self.args.device).train()
        step = optimizer(self.args, net.parameters(), self.args.lr if lr is None else lr)
        n_k, B = len(self.y), min(self.args.local_bs, len(self.y))
        shuffles, total = [torch.randperm(n_k) for _ in range(self.args.local_ep)], torch.zeros((), device=self.x.device)
        for shuffle in shuffles:
            shuffle = shuffle.to(self.x.device)
            for x, y in zip(self.x[shuffle].split(B), self.y[shuffle].split(B)):
                loss = F.cross_entropy(net(x), y)
                step.zero_grad()
                loss.backward()
                step.step()
                total.add_(loss.detach(), alpha=len(y))     # stays on the device: no waiting for it
        return net.state_dict(), float(total) / (n_k * self.args.local_ep)

def optimizer(args, parameters, lr):
    """The local optimizer that args.optimizer names: SGD with args.momentum, the paper's without, or AdamW."""
    if getattr(args, 'optimizer', 'sgd') == 'adamw': return torch.optim.AdamW(parameters, lr=lr)
    return torch.optim.SGD(parameters, lr=lr, momentum=args.momentum)

MADE = weakref.WeakKeyDictionary()      # {data set: {(indices, device): tensors}}

def examples(dataset, idxs, device):
    """The images (n, ...) and labels (n,) at idxs as tensors on the device; remembered, unless they are tensors already."""
    idxs = np.fromiter(idxs, np.int64)
    if not len(idxs): raise ValueError('a client without examples cannot train; leave it out of S_t')
    if isinstance(dataset, TensorDataset):
        x, y = (v[torch.from_numpy(idxs).to(v.device)].to(device) for v in dataset.tensors)
        return x, y.long()
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

def local_updates(args, net, dataset, parts, S_t, t):
    """Yields (k, w_k, n_k, mean loss) for each k in S_t, one client after the other, each from net's weights."""
    lr = args.lr * args.lr_decay ** (t - 1)
    for k in S_t:
        seed_torch(args.seed, 'train', t, k)
        w_k, loss = LocalUpdate(args, dataset, parts[k]).train(net, lr)
        yield k, w_k, len(parts[k]), loss

#############################################
#            Server: uplink, average        #
#############################################

def uplink(updates, row, verbose=False):
    """(k, w_k, n_k, loss) in, (w_k, n_k) out for those that the server accepts; counts them in row, with their mean loss."""
    m_t = 0
    for k, w_k, n_k, loss in updates:
        try:
            check(w_k)
        except ValueError as e:
            row['rejected'] += 1
            print(f'round {row["round"]}: client {k} is left out, its {e}')
            continue
        if verbose: print(f'    client {k:5d}   n_k {n_k:6d}   loss {loss:.4f}')
        m_t += n_k
        row['clients'] += 1
        row['train_loss'] += (loss - row['train_loss']) * n_k / m_t
        yield w_k, n_k

def FedAvg(w, n=None):
    """The weighted mean of state_dicts, sum of n_k w_k over sum of n_k (Algorithm 1, last line of the server's loop).

    w: an iterable of state_dicts with their n_k in n (without n the plain mean), or one of pairs (state_dict, n_k); taken
    one by one, so that a few models are in memory at a time. Floating point tensors, buffers too, are averaged (summed in
    float64); others are the first's. The result shares no memory with what went in; None if nothing did.
    Raises ValueError if state_dicts differ in their keys or shapes, if n is of another length, or if all n_k are 0.
    """
    pairs = zip(w, n, strict=True) if n is not None else (u if isinstance(u, tuple) else (u, 1) for u in w)
    first = None
    for w_k, n_k in pairs:
        if first is None:
            first, m_t = copy.deepcopy(w_k), 0
            total = {name: torch.zeros_like(v, dtype=torch.float64) for name, v in first.items() if v.is_floating_point()}
        if w_k.keys() != first.keys() or any(w_k[name].shape != v.shape for name, v in first.items()):
            raise ValueError('the state_dicts to be averaged differ in their keys or shapes')
        for name, v in total.items(): v += n_k * w_k[name].double()
        m_t += n_k
    if first is None: return None
    if not m_t > 0: raise ValueError(f'the n_k add up to {m_t}; there is no mean')
    for name, v in total.items(): first[name].copy_(v / m_t)
    return first

@torch.no_grad()
def evaluate(net, x, y, bs):
    """(mean loss, accuracy in [0, 1]) of net on x (n, ...), y (n,), bs at a time; net's weights and modes stay as they are."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    loss, right = 0.0, 0
    for xb, yb in zip(x.split(min(bs, len(x))), y.split(min(bs, len(x)))):
        logits = net(xb)
        loss += F.cross_entropy(logits, yb, reduction='sum').double()
        right += (logits.argmax(1) == yb).sum()
    for module, mode in modes: module.training = mode
    return float(loss) / len(y), int(right) / len(y)

#############################################
#      What is kept: log, checkpoint, plot  #
#############################################

COLUMNS = ('round', 'train_loss', 'test_loss', 'test_acc', 'clients', 'rejected', 'up_bytes', 'down_bytes', 'epsilon', 'seconds')
# What may differ between a run and its resumption: nothing that the weights of a round depend on.
FREE = {'epochs', 'data_dir', 'gpu', 'bs', 'target', 'log', 'checkpoint', 'save_every', 'resume', 'plot', 'verbose'}

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

def save(path, options, w, history):
    """The run so far in one file, never half of it: written beside it and renamed. Exits with one line if that fails."""
    try:
        torch.save({'options': options, 'w': w, 'history': history}, path + '.tmp')
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as e:    # torch.save raises the latter when the disk is full
        fail(f'--checkpoint {path}: could not be written ({str(e).splitlines()[0]}); an earlier one is as it was')

def restore(path, options):
    """(options, w, history) of the run saved at path. Exits with one line if it is no checkpoint, or not of such a run."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        was, w, history = {**vars(args_parser([])), **saved['options']}, dict(saved['w']), list(saved['history'])
        if not w or not all(set(COLUMNS) <= set(row) for row in history): raise ValueError('half empty')
    except Exception as e:      # what torch.load raises for foreign bytes is not documented
        fail(f'--checkpoint {path}: not a checkpoint of this program ({type(e).__name__}); name one, or leave --resume out')
    other = [name for name, v in options.items() if name not in FREE and was[name] != v]
    if other:
        fail('--resume 1: the checkpoint was made with ' + ', '.join(f'--{name} {was[name]} (given: {options[name]})' for name in other)
             + '; give the same, or another --checkpoint')
    return was, w, history

def plot(path, history):
    """Accuracy and loss against rounds, as a picture at path."""
    from matplotlib.figure import Figure
    figure = Figure((9, 3.5), layout='constrained')
    left, right = figure.subplots(1, 2)
    rounds = [row['round'] for row in history]
    left.plot(rounds, [row['test_acc'] for row in history])
    left.set(xlabel='round', ylabel='test accuracy')
    for name in ('train_loss', 'test_loss'): right.plot(rounds, [row[name] for row in history], label=name.replace('_', ' '))
    right.set(xlabel='round', ylabel='loss')
    right.legend()
    figure.savefig(path, dpi=150)

def summary(args, history):
    """The run's end in a few lines: best and last accuracy, time, and the rounds to --target."""
    accuracies = [row['test_acc'] for row in history]
    best = max(accuracies)
    seconds = sum(row['seconds'] for row in history)
    print(f'{len(history)} rounds in {seconds:.0f} s: best test accuracy {100 * best:.2f} % (round {accuracies.index(best) + 1}), '
          f'last {100 * accuracies[-1]:.2f} %')
    if args.target:
        reached = rounds_to(args.target, accuracies)
        print(f'rounds to {100 * args.target:.2f} %: ' + (f'{reached:.1f}' if reached else f'not reached in {len(history)} rounds'))

#############################################
#              Algorithm 1: main            #
#############################################

def device_of(gpu):
    """CUDA device `gpu` where CUDA is present; the CPU for -1, and, said in one line, without CUDA."""
    if gpu < 0: return torch.device('cpu')
    if not torch.cuda.is_available():
        print(f'--gpu {gpu}: no CUDA here, so this runs on the CPU')
        return torch.device('cpu')
    there = torch.cuda.device_count()
    if gpu >= there: fail(f'--gpu {gpu}: this machine has {there} GPU{"s"[:there != 1]}; take 0 to {there - 1}, or -1 for the CPU')
    return torch.device('cuda', gpu)

def main(argv=None):
    """Runs the server of Algorithm 1 for the flags in argv (None: the command line); the log's rows, a dict a round."""
    args = args_parser(argv)
    options = {name: 'inf' if v == math.inf else v for name, v in vars(args).items()}
    args.device = device_of(args.gpu)
    if args.plot and not importlib.util.find_spec('matplotlib'):
        fail(f'--plot {args.plot}: needs matplotlib, which is not installed; pip install matplotlib, or leave --plot out')
    was, w, history = restore(args.checkpoint, options) if args.resume else ({}, None, [])

    try:
        train, test = load(args.dataset, args.data_dir, args.seed)
        parts = partition(train.tensors[1], args.num_users, args.iid, args.alpha, args.unequal, args.seed)
    except (OSError, ValueError) as e: fail(e)
    train, test = (TensorDataset(*(v.to(args.device) for v in data.tensors)) for data in (train, test))
    seed_torch(args.seed, 'init')
    net = build(args).to(args.device)
    if args.resume: net.load_state_dict(w)
    w = copy.deepcopy(net.state_dict())

    K, n_k = args.num_users, np.array([len(parts[k]) for k in range(args.num_users)])
    print(f'{args.dataset}: {n_k.sum()} training and {len(test)} test examples; {K} clients with {n_k.min()} to {n_k.max()} each; '
          f'{args.model} with {sum(p.numel() for p in net.parameters()):,} parameters on {args.device}')
    if args.resume: print(f'resumed from {args.checkpoint} after round {len(history)}; --epochs is {args.epochs}')
    else: set_aside(args.checkpoint)
    if was.get('log') != args.log: set_aside(args.log)
    log = open_log(args.log, options, history)
    code = 0
    try:
        for t in range(len(history) + 1, args.epochs + 1):
            if args.target and history and max(row['test_acc'] for row in history) >= args.target: break
            began = time.perf_counter()
            row = dict.fromkeys(COLUMNS, '') | {'round': t, 'train_loss': 0.0, 'clients': 0, 'rejected': 0}

            S_t = select(K, args.frac, rng(args.seed, 'select', t))
            updates = local_updates(args, net, train, parts, S_t, t)        # (k, w_k, n_k, loss), one at a time
            updates = uplink(updates, row, args.verbose)                    # (w_k, n_k) of those that are accepted
            rest = [(w, int(n_k.sum() - n_k[S_t].sum()))] if args.all_clients else []
            w_next = FedAvg(itertools.chain(updates, rest))
            if not row['clients']:
                print(f'round {t}: no update is finite; the weights stay those of round {t - 1}. Start again with a lower --lr than {args.lr}',
                      file=sys.stderr)
                code = 1
                break
            net.load_state_dict(w_next)
            row['test_loss'], row['test_acc'] = evaluate(net, *test.tensors, args.bs)
            row['seconds'] = time.perf_counter() - began
            w, history = w_next, history + [row]

            rows(log).writerow(row)
            log.flush()
            if args.checkpoint and t % args.save_every == 0: save(args.checkpoint, options, w, history)
            print(f'round {t:4d}/{args.epochs}   train loss {row["train_loss"]:.4f}   test acc {100 * row["test_acc"]:.2f} %   '
                  f'best {100 * max(r["test_acc"] for r in history):.2f} %   {row["seconds"]:.2f} s   '
                  f'{row["seconds"] * (args.epochs - t):.0f} s left', flush=True)
    except KeyboardInterrupt:
        print(f'\ninterrupted after round {len(history)}')
        code = 130
    if args.checkpoint:
        save(args.checkpoint, options, w, history)
        print(f'checkpoint: {args.checkpoint}, after round {len(history)}')
    if history: summary(args, history)
    if history and args.plot: plot(args.plot, history)
    if code: sys.exit(code)
    return history

if __name__ == '__main__':
    try: main()
    except KeyboardInterrupt: sys.exit(130)     # before the first round: nothing to keep
    except BrokenPipeError:                     # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
