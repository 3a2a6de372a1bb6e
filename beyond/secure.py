"""Secure aggregation: the server learns the sum of the updates, not its terms.

    python fedavg.py --secagg 1 --drop 0.1

Bonawitz et al. 2017 (ACM CCS, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning"): in Algorithm 1, the step from the updates to their sum becomes a protocol of four
rounds, in which clients mask what they send and, if some are lost, help to unmask the sum of the
others. w_k - w is clamped to plus or minus --range, rounded stochastically, and n_k times that, as
whole numbers, is the client's term of a sum modulo 2^32.

It is written to be read, and has not been audited: the server is honest but curious, there are no
signatures, so that a server that lies about who takes part, or who is lost, is not found out.
"""
import contextlib
import hashlib
import json
import math
import secrets

import numpy as np
import torch

from beyond import Room
from beyond.crypto import (KEY, PRIME, SHARE, about, agree, expand, join, keys_of, read, seal,
                           shares_of, split, term, unseal, vector, written)
from beyond.flat import flat, unflat
from options import fail, number, requires
from sampling import rng

def flags(add):
    """--secagg, --threshold, --range."""
    add('secagg', 0, bool, '1: secure aggregation; the server sees masked integers and their sum')
    add('threshold', None, number(float, 0, 1, above=True), 'with --secagg: fraction of S_t that '
        'must stay for the sum to be revealed; 2/3 if not given; half or less is not safe')
    add('range', None, number(float, 1e-9, 1e9), 'with --secagg: values of w_k - w are clamped to '
        'plus or minus this; 1, or --clip, if not given')

CLASHES = (('topk', 'secagg', 'whose clients would send different values, which do not add up '
            'when they are masked'),)

def check(args):
    """A sum has several terms. Fills in the threshold."""
    requires(args, '--secagg 1', ('threshold', 'range'), args.secagg)
    one = round(args.frac * args.num_users) < 2 and not args.silo and args.dp != 'user'
    if args.secagg and one:
        fail(f'--secagg 1: a round samples one client (--frac {args.frac}), and the sum of one is '
             'its update; sample more')
    if args.secagg:
        args.threshold = args.threshold or 2 / 3

######################################### The room #########################################

class Secure(Room):
    """Sums the updates securely. Simulated clients live in the first process; silos answer it from
    their own. The loss travels as one value more, in units of which 16 is the range's end."""
    gathers = True

    def prepare(self):
        super().prepare()
        args = self.args
        weights = sum(self.weight(k) for k in range(self.K))
        fits = (2**32 // weights).bit_length() - 1      # the sum of all stays below 2^32
        self.bits = args.quantize or min(16, fits)
        if not 1 <= self.bits <= fits:
            fail(f'--quantize {self.bits}: with --secagg the sum may exceed 32 bits; {fits} fit'
                 if fits > 0 else '--secagg 1: the clients have too many examples for 32 bits; '
                 'sample fewer', everyone=True)
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
            return u._replace(w=self.term(u, w, r).astype('<u4').tobytes(), kept=kept)
        except ValueError:
            return u._replace(w=b'', kept={})

    def term(self, u, w, r):
        """What client u.k adds to the sum, (d + 1,) uint32. Raises ValueError for NaN."""
        v = (flat(u.w) - flat(w))[self.at(u.k, r)].double()
        v = self.bounded(v, len(v) ** 0.5 * self.level)         # rounding adds that much at most
        v = np.append(v, (u.loss / 8 - 1) * self.bound())
        draw = rng(self.args.seed, 'quantize', r.t, u.k)
        return term(v, self.bound(), self.bits, self.weight(u.k), draw)

    def receive(self, updates, w, r):
        """One Update for all: the mean of those that stayed; none if they are too few."""
        r.kept, asked = {}, sorted(r.S_t)
        threshold = max(math.ceil(round(self.args.threshold * len(asked), 9)), self.least)
        clients, length = {}, len(flat(w)[self.at(0, r)]) + 1
        for u in self.terms((self.pack(u, w, r) for u in updates), r):
            r.tally['sent'] += 1
            if u.w:
                clients[u.k] = SecureClient(u.k, np.frombuffer(u.w, '<u4'), threshold)
                r.kept[u.k] = u.kept
            else:
                r.tally['rejected'] += 1
                print(f'client {u.k} is left out: it holds NaN or infinity')
        nothing = np.zeros(length, np.uint32)       # of a lost client, which never sends it
        lost = vars(r).get('lost', {})
        clients = {k: SecureClient(k, nothing, threshold) for k in lost} | clients
        self.serve(clients, r)
        if self.rank:
            return
        ks = asked if self.silo else sorted(clients)
        try:
            total, survivors = secure_sum(self.asker(clients, lost, r), ks, threshold, length)
        except ValueError as e:
            print(f'round {r.t}: secure aggregation is given up: {e}')
            return
        finally:
            self.dismiss(r)
        yield self.merged(total, survivors, w, r)

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
        v, n = flat(w), int(self.n_k[survivors].sum())
        v[self.at(0, r)] += torch.from_numpy(mean[:-1]).float()
        loss = float((mean[-1] / self.bound() + 1) * 8)
        r.tally.update(clients=len(survivors), m_t=n, loss=n * loss)
        return self.Update(None, unflat(v, w), m_t, loss)

def answered(client, step, message):
    """A SecureClient's answer; b'' from one that is lost or finds its rules broken."""
    try:
        return client.answer(step, message) if client else b''
    except ValueError:
        return b''

####################################### The protocol #######################################

STEPS = 'advertise', 'share', 'mask', 'reveal'      # the protocol's rounds
class SecureClient:
    """One client's side of secure aggregation (Bonawitz et al. 2017, Figure 4): four answers to the
    server, bytes for bytes.

    k: its number; x: (d,) uint32, what it adds to the sum modulo 2^32; threshold: how many clients
    must stay.
    """
    def __init__(self, k, x, threshold):
        self.k, self.x, self.threshold, self.steps = k, x, threshold, STEPS
        # c^SK, s^SK and b of the paper
        self.sealing, self.masking, self.seed = (secrets.randbits(256) for _ in range(3))

    def answer(self, step, message):
        """Its answer in a step, each of STEPS once and in order. Raises ValueError, and answers no
        more, if the clients are fewer than the threshold or the message is not what it should
        be."""
        if step not in self.steps[:1]:
            raise ValueError(f'{step!r} is not the next step')
        steps, self.steps = self.steps[1:], ()
        try:
            answer = getattr(self, step)(message)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as e:
            raise ValueError(f'a message makes no sense: {e!r}') from e
        self.steps = steps
        return answer

    def advertise(self, _):
        """Round 0: its two public keys."""
        keys = [pow(2, private, PRIME) for private in (self.sealing, self.masking)]
        return json.dumps([written(key, KEY) for key in keys]).encode()

    def share(self, message):
        """Round 1: the public keys of all, {k: keys}, in; out, for each of the others, sealed
        shares of masking key and seed."""
        self.public = {int(v): [read(key, KEY) for key in keys]
                       for v, keys in json.loads(message).items()}
        self.enough(self.public)
        if len({key for keys in self.public.values() for key in keys}) < 2 * len(self.public):
            raise ValueError('two keys are the same')
        self.common = {v: agree(self.sealing, keys[0])
                       for v, keys in self.public.items() if v != self.k}
        xs = [v + 1 for v in self.public]
        shares = [split(secret, xs, self.threshold) for secret in (self.masking, self.seed)]
        self.own = shares[1][self.k + 1]
        sealed = {}
        for v in self.common:
            text = json.dumps([written(of[v + 1], SHARE) for of in shares]).encode()
            sealed[v] = seal(self.channel(v, self.k), text).hex()
        return json.dumps(sealed).encode()

    def mask(self, message):
        """Round 2: what the others have sealed for it, {k: hex}, in; out x, plus its seed's mask,
        plus or minus a mask for each pair."""
        self.sealed = {int(v): bytes.fromhex(text) for v, text in json.loads(message).items()}
        self.enough([self.k, *self.sealed])
        y = self.x + expand(self.seed.to_bytes(32, 'big'), len(self.x))
        for v in self.sealed:
            pair = expand(agree(self.masking, self.public[v][1]), len(y))
            y = y + pair if self.k < v else y - pair
        return y.astype('<u4').tobytes()

    def reveal(self, message):
        """Round 3: who has sent its masked x, [k, ...], in; out {k: share}: of the seed of those
        who have, of the masking key of those who have not. Both of one client would unmask it."""
        survivors = set(json.loads(message)) & {self.k, *self.sealed}
        self.enough(survivors)
        if self.k not in survivors:
            raise ValueError('it has sent its masked vector')
        shares = {self.k: written(self.own, SHARE)}
        for v, text in self.sealed.items():
            both = json.loads(unseal(self.channel(v, v), text))
            shares[v] = written(read(both[v in survivors], SHARE), SHARE)
        return json.dumps(shares).encode()

    def channel(self, v, sender):
        """The key under which `sender`, this client or v, seals for the other of the two."""
        return hashlib.sha256(self.common[v] + sender.to_bytes(8, 'big')).digest()

    def enough(self, clients):
        """Raises ValueError if the clients are fewer than the threshold."""
        if len(clients) < self.threshold:
            raise ValueError(f'{len(clients)} clients are left, {self.threshold} are needed')

def secure_sum(ask, ks, threshold, d):
    """(sum, survivors): the sum modulo 2^32, (d,) uint32, of what the clients of ks add that have
    sent it, a list, from masked vectors alone (Bonawitz et al. 2017, Figure 4, the server's side).

    ask(k, step, message): client k's answer, bytes, in a step of STEPS; None or ValueError once it
    is lost. A client whose answer makes no sense is lost too. Raises ValueError if fewer than
    threshold answer.
    """
    def everyone(step, messages, parse):
        answers = {}
        for k, message in messages.items():
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                answer = ask(k, step, message)
                if answer is not None:
                    answers[k] = parse(k, answer)
        if len(answers) < threshold:
            raise ValueError(f'{len(answers)} of {len(ks)} clients have answered "{step}", '
                             f'{threshold} are needed')
        return answers
    public = everyone('advertise', dict.fromkeys(ks, b''), lambda k, answer: keys_of(answer))
    text = json.dumps({k: [written(key, KEY) for key in keys] for k, keys in public.items()})
    sealed = everyone('share', dict.fromkeys(public, text.encode()),
                      lambda k, answer: about(answer, set(public) - {k}))
    inbox = {k: json.dumps({v: sealed[v][k] for v in sealed if v != k}).encode() for k in sealed}
    masked = everyone('mask', inbox, lambda k, answer: vector(answer, d))
    text = json.dumps(list(masked))
    shares = everyone('reveal', dict.fromkeys(masked, text.encode()),
                      lambda k, answer: shares_of(answer, sealed))
    total = np.zeros(d, np.uint32)
    for y in masked.values():
        total += y
    for v in sealed:
        secret = join({k + 1: shares[k][v] for k in list(shares)[:threshold]})
        unmask(total, secret, v, list(masked), public)
    return total, list(masked)

def unmask(total, secret, v, survivors, public):
    """Takes out of total what client v's secret has put in: its seed's mask, or, if it is lost, the
    masks of its pairs, which nothing cancels."""
    if secret >= 2**256:
        raise ValueError(f'the shares of client {v} do not fit together')
    if v in survivors:
        total -= expand(secret.to_bytes(32, 'big'), len(total))
        return
    for k in survivors:
        pair = expand(agree(secret, public[k][1]), len(total))
        total += pair if k > v else -pair
