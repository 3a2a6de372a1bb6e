"""Federated averaging: Algorithm 1 of McMahan et al., "Communication-Efficient Learning of Deep
Networks from Decentralized Data", AISTATS 2017 (arXiv 1602.05629).

    python fedavg.py --dataset synthetic                            # no download; --help: all flags
    python fedavg.py --dataset mnist --iid 0 --frac 0.1 --gpu 0

    K    clients in all                     S_t   the clients of round t, m of them
    C    fraction of them in a round        n_k   examples that client k holds
    E    local epochs                       m_t   examples of S_t together
    B    local batch size; lr is eta        w     weights, a state_dict; w_k those of client k

    Server:              initialize w; for each round t = 1, 2, ...:
                             m = max(C K, 1); S_t = m clients at random
                             for each k in S_t: w_k = ClientUpdate(k, w)
                             w = sum over S_t of (n_k / m_t) w_k
    ClientUpdate(k, w):  for E epochs, for each batch b of B examples of client k:
                             w = w - lr grad loss(w; b)

Server has a method for each line of the server, and algorithm_1() is its loop. The classes in
beyond/ override these methods, also to train clients side by side: a run names those in use.
"""
import collections
import copy
import importlib.util
import math
import signal
import sys
import time
import weakref

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C is quiet while torch is imported
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset, default_collate

######################################## ClientUpdate ########################################
class LocalUpdate:
    """ClientUpdate(k, w): E epochs of SGD in batches of B over the examples that client k holds.
    args: needs local_ep (E), local_bs (B, math.inf for all at once), lr, momentum and device.
    dataset: any map-style (float32 image tensor, label) data set; what is read is kept, so that
    later changes to it are not seen, unless a transform is random. idxs: the client's indices into
    it. Raises ValueError if there are none, or if an index or a label is no whole number."""
    stacks = True       # the hooks also accept parameters stacked over m clients, (m, ...)
    def __init__(self, args, dataset, idxs):
        self.args = args
        self.images, self.y = examples(dataset, idxs, args.device)  # b -> (B, ...); (n_k,)

    def train(self, net, lr=None, epochs=None):
        """(state_dict, mean loss per example) after training from net, which is left unchanged.
        lr and epochs, which may be a fraction, default to those of args."""
        start = [p.detach() for p in net.parameters()]
        net = self.model(net)
        parameters = list(net.parameters())
        optimizer = self.optimizer(parameters, self.args.lr if lr is None else lr)
        E = self.args.local_ep if epochs is None else epochs
        total, seen = torch.zeros((), device=self.y.device), 0
        for b in self.batches(len(self.y), E, self.args.local_bs):
            optimizer.zero_grad()
            loss = self.gradient(net, self.transform(self.images(b)), self.y[b])
            with torch.no_grad():
                self.adjust(parameters, start)
                optimizer.step()
                self.project(parameters)
            total.add_(loss, alpha=len(b))      # stays on the device: no waiting for it
            seen += len(b)
        return net.to(self.args.device).state_dict(), float(total) / max(seen, 1)

    def model(self, net):
        """The copy of net that trains."""
        return copy.deepcopy(net).to(self.args.device).train()

    def optimizer(self, parameters, lr):
        """A new optimizer in each round: SGD, the paper's if momentum is 0."""
        return torch.optim.SGD(parameters, lr=lr, momentum=self.args.momentum)

    def batches(self, n_k, E, B):
        """The indices of each batch of E epochs, (B,); a fraction of an epoch is whole batches."""
        if E <= 0 or B < 1:
            raise ValueError(f'local_ep {E}, local_bs {B}: E is above 0, B at least 1')
        B = min(B, n_k)
        shuffles = torch.stack([torch.randperm(n_k) for _ in range(math.ceil(E))])
        batches = [b for shuffle in shuffles.to(self.y.device) for b in shuffle.split(B)]
        return batches[:max(int(E * math.ceil(n_k / B) + 1e-9), 1)]     # 0.29 * 100 is below 29

    def transform(self, x):
        """Preprocesses the images x, (B, ...); here they stay as they are."""
        return x

    def gradient(self, net, x, y):
        """Leaves the gradient of the mean loss on x, y in net, and returns that loss."""
        loss = self.loss(net(x), y)
        loss.backward()
        return loss.detach()

    def loss(self, logits, y, reduction='mean'):
        """The loss of logits (B, classes, ...) for y (B, ...): the mean or, if 'none', each."""
        return F.cross_entropy(logits, y, reduction=reduction)

    def adjust(self, parameters, start):
        """Changes the gradients before a step. start: the parameters that the round began with."""

    def project(self, parameters):
        """Changes the parameters after a step."""

READ = weakref.WeakKeyDictionary()      # {data set: {(indices, device): (images, labels)}}
def examples(dataset, idxs, device):
    """(images, labels (n,)) of idxs, on the device; images(b) are those at b, (B, ...)."""
    idxs = np.asarray(list(idxs))
    if not len(idxs) or idxs.dtype.kind not in 'iu':
        raise ValueError('idxs are whole numbers, at least one; this client cannot train')
    idxs = idxs.astype(np.int64)
    def read(at=slice(None)):
        x, y = default_collate([dataset[i] for i in idxs[at].tolist()])
        return x.to(device), y.to(device)
    if type(dataset) is TensorDataset:
        x, y = (v[torch.from_numpy(idxs).to(v.device)].to(device) for v in dataset.tensors)
    else:
        keeps = type(dataset).__hash__ and hasattr(dataset, '__weakref__')
        known = READ.setdefault(dataset, {}) if keeps else {}
        key = idxs.tobytes(), str(device)
        if key not in known:
            (x, y), *again = (read() for _ in range(2 + 64 // len(idxs)))
            fixed = all(torch.equal(x, other) for other, _ in again)    # no random transform
            known[key] = (x if fixed else None), y
        x, y = known[key]
    if y.dim() == 1 and (y != y.long()).any():
        raise ValueError('labels are whole numbers')
    images = x.__getitem__ if x is not None else lambda b: read(b.cpu().numpy())[0]     # anew
    return images, y.long() if y.dim() == 1 else y

Update = collections.namedtuple('Update', 'k w n loss kept', defaults=({},))    # kept: for beyond/
def FedAvg(w, n=None, all_sum=lambda tensors: None):
    """The weighted mean of state_dicts, sum of n_k w_k over sum of n_k (Algorithm 1, last line).
    w: state_dicts with their n_k in n (without n the plain mean), or Updates; read one by one.
    Floating point tensors, buffers too, are averaged (summed in float64), others copied from the
    first. The result shares no memory with its terms; None if there are none, or the n_k sum to 0.
    all_sum: sums a list of tensors over all processes, in place; each process needs a term.
    Raises ValueError for keys, shapes or n_k that do not fit, TypeError for other terms."""
    first, total, m_t = None, {}, 0.0
    updates = ((u.w, u.n) if isinstance(u, Update) else (u, 1) for u in w)
    for w_k, n_k in updates if n is None else zip(w, n, strict=True):
        if not isinstance(w_k, dict) or not all(map(torch.is_tensor, w_k.values())):
            raise TypeError(f'FedAvg averages state_dicts or Updates, not a {type(w_k).__name__}')
        if n is not None and not 0 <= n_k < math.inf or math.isnan(n_k):
            raise ValueError(f'n_k {n_k}: a weight is finite and at least 0')
        if first is None:
            first = copy.deepcopy(w_k)
            total = {name: torch.zeros_like(v, dtype=torch.float64)
                     for name, v in first.items() if v.is_floating_point()}
        if not total or {a: v.shape for a, v in w_k.items()} != {
                a: v.shape for a, v in first.items()}:
            raise ValueError('the state_dicts differ in their keys or shapes, or hold no floats')
        for name, v in total.items():
            v.add_(w_k[name].to(v), alpha=float(n_k))      # to its device too
        m_t += float(n_k)
    m_t = next(iter(total.values()), torch.zeros(1)).new_tensor(m_t)
    all_sum([m_t, *total.values()])
    for name, v in total.items() if m_t else ():
        first[name].copy_(v / m_t)
    return first if m_t else None

@torch.no_grad()
def evaluate(net, x, y, bs, all_sum=lambda tensors: None):
    """(mean loss, accuracy) of net, left unchanged, on x (n, ...), y (n,) or (n, T), bs at once."""
    net, sums = copy.deepcopy(net).to(x.device).eval(), x.new_zeros(3, dtype=torch.float64)
    for xb, yb in zip(x.split(bs), y.split(bs)) if len(x) else ():      # a process may have none
        logits = net(xb)                                # (bs, classes); of text (bs, classes, T)
        loss, right = F.cross_entropy(logits, yb, reduction='none'), logits.argmax(1) == yb
        sums += torch.stack([v.double().sum() for v in (loss, right, yb >= 0)])     # < 0: padding
    all_sum([sums])
    return tuple((sums[:2] / sums[2]).tolist())

def rounds_to(target, accuracies):
    """Rounds to the target accuracy, or None: best so far, linearly interpolated (Section 3)."""
    best = np.maximum.accumulate(accuracies).tolist()
    for t, (before, now) in enumerate(zip(best[:1] + best, best)):
        if now >= target:
            return t + (target - before) / (now - before) if t else 1.0

########################################## The server #########################################
class Round:
    """Round t, and what its steps leave for one another: S_t, {k: its epochs}, and a tally."""
    def __init__(self, t):
        self.t, self.began, self.tally = t, time.perf_counter(), collections.Counter()
class Stop(Exception):
    """Ends the run, which keeps its last whole round: Stop(line, exit code)."""

class Server:
    """Algorithm 1's server. Its steps do not call one another; algorithm_1() calls them."""
    Client, Update, Round, Stop = LocalUpdate, Update, Round, Stop      # as rooms find them
    evaluate = staticmethod(evaluate)
    sampling = property(lambda self: importlib.import_module('sampling'))
    rank = 0            # this process: the first one prints, and counts what all of them know
    all_sum = staticmethod(lambda tensors: None)    # sums over all processes: there is one
    def __init__(self, args):
        from models import build
        self.args, self.K, self.history = args, args.num_users, []
        self.sampling.seed_torch(args.seed, 'init')
        self.net = build(args)

    def prepare(self):
        """Reads the data, deals them to the clients and initializes w."""
        *sets, self.parts, self.n_k = self.holdings()               # {k: indices}, (K,)
        self.train_set, self.test_set = (
            TensorDataset(*(v.to(self.args.device) for v in data.tensors)) for data in sets)
        fastest = None if 5 in {p.dim() for p in self.net.parameters()} else torch.channels_last
        self.w = copy.deepcopy(self.net.to(self.args.device, memory_format=fastest).state_dict())

    def holdings(self):
        """(training set, test set, {k: indices into the training set}, n_k of all clients)."""
        return self.sampling.holdings(self.args, self.K)

    def select(self, r):
        """S_t: m = max(C K, 1) clients at random, {k: E}, as stragglers may do fewer epochs."""
        draw = self.sampling.rng(self.args.seed, 'select', r.t)
        S_t = self.sampling.select(self.K, self.args.frac, draw)
        return dict.fromkeys(S_t.tolist(), self.args.local_ep)

    def send(self, w, S_t, r):
        """w as the clients of S_t receive it."""
        return w

    def train(self, w, S_t, r):
        """Yields each client's Update, w_k = ClientUpdate(k, w), once average() asks for it."""
        lr = self.args.lr * self.args.lr_decay ** (r.t - 1)
        for k, E in S_t.items():
            self.net.load_state_dict(self.start(k, w, r))
            self.sampling.seed_torch(self.args.seed, 'train', r.t, k)
            w_k, loss = self.client(k, r).train(self.net, lr, E)
            yield Update(k, w_k, self.weight(k), loss)

    def client(self, k, r):
        """Client k, as it is in round t."""
        return self.Client(self.args, self.train_set, self.parts[k])

    def start(self, k, w, r):
        """The weights that client k starts from: w."""
        return w

    def weight(self, k):
        """The weight of w_k in the average: n_k."""
        return int(self.n_k[k])

    def receive(self, updates, w, r):
        """The updates as they reach the server, counted."""
        for u in updates:
            n_k = int(self.n_k[u.k])
            r.tally.update(clients=1, m_t=n_k, loss=n_k * u.loss)
            if self.args.verbose:
                print(f'    client {u.k:5d}   n_k {n_k:6d}   loss {u.loss:.4f}')
            yield u

    def average(self, updates, w, r):
        """The next w: sum over S_t of (n_k / m_t) w_k; or w if no update arrived."""
        return FedAvg(updates, all_sum=self.all_sum) or w

    def measure(self, w, r):
        """The row of round t: w's loss and accuracy on the test set, and what was counted."""
        self.net.load_state_dict(w)
        loss, acc = self.evaluate(self.net, *self.test_set.tensors, self.args.bs, self.all_sum)
        train_loss = r.tally['loss'] / r.tally['m_t'] if r.tally['m_t'] else math.nan
        return dict(round=r.t, train_loss=train_loss, test_loss=loss, test_acc=acc,
                    clients=int(r.tally['clients']), seconds=time.perf_counter() - r.began)

    def end(self, w, row, r):
        """Ends round t. The state of the run changes here alone, all at once."""
        self.w, self.history = w, self.history + [row]

    def describe(self, row):
        """The line that is printed about a round."""
        return (f'round {row["round"]:4d}/{self.args.epochs}   train loss {row["train_loss"]:.4f}'
                f'   test acc {100 * row["test_acc"]:.2f} %')

    def done(self, r):
        """Whether to stop before round t: at --target."""
        return self.reached() is not None

    def reached(self, first=1):
        """Rounds to --target, or None. first: the first round whose accuracy counts."""
        accuracies = [row['test_acc'] for row in self.history[first - 1:]]
        rounds = rounds_to(self.args.target or math.inf, accuracies)
        return None if rounds is None else first - 1 + rounds

    def summary(self):
        """The lines that are printed at the end."""
        best, rounds = max(self.history, key=lambda row: row['test_acc']), self.reached()
        lines = [f'best test accuracy {100 * best["test_acc"]:.2f} % (round {best["round"]})']
        if self.args.target:
            found = f'{rounds:.1f}' if rounds else f'not reached by round {len(self.history)}'
            lines.append(f'rounds to {100 * self.args.target:.2f} %: {found}')
        return lines

    def launch(self, algorithm):
        """Runs the algorithm, in this process alone; returns its rows."""
        return algorithm(self)

    def finish(self, code):
        """Prints what came of it; returns the exit code."""
        print('\n'.join(self.summary() if self.history else []), flush=True)
        return code

def main(argv=None, *classes):
    """The rows of Algorithm 1 for the flags in argv (None: sys.argv), with your own classes."""
    from options import attempt
    server = attempt(assembled, argv, classes)
    attempt(server.prepare)
    return server.launch(algorithm_1)

def algorithm_1(server):
    """The rounds of Algorithm 1, a row for each; a client trains when average() asks for it."""
    w, code = server.w, 0
    try:
        for t in range(len(server.history) + 1, server.args.epochs + 1):
            r = Round(t)
            if server.done(r):
                break
            r.S_t = S_t = server.select(r)                  # m = max(C K, 1) clients at random
            w_t = server.send(w, S_t, r)                    # w as they receive it
            updates = server.train(w_t, S_t, r)             # w_k = ClientUpdate(k, w)
            updates = server.receive(updates, w_t, r)       # as they reach the server
            w = server.average(updates, w_t, r)             # sum over S_t of (n_k / m_t) w_k
            row = server.measure(w, r)                      # test loss and accuracy
            server.end(w, row, r)
            print(server.describe(row), flush=True)
    except (Stop, KeyboardInterrupt) as stop:
        line, code = stop.args or (f'\ninterrupted after round {len(server.history)}', 130)
        print(line, file=sys.stderr if code not in (0, 130) and server.rank == 0 else sys.stdout)
    code = server.finish(code)
    return sys.exit(code) if code else server.history

def assembled(argv, classes):
    """The server for the flags in argv, of classes and the rooms of beyond/ that they ask for."""
    from options import args_parser, device
    from sampling import shape
    beyond = importlib.util.find_spec('beyond') and importlib.import_module('beyond')
    args = args_parser(argv, beyond.rooms() if beyond else ())
    args.device = device(args.gpu)
    args.shape, args.num_channels, args.num_classes = shape(args)
    hooks, steps = vars(LocalUpdate).keys() - dir(Server), vars(Server).keys() - dir(LocalUpdate)
    mine = [cls for cls in classes if issubclass(cls, LocalUpdate) or hooks & set(dir(cls))]
    others = [cls for cls in classes if cls not in mine or steps & set(dir(cls))]
    outermost, servers, clients = beyond.chosen(args) if beyond else ([], [], [])
    Client = type('Client', (*mine, *clients, LocalUpdate), {'stacks': True})
    return type('Server', (*outermost, *others, *servers, Server), {'Client': Client})(args)

if __name__ == '__main__':
    from options import run
    run(main)
