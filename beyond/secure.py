"""Secure aggregation: the server learns the sum of the updates, not its terms.

    python fedavg.py --secagg 1 --drop 0.1

Bonawitz et al. 2017 (ACM CCS, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning"): in Algorithm 1, the step from the updates to their sum becomes a protocol of four
rounds, in which clients mask what they send and, if some are lost, help to unmask the sum of the
others. w_k - w is clamped to plus or minus --range, rounded stochastically, and n_k times that, as
whole numbers, is the client's term of a sum modulo 2^32.

protocol.py has the protocol, in which each client shares its secrets with --neighbors others (Bell
et al. 2020). It has not been audited, and its server is honest but curious.
Fields of a round: v and kept, as in wire.py.
"""
import math

import numpy as np
import torch

from beyond import Room
from beyond.crypto import term
from beyond.flat import flat, unflat
from beyond.protocol import STEPS, SecureClient, neighborhood, secure_sum, share_threshold
from options import fail, number, requires
from sampling import rng

def flags(add):
    """--secagg, --threshold, --neighbors, --range."""
    add('secagg', 0, bool, '1: secure aggregation; the server sees masked integers and their '
        'sum; up to 16 bits a value if --quantize is not given')
    add('threshold', None, number(float, 0, 1, above=True), 'with --secagg: fraction of S_t that '
        'must stay for the sum to be revealed; 2/3 if not given; half or less is not safe')
    add('neighbors', None, number(int, 2), 'with --secagg: the clients with which each shares its '
        'secrets, an even number; the fewest that are safe if not given')
    add('range', None, number(float, 1e-9, 1e9), 'with --secagg: values of w_k - w are clamped to '
        'plus or minus this; 1, or --clip, if not given')

CLASHES = (('topk', 'secagg', 'whose clients would send different values, which do not add up '
            'when they are masked'),
           ('neighbors', 'dp user', 'whose delta has room for the default number alone'))

def check(args):
    """A sum has several terms. Fills in the threshold."""
    requires(args, '--secagg 1', ('threshold', 'neighbors', 'range'), args.secagg)
    if args.neighbors and args.neighbors % 2:
        fail(f'--neighbors {args.neighbors}: half of them are on either side; take an even number')
    one = round(args.frac * args.num_users) < 2 and not args.silo and args.dp != 'user'
    if args.secagg and one:
        fail(f'--secagg 1: a round samples one client (--frac {args.frac}), and the sum of one is '
             'its update; sample more')
    if args.secagg:
        args.threshold = args.threshold or 2 / 3

LEAST_BITS = 12     # below, the rounding of a value may be longer than its update

######################################### The room #########################################

class Secure(Room):
    """Sums the updates securely. Simulated clients live in the first process; silos answer it from
    their own. The loss travels as one value more, scaled so that 16 is the end of the range."""
    gathers = True

    def prepare(self):
        super().prepare()
        args = self.args
        weights = sorted((self.weight(k) for k in range(self.K)), reverse=True)
        fits = (2**32 // sum(weights[:self.most()])).bit_length() - 1   # the sum stays below 2^32
        self.bits = args.quantize or min(16, fits)
        if fits < (args.quantize or LEAST_BITS):
            fail(f'--secagg 1{f" --quantize {args.quantize}" * bool(args.quantize)}: a round can '
                 f'have so many examples that {max(fits, 0)} bits a value fit into a sum of 32; '
                 'take a smaller --frac' + f', or --quantize 1 to {fits}' * (fits > 0),
                 everyone=True)
        print(f'--secagg 1: {self.bits} bits a value, from -{self.bound():g} to {self.bound():g}')
        self.level = 2 * self.bound() / (2**self.bits - 1)      # between two levels of rounding
        d = len(flat(self.w))
        if not self.allows(d ** 0.5 * self.level):
            fail(f'--quantize {self.bits}: with --dp user and --secagg the rounding of {d} values '
                 'would be longer than half of --clip; take '
                 f'{math.ceil(math.log2(4 * d ** 0.5 + 1))} or more', everyone=True)
        if self.silo and args.dp != 'user' and round(args.frac * self.K) < self.least:
            fail(f'--secagg 1: a round has to sample {self.least} silos, or the first one knows '
                 f'what another has sent; --frac {args.frac} of {self.K} is fewer', everyone=True)

    def sent_by(self, stage):
        return stage == 2

    def pack(self, u, w, r):
        """The client's side: u with its term as a payload, empty if it is not finite."""
        kept = self.keep(u, None, None, r)
        try:
            return u._replace(w=self.term(u, r).astype('<u4').tobytes(), kept=kept)
        except ValueError:
            return u._replace(w=b'', kept={})

    def term(self, u, r):
        """What client u.k adds to the sum, (d + 1,) uint32. Raises ValueError for NaN."""
        v = (flat(u.w) - r.v)[self.at(u.k, r)].double()
        v = self.bounded(v, len(v) ** 0.5 * self.level)         # rounding adds that much at most
        loss = min(u.loss, 16.0) if u.loss == u.loss else 16.0      # NaN counts as 16
        v = np.append(v, (loss / 8 - 1) * self.bound())
        draw = rng(self.args.seed, 'quantize', r.t, u.k)
        return term(v, self.bound(), self.bits, self.weight(u.k), draw)

    def receive(self, updates, w, r):
        """One Update for all: the mean of those that stayed; none if they are too few."""
        r.kept, r.v, asked = {}, flat(w), sorted(r.S_t)
        threshold = self.quorum(len(asked))
        graph = self.graph(len(asked), threshold)
        clients, length = {}, len(r.v[self.at(0, r)]) + 1
        for u in self.terms((self.pack(u, w, r) for u in updates), r):
            r.tally['sent'] += 1
            if u.w:
                clients[u.k] = SecureClient(u.k, np.frombuffer(u.w, '<u4'), graph[1])
                r.kept[u.k] = u.kept
            else:
                r.tally['rejected'] += 1
                print(f'client {u.k} is left out: it holds NaN or infinity')
        nothing = np.zeros(length, np.uint32)       # of a lost client, which never sends it
        lost = vars(r).get('lost', {})
        clients = {k: SecureClient(k, nothing, graph[1]) for k in lost} | clients
        self.serve(clients, r)
        if self.rank:
            return
        ks = asked if self.silo else sorted(clients)
        try:
            ask = self.asker(clients, lost, r)
            total, survivors = secure_sum(ask, ks, threshold, length, graph)
        except ValueError as e:
            print(f'round {r.t}: secure aggregation is given up: {e}')
            return
        finally:
            self.dismiss(r)
        yield self.merged(total, survivors, w, r)

    def graph(self, m, stay):
        """(degree, t) of the graph of m clients, `stay` of which have to stay."""
        neighbors = self.args.neighbors
        if not neighbors:
            return neighborhood(m, min(stay, m)) or (m, stay)
        return (neighbors, share_threshold(m, neighbors)) if neighbors < m - 1 else (m, stay)

    def terms(self, messages, r):
        """The clients' terms, at the first process; those of silos stay with them."""
        return messages if self.silo else self.collect(messages, r)

    def serve(self, clients, r):
        """A silo's side of the protocol: there are no silos."""

    def dismiss(self, r):
        """Tells silos that the protocol is over."""

    def asker(self, clients, lost, r):
        """secure_sum's ask, which counts bytes both ways; a lost client no longer answers from the
        step on at which it is lost."""
        def ask(k, step, message):
            if k in lost and STEPS.index(step) > lost[k]:
                return None
            r.tally['down_bytes'] += len(message)
            answer = self.ask(clients.get(k), k, step, message)
            r.tally['up_bytes'] += len(answer)
            return answer or None
        return ask

    def ask(self, client, k, step, message):
        """Client k's answer, b'' if there is none."""
        return answered(client, step, message)

    def merged(self, total, survivors, w, r):
        """The Update that stands for all survivors: their mean, and its weight."""
        m_t = sum(self.weight(k) for k in survivors)
        mean = total * (self.level / m_t) - self.bound()
        v, n = r.v.clone(), int(self.n_k[survivors].sum())
        v[self.at(0, r)] += torch.from_numpy(mean[:-1]).float()
        loss = float((mean[-1] / self.bound() + 1) * 8)
        r.tally.update(clients=len(survivors), m_t=n, loss=n * loss)
        return self.Update(None, unflat(v, w), m_t, loss)

    def end(self, w, row, r):
        if not row['clients']:      # the sum was given up, of which a silo learns only now
            r.kept = {}
        super().end(w, row, r)

def answered(client, step, message):
    """A SecureClient's answer; b'' from one that is lost or finds its rules broken."""
    try:
        return client.answer(step, message) if client else b''
    except ValueError:
        return b''
