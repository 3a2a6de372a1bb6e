"""The accountant: what noise on sums over samples costs, as epsilon and delta.

    epsilon(q=0.1, noise=1, steps=60, delta=1e-5)

Renyi divergences of the sampled Gaussian mechanism (Mironov et al. 2019, arXiv 1908.10530),
converted by Canonne et al. 2020 (arXiv 2004.00010). Neighbouring data sets differ in one client
(or example) that only one of them has: add or remove one. Accounted keeps the account of a run.
"""
import functools
import math

import numpy as np
import torch

from beyond import Room
from options import fail

LEAST = 10          # clients (or examples of the largest client) for which a delta makes sense

# Orders of the Renyi divergence; an epsilon is the least that any of them gives.
ORDERS = np.concatenate([np.arange(1.5, 11, 0.1), np.arange(11, 64), 2.0 ** np.arange(6, 15)])

def epsilon(q, noise, steps, delta):
    """The epsilon at delta of `steps` sums of terms clipped to S, with Gaussian noise of deviation
    noise S, over samples that each client (or example) is in with probability q; inf where there
    is no bound (Mironov et al. 2019, Section 3.3; Canonne et al. 2020, Proposition 12). Raises
    ValueError if q is not in [0, 1], delta not in (0, 1), or noise or steps below 0.
    """
    if not 0 <= q <= 1:
        raise ValueError(f'q {q}: from 0 to 1')
    if not 0 < delta < 1:
        raise ValueError(f'delta {delta}: above 0 and below 1')
    if not (0 <= noise < math.inf and 0 <= steps < math.inf):
        raise ValueError(f'noise {noise}, steps {steps}: finite and at least 0')
    if not steps or not q:
        return 0.0
    return max(float(converted(steps * renyi(float(q), float(noise)), ORDERS, delta).min()), 0.0)

def largest(cases, noise, delta):
    """The largest epsilon of the cases, [(q, steps), ...].

    Each order gives an upper bound of a case's cost. Cases whose bound, by the best order of the
    dearest case so far, is below that case's cost need no other order.
    """
    found, order = 0.0, ORDERS[50]
    cases = {(q, steps) for q, steps in cases if q and steps}
    while cases:
        bounds = {(q, steps): converted(steps * renyi_at(order, q, noise), order, delta)
                  for q, steps in cases}
        q, steps = dearest = max(bounds, key=bounds.get)
        costs = converted(steps * renyi(q, noise), ORDERS, delta)
        if costs.min() > found:
            found, order = float(costs.min()), ORDERS[costs.argmin()]
        cases = {case for case in cases - {dearest} if bounds[case] > found}
    return found

def converted(divergence, order, delta):
    """The epsilon at delta of a Renyi divergence of that order (Canonne et al. 2020, Proposition
    12)."""
    return (divergence + np.log1p(-1 / order)
            - (math.log(delta) + np.log(order)) / (order - 1))

@functools.lru_cache(None)
def renyi(q, noise):
    """The Renyi divergence at ORDERS of one step of the sampled Gaussian mechanism."""
    return np.array([renyi_at(a, q, noise) for a in ORDERS])

@functools.lru_cache(2**16)
def renyi_at(a, q, noise):
    """renyi at one order a (Mironov et al. 2019, Section 3.3, whose sum for a fractional order
    ends by itself at a whole one)."""
    with np.errstate(all='ignore'):
        gauss = a / (2 * np.float64(noise)**2)      # without sampling: the Gaussian mechanism's
    if q in (0, 1):
        return gauss if q else 0.0
    # Sampling never costs privacy.
    return max(np.fmin(divergence(a, q, np.float64(noise)), gauss), 0.0)

def divergence(a, q, noise):
    """The divergence at order a, or NaN where it is beyond what floating point holds."""
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

def binomial(n, p, k):
    """The probability of k successes in n trials with probability p."""
    if not 0 <= k <= n or p in (0, 1):
        return float(k == n * p)
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(choose + k * math.log(p) + (n - k) * math.log1p(-p))

##################################### The run #####################################

class Accounted(Room):
    """Knows what the rounds cost, finds the noise for --epsilon, and stops when that is spent.
    Subclasses answer cost_of(t, noise), and who(): (how many, their name) delta is for."""
    noise = None

    def prepare(self):
        super().prepare()
        args, (n, what) = self.args, self.who()
        self.delta = args.delta or max(n, 1) ** -1.1
        if args.delta is None and n < LEAST:
            fail(f'--dp {args.dp}: no delta makes sense for {n} {what}; take {LEAST} or more, or '
                 f'give one with --delta, at most 1/{n}', everyone=True)
        if self.delta > 1 / n:
            fail(f'--delta {args.delta:g}: publishing one of {n} {what} would satisfy it; take '
                 f'1/{n} or less', everyone=True)
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
        return f'{super().describe(row)}   epsilon {row["epsilon"]:.3g} at delta {self.delta:.2g}'

    def summary(self):
        args = self.args
        return [*super().summary(), f'epsilon {self.history[-1]["epsilon"]:.3g} at delta '
                f'{self.delta:.3g} ({args.dp}, noise {self.noise:.4g}, clip {args.clip:g})']

    def notes(self):
        return super().notes() | {'noise': self.noise, 'delta': self.delta}

    def state(self):
        return super().state() | {'Accounted': {'noise': self.noise}}

    def load(self, state):
        super().load(state)
        self.noise = z = state.get('Accounted', {}).get('noise')
        if z is not None and (type(z) is not float or not 0 <= z < math.inf):
            raise ValueError(f'{z!r} is not a deviation of noise')

def guarded(cls, inner, *names):
    """Exits with one line if a class of the user's own, which stands before inner in cls, replaces
    a method of inner that epsilon rests on."""
    for mine in cls.__mro__[:cls.__mro__.index(inner)]:
        replaced = set(names) & set(vars(mine))
        if replaced and not mine.__module__.startswith('beyond.'):
            fail(f'--dp: {mine.__name__} has a {min(replaced)} of its own, and epsilon would not '
                 f'hold; leave that, or --dp, out', everyone=True)
