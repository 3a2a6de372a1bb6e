"""Stragglers: clients that are lost, slow or corrupt.

    python fedavg.py --drop 0.3 --corrupt 0.1 --speeds lognormal:1 --deadline 0.8 --local_ep 4

In Algorithm 1, some of S_t do not answer (Lossy), do what they can by a deadline or come too late
(Timed; redundant clients and deadlines as in Bonawitz et al. 2019, arXiv 1902.01046), or send
garbage (Corrupt). The average is over the clients whose updates the server accepts.

Fields of a round: lost, {k: stage} of the clients that are lost or late; corrupt, {k: kind}.
"""
import argparse
import math

import numpy as np
import torch

from beyond import Room
from options import fail, number
from sampling import rng, select

def lognormal(text):
    """--speeds' type: the S of lognormal:S."""
    name, _, sigma = text.partition(':')
    if name != 'lognormal' or not sigma:
        raise argparse.ArgumentTypeError(f'{text!r} is invalid; expected lognormal:S')
    return number(float, 0, 10, hint='as lognormal:1')(sigma)

def flags(add):
    """--drop, --corrupt, --speeds, --deadline, --overselect."""
    add('drop', 0.0, number(float, 0, 1), 'probability with which a client is lost in a round, at '
        'a random stage; with --secagg one lost after it has sent its update still counts')
    add('corrupt', 0.0, number(float, 0, 1), 'probability with which a client sends NaN, infinity, '
        'garbage or too few values, in turn')
    add('speeds', None, lognormal, 'lognormal:S: a client is exp(S N(0, 1)) as fast as others, for '
        'the whole run; all alike if not given')
    add('deadline', None, number(float, 0, above=True), 'a client does the local steps that fit, '
        'at least an epoch, or is late; in units of what the median client takes for all')
    add('overselect', 0.0, number(float, 0, 100), 'r: ceil(m (1 + r)) clients are sampled, and the '
        'first m that finish are averaged')

# Pairs of flags that exclude one another, and why.
CLASHES = (('overselect', 'secagg', 'whose sum is given up when too many do not answer'),
           ('deadline', 'dp user', 'as what one client holds changes how much others train'),
           ('overselect', 'dp user', 'which samples each client with probability --frac'),
           ('overselect', 'silo', 'where more can only be sampled with --frac'),
           ('corrupt', 'secagg', 'where garbage cannot be told from a masked update'))

def check(args):
    """There are as many clients as --overselect samples."""
    m = max(round(args.frac * args.num_users), 1)
    sampled = math.ceil(round(m * (1 + args.overselect), 9))
    if sampled > args.num_users:
        fail(f'--overselect {args.overselect}: samples {sampled} of {args.num_users} clients; take '
             'less, or a smaller --frac')

class Lossy(Room):
    """Clients are lost: before they train, or after they have sent their update."""
    def train(self, w, S_t, r):
        r.lost = lose(list(S_t), self.args.drop, rng(self.args.seed, 'drop', r.t))
        if self.rank == 0:
            r.tally['lost'] = len(r.lost)
        present = {k: E for k, E in S_t.items() if k not in r.lost or self.sent_by(r.lost[k])}
        return super().train(w, present, r)

    def describe(self, row):
        return super().describe(row) + (f'   {row["lost"]} lost' if row['lost'] else '')

    def measure(self, w, r):
        return super().measure(w, r) | {'lost': int(r.tally['lost'])}

class Timed(Room):
    """Simulated time: how long clients take, what they do by the deadline, who comes first."""
    def prepare(self):
        super().prepare()
        args = self.args
        costs = [self.cost(k) for k in range(self.K)]
        self.duration = durations(costs, args.speeds or 0, args.seed)       # (K,), of E epochs
        least = self.duration.min() / args.local_ep
        if args.deadline and args.deadline < least:
            fail(f'--deadline {args.deadline:g}: no client can do an epoch by then; take '
                 f'{math.ceil(100 * least) / 100} or more, or more --local_ep', everyone=True)

    def select(self, r):
        if not self.args.overselect:
            return super().select(r)
        draw = rng(self.args.seed, 'select', r.t)
        S_t = select(self.K, self.args.frac, draw, self.args.overselect)
        return dict.fromkeys(S_t.tolist(), self.args.local_ep)

    def train(self, w, S_t, r):
        args = self.args
        m = self.most() if args.overselect else len(r.S_t)
        seconds = {k: self.duration[k] for k in S_t}
        draw = rng(args.seed, 'finish', r.t)
        work, took = in_time(seconds, args.local_ep, m, args.deadline or math.inf, draw)
        late = {k: 1 for k in S_t if k not in work}         # lost before they sent an update
        r.lost = vars(r).get('lost', {}) | late
        if self.rank == 0:
            r.tally.update(late=len(late), round_time=took)
        return super().train(w, work, r)

    def measure(self, w, r):
        return super().measure(w, r) | {'late': int(r.tally['late']),
                                        'round_time': r.tally['round_time']}

    def timed(self):
        """Whether the simulated time is of interest."""
        args = self.args
        return args.speeds is not None or args.deadline or args.overselect

    def describe(self, row):
        line = super().describe(row) + (f'   {row["late"]} late' if row['late'] else '')
        return line + (f'   round time {row["round_time"]:.3g}' if self.timed() else '')

    def summary(self):
        if not self.timed():
            return super().summary()
        time, late = (sum(row[name] for row in self.history) for name in ('round_time', 'late'))
        return [*super().summary(),
                f'simulated time {time:.4g}, in units of what the median client takes for its '
                f'{self.args.local_ep} epochs; {late} clients were late']

class Corrupt(Room):
    """Clients send payloads that the server refuses."""
    def train(self, w, S_t, r):
        r.corrupt = corrupted(S_t, self.args.corrupt, rng(self.args.seed, 'corrupt', r.t))
        return super().train(w, S_t, r)

    def transmit(self, payload, x, k, r):
        payload = super().transmit(payload, x, k, r)
        if k not in r.corrupt:
            return payload
        kind = r.corrupt[k]
        if kind == 2:
            return rng(self.args.seed, 'garbage', r.t, k).bytes(len(payload))
        value = (math.nan, math.inf)
        return self.encode(torch.full_like(x, value[kind]) if kind < 2 else x[1:], k, r)

    def keep(self, u, x, payload, r):
        return {} if u.k in r.corrupt else super().keep(u, x, payload, r)

    def failed(self, r):
        """Damage on purpose is not a sign of diverging."""
        return super().failed(r) and r.tally['sent'] > len(r.corrupt)

def lose(S_t, p, draw):
    """{client: stage} of those of S_t that are lost, each with probability p: 0 before it has
    dealt shares of its secrets, 1 before it has sent its update, 2 after that. (0 and 1 differ in
    secure aggregation alone.) draw: a NumPy generator."""
    chance, stages = draw.random(len(S_t)), draw.integers(3, size=len(S_t))
    return {k: int(stage) for k, u, stage in zip(S_t, chance, stages) if u < p}

def durations(n_k, sigma, seed=0):
    """How long all epochs of a round take each client, (K,), in units of the median client's: n_k
    over a speed that is log-normal with sigma."""
    seconds = np.asarray(n_k) / rng(seed, 'speeds').lognormal(sigma=sigma, size=len(n_k))
    return seconds / np.median(seconds)

def in_time(seconds, E, m, deadline, draw):
    """({k: its local epochs} of the clients that count, and the time that the round takes).

    seconds: {k: what E epochs take client k}, in any unit, as is the deadline, at which a client
    stops (partial work); one that has not done an epoch by then is late. The first m of the others
    count (redundant clients); draw, a NumPy generator, orders those that finish at once. The server
    waits for m, or until the deadline.
    """
    epochs = {k: E * min(1, deadline / s) for k, s in seconds.items()}
    end = {k: float(min(seconds[k], deadline)) for k in seconds if epochs[k] >= 1}
    first = sorted(draw.permutation(list(end)).tolist(), key=end.get)[:m]
    waited = [] if len(first) == m or deadline == math.inf else [deadline]
    took = max([end[k] for k in first] + waited, default=0)
    return {k: epochs[k] for k in seconds if k in first}, took

def corrupted(S_t, p, draw):
    """{client: kind} of those of S_t, each with probability p, whose update is damaged; kinds 0 to
    3 in turn, from a random one. draw: a NumPy generator."""
    hit = [k for k, u in zip(S_t, draw.random(len(S_t))) if u < p]
    return dict(zip(hit, (draw.integers(4) + np.arange(len(hit))) % 4))
