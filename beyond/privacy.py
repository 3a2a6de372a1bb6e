"""Differential privacy: of clients, and of examples.

    python fedavg.py --num_users 1000 --dp user --clip 1 --epsilon 8
    python fedavg.py --dp example --clip 1 --noise 1 --local_bs 100 --lr 0.5

DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963, Algorithm 1) changes the server of Algorithm 1:
each client is sampled with probability C, its w_k - w is clipped to S, all weights are 1, and their
sum has a fixed denominator, C K, and noise of deviation z S. DP-SGD (Abadi et al. 2016, arXiv
1607.00133, Algorithm 1) changes ClientUpdate: Poisson batches, each example's gradient clipped to
S, noise of deviation z S on their sum. accountant.py says what that costs.

With --secagg, the clients clip, and have to be trusted to. The noise comes from NumPy's and, in
DP-SGD, torch's generators, which are seeded by --seed and not cryptographic.
Fields of a round: epsilon, what the rounds so far have cost; hidden, set once noise is in the sum.
"""
import math

import numpy as np
import torch
from torch.func import functional_call, grad_and_value, vmap

from beyond.accountant import Accounted, binomial, epsilon, guarded, largest
from beyond.flat import clip, flat, unflat
from options import fail, number, requires
from sampling import rng

UNLUCKY = 2**-29    # chance in a round that the graph of either of two neighbours is too thin

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
    add('delta', None, number(float, 0, 0.9999, above=True), 'with --dp user: at most 1/K, K^-1.1 '
        'if not given; with --dp example the same of the largest n_k')

CLASHES = (('dp example', 'engine stacked', 'which does not know the gradient of each example'),
           ('dp example', 'compile', 'whose stacks do not know the gradient of each example'),
           ('dp example', 'dataset shakespeare', 'as there are no gradients of single lines'),
           ('range', 'dp user', 'whose range is --clip'))

def check(args):
    """What is clipped has noise, and what has noise is clipped."""
    requires(args, '--dp user or --dp example', ('clip', 'noise', 'epsilon', 'delta'), args.dp)
    if args.dp and args.clip is None:
        fail(f'--dp {args.dp}: what is not clipped cannot be hidden; add --clip S')
    if args.dp and (args.noise is None) == (args.epsilon is None):
        fail(f'--dp {args.dp}: give either --noise z or --epsilon')
    if args.dp == 'user' and not args.frac:
        fail('--dp user: a client is sampled with probability --frac; give one above 0')

class PrivateServer(Accounted):
    """DP-FedAvg (McMahan et al. 2018, Algorithm 1)."""
    agreed = None       # with --secagg: how many clients must stay for a sum to be revealed

    def __init__(self, args):
        super().__init__(args)
        guarded(type(self), PrivateServer, 'select', 'weight')
        w = {name: v for name, v in self.net.state_dict().items() if v.is_floating_point()}
        learns = {name: p.requires_grad
                  for name, p in self.net.named_parameters(remove_duplicate=False)}
        if w.keys() - learns:
            fail(f'--dp user: {args.model} has buffers, as batch norm has its running statistics, '
                 'which noise would spoil; take another --model', everyone=True)
        self.learns = torch.cat([torch.full((v.numel(),), learns[name]) for name, v in w.items()])

    def crosses(self, k, r):
        return super().crosses(k, r) & self.learns      # to what is frozen no noise is added

    def prepare(self):
        super().prepare()
        if not self.args.secagg:
            return
        if self.agreed is None:       # a resumed run's is what it was
            most = math.ceil(round(self.args.threshold * self.args.frac * self.K, 9))
            self.agreed = self.least
            while self.agreed < most and self.leak(self.agreed + 1) <= self.delta / 10:
                self.agreed += 1
        leak = self.leak(self.agreed)
        if leak > self.delta / 10:
            fail(f'--secagg 1: one client decides whether {self.agreed} stay, with probability '
                 f'{leak:.2g}, above a tenth of delta; take more clients, more --frac, less --drop '
                 'or fewer --epochs', everyone=True)
        print(f'--secagg 1: at least {self.agreed} clients must stay; it costs {leak:.1g} of delta')

    def leak(self, stay):
        """The probability that in one of the rounds a client decides whether `stay` clients stay:
        that just stay - 1 of the K - 1 others do, or that the graph is too thin for a sum."""
        p = self.args.frac * (1 - self.args.drop)
        return self.args.epochs * (binomial(self.K - 1, p, stay - 1) + UNLUCKY)

    def quorum(self, asked):
        """A number fixed in advance, which does not depend on who is asked."""
        return self.agreed

    def who(self):
        return self.K, 'clients'

    def cost_of(self, t, noise):
        """The epsilon of a client after t rounds; with --secagg, what one client decides takes up
        to a tenth of delta."""
        delta = self.delta * (0.9 if self.args.secagg else 1)
        return epsilon(self.args.frac, noise, t, delta)

    def state(self):
        return super().state() | {'PrivateServer': {'agreed': self.agreed}}

    def load(self, state):
        super().load(state)
        self.agreed = state.get('PrivateServer', {}).get('agreed')
        if self.agreed is not None and self.agreed not in range(self.least, self.K + 1):
            raise ValueError(f'{self.agreed!r} is no number of clients that must stay')

    def select(self, r):
        S_t = poisson(self.K, self.args.frac, rng(self.args.seed, 'select', r.t))
        return dict.fromkeys(S_t.tolist(), self.args.local_ep)

    def weight(self, k):
        return 1

    def bound(self):
        return self.args.clip

    def bounded(self, v, rounding):
        v = super().bounded(v, rounding)
        # It counts as 0, as leaving it out could decide whether there is a sum.
        v = v if v.isfinite().all() else torch.zeros_like(v)
        return clip(v, self.args.clip - rounding)

    def most(self):
        return self.K

    def allows(self, rounding):
        return super().allows(rounding) and rounding <= self.args.clip / 2

    def average(self, updates, w, r):
        return super().average(self.noised(updates, w, r), w, r)

    def noised(self, updates, w, r):
        """The updates, clipped; once w with the noise of their sum; and w with the weight that
        makes all weights add up to C K, of which the first process has what the others lack."""
        total, v, at = 0, flat(w), self.at(0, r)
        for u in updates:
            if u.k is not None:         # of a secure sum, the clients have clipped the terms
                u = u._replace(w=unflat(v + clip(flat(u.w) - v, self.args.clip), w))
            total += u.n
            yield u
        r.hidden = True
        noise = rng(self.args.seed, 'noise', r.t).normal(0, self.noise * self.args.clip, len(v[at]))
        if self.rank == 0:
            v[at] += torch.from_numpy(noise).float()
            yield self.Update(None, unflat(v, w), 1, 0.0)
            yield self.Update(None, w, self.args.frac * self.K - 1 - total, 0.0)
        else:
            yield self.Update(None, w, -total, 0.0)

    def measure(self, w, r):
        if 'hidden' not in vars(r):
            raise self.Stop('--dp user: a class of your own averages the updates without clipping '
                            "and noise; let its average call super().average(updates, w, r)", 2)
        return super().measure(w, r)

    def failed(self, r):
        """The noise is added, so that a round without updates is a round too."""
        return False

class PrivateExamples(Accounted):
    """Counts what DP-SGD costs an example of the client that it costs most."""
    def __init__(self, args):
        super().__init__(args)
        self.samples = {}           # {t: S_t}
        guarded(self.Client, PrivateClient, 'train', 'batches', 'gradient')
        mixed = torch.nn.RNNBase, torch.nn.modules.batchnorm._BatchNorm
        if any(isinstance(layer, mixed) for layer in self.net.modules()):
            fail(f'--dp example: {args.model} has a recurrent or batch norm layer, which gives no '
                 'gradients of single examples; take another --model', everyone=True)

    def cost_of(self, t, noise):
        """The largest epsilon of a client's example after t rounds."""
        args = self.args
        times = np.bincount([k for s in range(t) for k in self.sampled(s + 1)], minlength=self.K)
        cases = []
        for n in set(self.n_k.tolist()):
            B = min(args.local_bs, n)
            rounds = int(times[self.n_k == n].max())
            cases.append((B / n, rounds * args.local_ep * math.ceil(n / B)))
        return largest(cases, noise, self.delta)

    def who(self):
        return int(self.n_k.max()), 'examples of the largest client'

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
        total, loss = self.clipped_sum(net, x, y)
        for name, p in trained(net).items():
            p.grad = (total[name] + z * S * torch.randn_like(p)) / B
        return loss / max(len(y), 1)

    def clipped_sum(self, net, x, y):
        """({name: the sum of the clipped gradients}, the sum of the losses)."""
        at = {name: p.detach() for name, p in trained(net).items()}
        def one(w, x, y):
            return self.loss(functional_call(net, w, (x[None],)), y[None])
        total, loss = {name: torch.zeros_like(v) for name, v in at.items()}, x.new_zeros(())
        for x, y in zip(x.split(64), y.split(64)) if len(y) else ():    # 64 gradients at a time
            gradients = vmap(grad_and_value(one), (None, 0, 0), randomness='different')
            grads, losses = gradients(at, x, y)
            norms = sum(g.flatten(1).double().square().sum(1) for g in grads.values()).sqrt()
            scale = (self.args.clip / norms.clamp(min=self.args.clip)).nan_to_num(0).to(x.dtype)
            finite = bool(norms.isfinite().all())                       # norms, scale: (64,)
            for name, g in grads.items():
                total[name] += torch.tensordot(scale, g if finite else g.nan_to_num(0, 0, 0), 1)
            loss += losses.detach().sum()
        return total, loss

def trained(net):
    """{name: parameter} of those that are not frozen."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}

def poisson(K, C, draw):
    """S_t: each of K clients with probability C, by the generator draw (McMahan et al. 2018)."""
    return np.flatnonzero(draw.random(K) < C)
