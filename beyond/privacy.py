"""Differential privacy: of clients, and of examples.

    python fedavg.py --num_users 1000 --dp user --clip 1 --epsilon 8
    python fedavg.py --dp example --clip 1 --noise 1 --local_bs 100 --lr 0.5

DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963, Algorithm 1) changes the server of Algorithm 1:
each client is sampled with probability C, its w_k - w is clipped to S, all weights are 1, and their
sum has a fixed denominator, C K, and noise of deviation z S. DP-SGD (Abadi et al. 2016, arXiv
1607.00133, Algorithm 1) changes ClientUpdate: Poisson batches, each example's gradient clipped to
S, noise of deviation z S on their sum. What it costs is computed from Renyi divergences (Mironov et
al. 2019, arXiv 1908.10530; Canonne et al. 2020, arXiv 2004.00010).

The privacy is that of a model on paper: the noise comes from generators that are not
cryptographic, seeded by --seed. Field of a round: epsilon, what the rounds so far have cost.
"""
import functools
import math

import numpy as np
import torch
from torch.func import functional_call, grad_and_value, vmap

from beyond import Room
from beyond.flat import flat, unflat
from options import fail, number, requires
from sampling import rng

def flags(add):
    """--dp, --clip, --noise, --epsilon, --delta."""
    add('dp', None, str, 'differential privacy: user, DP-FedAvg of clients; example, DP-SGD '
        'within each', choices=('user', 'example'))
    add('clip', None, number(float, 1e-9, 1e9),
        "S, with --dp: the L2 norm that an update, or an example's gradient, is clipped to")
    add('noise', None, number(float, 0, 1e6),
        'z, with --dp: the deviation of the noise on a sum, in units of S')
    add('epsilon', None, number(float, 0, above=True), 'with --dp, instead of --noise: the budget '
        'of --epochs rounds; finds z, and stops the run where it is spent')
    add('delta', None, number(float, 0, 0.9999, above=True),
        'with --dp: 1/K for user, 1/n_k for example if not given')

def check(args):
    """What is clipped has noise, and what has noise is clipped."""
    requires(args, '--dp user or --dp example', ('clip', 'noise', 'epsilon', 'delta'), args.dp)
    if args.dp and args.clip is None:
        fail(f'--dp {args.dp}: what is not clipped cannot be hidden; add --clip S')
    if args.dp and (args.noise is None) == (args.epsilon is None):
        fail(f'--dp {args.dp}: give either --noise z or --epsilon')
    if args.dp == 'user' and not args.frac:
        fail('--dp user: a client is sampled with probability --frac; give one above 0')
    if args.dp == 'user' and args.range is not None:
        fail(f'--range {args.range}: with --dp user it is --clip; leave it out')
    if args.dp == 'example' and (args.engine == 'stacked' or args.compile):
        fail('--dp example: each example has its own gradient, which the stacked engine does not '
             'know; leave out --engine and --compile')

class Accounted(Room):
    """Knows what the rounds cost, finds the noise for --epsilon, and stops when that is spent.
    Subclasses answer cost_of(t, noise)."""
    noise = None

    def prepare(self):
        super().prepare()
        args = self.args
        self.noise = args.noise if args.noise is not None else self.noise
        if self.noise is not None:
            return
        try:
            self.noise = least_noise(lambda z: self.cost_of(args.epochs, z), args.epsilon)
        except ValueError as e:
            fail(f'--epsilon {args.epsilon}: {e}; take more', everyone=True)
        print(f'--epsilon {args.epsilon}: noise {self.noise:.4g} for {args.epochs} rounds')

    def done(self, r):
        if super().done(r):
            return True
        r.epsilon, budget = self.cost_of(r.t, self.noise), self.args.epsilon
        if budget and r.epsilon > budget:
            print(f'--epsilon {budget} is spent after round {r.t - 1}')
            return True
        return False

    def measure(self, w, r):
        return super().measure(w, r) | {'epsilon': r.epsilon}

    def describe(self, row):
        return f'{super().describe(row)}   epsilon {row["epsilon"]:.3g}'

    def summary(self):
        args = self.args
        delta = args.delta or (f'1/{self.K}' if args.dp == 'user' else '1/n_k')
        return [*super().summary(), f'epsilon {self.history[-1]["epsilon"]:.3g} at delta {delta} '
                f'({args.dp}, noise {self.noise:.4g}, clip {args.clip:g})']

    def notes(self):
        return super().notes() | {'noise': self.noise}

    def state(self):
        return super().state() | {'Accounted': {'noise': self.noise}}

    def load(self, state):
        super().load(state)
        self.noise = state.get('Accounted', {}).get('noise')

class PrivateServer(Accounted):
    """DP-FedAvg (McMahan et al. 2018, Algorithm 1)."""
    def cost_of(self, t, noise):
        """The epsilon of a client after t rounds."""
        return epsilon(self.args.frac, noise, t, self.args.delta or 1 / max(self.K, 2))

    def select(self, r):
        S_t = poisson(self.K, self.args.frac, rng(self.args.seed, 'select', r.t))
        return dict.fromkeys(S_t.tolist(), self.args.local_ep)

    def weight(self, k):
        return 1

    def receive(self, updates, w, r):
        v = flat(w)
        for u in super().receive(updates, w, r):
            if u.k is not None:         # of a secure sum, the clients have clipped the terms
                u = u._replace(w=unflat(v + clip(flat(u.w) - v, self.args.clip), w))
            yield u

    def bound(self):
        return self.args.clip

    def bounded(self, v, rounding):
        return clip(super().bounded(v, rounding), self.args.clip - rounding)

    def allows(self, rounding):
        return super().allows(rounding) and rounding <= self.args.clip / 2

    def average(self, updates, w, r):
        return super().average(self.noised(updates, w, r), w, r)

    def noised(self, updates, w, r):
        """The updates; once w with the noise of their sum; and w with the weight that makes all
        weights add up to C K, of which the first process has what the others' terms lack."""
        total = 0
        for u in updates:
            total += u.n
            yield u
        v, at = flat(w), self.at(0, r)
        noise = rng(self.args.seed, 'noise', r.t).normal(0, self.noise * self.args.clip, len(v[at]))
        if self.rank == 0:
            v[at] += torch.from_numpy(noise).float()
            yield self.Update(None, unflat(v, w), 1, 0.0)
            yield self.Update(None, w, self.args.frac * self.K - 1 - total, 0.0)
        else:
            yield self.Update(None, w, -total, 0.0)

    def failed(self, r):
        """The noise is added, so that a round without updates is a round too."""
        return False

class PrivateExamples(Accounted):
    """Counts what DP-SGD costs an example of the client that it costs most."""
    def __init__(self, args):
        super().__init__(args)
        self.samples = {}           # {t: S_t}

    def cost_of(self, t, noise):
        """The epsilon after t rounds."""
        args = self.args
        sampled = [k for s in range(1, t + 1) for k in self.sampled(s)]
        times = np.bincount(sampled, minlength=self.K)
        most = {n: times[self.n_k == n].max() for n in set(self.n_k.tolist())}
        costs = []
        for n, rounds in most.items():
            B = min(args.local_bs, n)
            steps = int(rounds) * args.local_ep * math.ceil(n / B)
            costs.append(epsilon(B / n, noise, steps, args.delta or 1 / max(n, 2)))
        return max(costs)

    def sampled(self, t):
        """The clients of round t."""
        if t not in self.samples:
            self.samples[t] = list(self.select(self.Round(t)))
        return self.samples[t]

    def client(self, k, r):
        client = super().client(k, r)
        client.noise = self.noise
        return client

class PrivateClient:
    """DP-SGD (Abadi et al. 2016, Algorithm 1). args: also clip (S), and noise (z)."""
    noise = None

    def batches(self, n_k, E, B):
        """The usual number of batches, in each of which an example is with probability B / n_k."""
        B = min(B, n_k)
        for _ in range(int(E * math.ceil(n_k / B) + 1e-9)):
            yield (torch.rand(n_k) < B / n_k).nonzero().flatten().to(self.y.device)

    def gradient(self, net, x, y):
        """Leaves (the sum of each example's gradient clipped to S, and noise of deviation z S) / B
        in net; B is the expected size of a batch, which may be of any size, 0 too."""
        S, B = self.args.clip, min(self.args.local_bs, len(self.y))
        z = self.args.noise if self.noise is None else self.noise
        w = dict(net.named_parameters())
        total, loss = self.clipped_sum(net, x, y)
        for name, p in w.items():
            p.grad = (total[name] + z * S * torch.randn_like(p)) / B
        return loss / max(len(y), 1)

    def clipped_sum(self, net, x, y):
        """({name: the sum of the clipped gradients}, the sum of the losses)."""
        at = {name: p.detach() for name, p in net.named_parameters()}
        def one(w, x, y):
            return self.loss(functional_call(net, w, (x[None],)), y[None])
        total, loss = {name: torch.zeros_like(v) for name, v in at.items()}, x.new_zeros(())
        for x, y in zip(x.split(64), y.split(64)) if len(y) else ():    # 64 gradients at a time
            gradients = vmap(grad_and_value(one), (None, 0, 0), randomness='different')
            grads, losses = gradients(at, x, y)
            norms = sum(g.flatten(1).double().square().sum(1) for g in grads.values()).sqrt()
            scale = (self.args.clip / norms.clamp(min=self.args.clip)).nan_to_num(0).to(x.dtype)
            finite = norms.isfinite().all()                             # norms, scale: (64,)
            for name, g in grads.items():
                total[name] += torch.tensordot(scale, g if finite else g.nan_to_num(0, 0, 0), 1)
            loss += losses.detach().sum()
        return total, loss

######################################## The accountant ########################################

def poisson(K, C, draw):
    """S_t with each of the K clients in it with probability C, maybe none: the sampling that the
    accountant takes for granted. draw: a NumPy generator."""
    return np.flatnonzero(draw.random(K) < C)

def clip(update, S):
    """update, (d,), scaled down to an L2 norm of S if it is longer (McMahan et al. 2018, Section
    2)."""
    norm = update.double().norm()
    return update * (S / norm) if norm > S else update

# Orders of the Renyi divergence; an epsilon is the least that any of them gives.
ORDERS = np.concatenate([np.arange(1.5, 11, 0.1), np.arange(11, 64), 2.0 ** np.arange(6, 15)])

def epsilon(q, noise, steps, delta):
    """The epsilon at delta of `steps` sums of terms clipped to S, with Gaussian noise of deviation
    noise S, over samples that each client (or example) is in with probability q. Neighbouring data
    sets differ in one client (or example), which only one of them has.

    Renyi divergences (Mironov et al. 2019) converted by Canonne et al. 2020, Proposition 12. inf
    where there is no bound. Raises ValueError if q is not in [0, 1], delta not in (0, 1), or noise
    or steps below 0.
    """
    if not 0 <= q <= 1:
        raise ValueError(f'q {q}: from 0 to 1')
    if not 0 < delta < 1:
        raise ValueError(f'delta {delta}: above 0 and below 1')
    if not (0 <= noise < math.inf and 0 <= steps < math.inf):
        raise ValueError(f'noise {noise}, steps {steps}: finite and at least 0')
    if not steps or not q:
        return 0.0
    found = (steps * renyi(float(q), float(noise)) + np.log1p(-1 / ORDERS)
             - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1))
    return max(float(found.min()), 0.0)

@functools.lru_cache(None)
def renyi(q, noise):
    """The Renyi divergence at ORDERS of one step of the sampled Gaussian mechanism (Mironov et al.
    2019, Section 3.3, whose sum for a fractional order a ends by itself at a whole one)."""
    with np.errstate(all='ignore'):
        gauss = ORDERS / (2 * np.float64(noise)**2)     # without sampling: the Gaussian mechanism's
    if q in (0, 1):
        return gauss if q else np.zeros(len(ORDERS))
    sampled = [divergence(a, q, np.float64(noise)) for a in ORDERS]
    return np.maximum(np.fmin(sampled, gauss), 0)       # sampling never costs privacy

def divergence(a, q, noise):
    """renyi at one order a, or NaN where it is beyond what floating point holds."""
    i = np.arange(math.ceil(a) + 1000.0)
    with np.errstate(all='ignore'):
        factors = np.append(1, (a - i[:-1]) / (i[:-1] + 1))
        log_binomial = np.cumsum(np.log(np.abs(factors)))                       # of a over i
        sign = np.cumprod(np.sign(factors))
        z0 = noise**2 * math.log(1 / q - 1) + 0.5
        halves = []
        for k, side in ((i, 1), (a - i, -1)):
            tail = torch.special.log_ndtr(torch.from_numpy(side * (z0 - k) / noise)).numpy()
            halves.append(log_binomial + k * math.log(q) + (a - k) * math.log1p(-q)
                          + k * (k - 1) / (2 * noise**2) + tail)
        terms = np.concatenate(halves)
        top = np.max(terms)
        return (top + np.log(np.sum(np.tile(sign, 2) * np.exp(terms - top)))) / (a - 1)

def least_noise(cost, target):
    """By bisection, the least noise, to 0.1 %, from 0.01 on, with cost(noise), an epsilon that
    falls with it, at most target. Raises ValueError if there is none up to 10^6."""
    low = high = 0.01
    while cost(high) > target:
        if high > 1e6:
            raise ValueError(f'epsilon {target}: no noise up to 10^6 gives it')
        low, high = high, 2 * high
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high
