"""The protocol of secure aggregation: a server learns the sum of vectors, not its terms.

    clients = {k: SecureClient(k, x, threshold=6) for k, x in terms.items()}
    total, survivors = secure_sum(lambda k, step, message: clients[k].answer(step, message),
                                  list(clients), threshold=67, d=1000, graph=(30, 6))

Bonawitz et al. 2017 (ACM CCS, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning"), Figure 4; and Bell et al. 2020 (ACM CCS, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead"), Section 3: each client shares masks and secrets with k neighbours
instead of with all others.

It is written to be read, and has not been audited. The server is honest but curious: there are no
signatures, so that a server that lies about who takes part, or who is lost, is not found out. A
client that sends false shares can stop a round, as in both papers.
"""
import contextlib
import hashlib
import json
import math
import secrets

import numpy as np

from beyond.crypto import (KEY, PRIME, SHARE, agree, expand, join, keys_of, read, seal,
                           sealed_of, shares_of, split, unseal, vector, written)

STEPS = 'advertise', 'share', 'mask', 'reveal'      # the protocol's rounds
class SecureClient:
    """One client's side of secure aggregation (Bonawitz et al. 2017, Figure 4): four answers to the
    server, bytes for bytes.

    k: its number, below 2^32; x: (d,) uint32, what it adds to the sum modulo 2^32; threshold: how
    many clients must stay, of those that the server lets it share with, itself among them.
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
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as e:
            raise ValueError(f'a message makes no sense: {e!r}') from e
        self.steps = steps
        return answer

    def advertise(self, _):
        """Round 0: its two public keys."""
        keys = [pow(2, private, PRIME) for private in (self.sealing, self.masking)]
        return json.dumps([written(key, KEY) for key in keys]).encode()

    def share(self, message):
        """Round 1: the public keys of its neighbours and its own, {k: keys}, in; out, for each
        neighbour, sealed shares of masking key and seed."""
        self.public = {int(v): [read(key, KEY) for key in keys]
                       for v, keys in json.loads(message).items()}
        self.enough(self.public)
        if not all(0 <= v < 2**32 for v in self.public):
            raise ValueError('a client has no such number: its share could be the secret itself')
        if len({key for keys in self.public.values() for key in keys}) < 2 * len(self.public):
            raise ValueError('two keys are the same')
        self.common = {v: agree(self.sealing, keys[0])
                       for v, keys in self.public.items() if v != self.k}
        xs = [v + 1 for v in self.public]
        shares = [split(secret, xs, self.threshold) for secret in (self.masking, self.seed)]
        self.own_share = shares[1][self.k + 1]
        sealed = {}
        for v in self.common:
            text = json.dumps([written(of[v + 1], SHARE) for of in shares]).encode()
            sealed[v] = seal(self.channel(v, self.k), text).hex()
        return json.dumps(sealed).encode()

    def mask(self, message):
        """Round 2: what its neighbours have sealed for it, {k: hex}, in; out x, plus its seed's
        mask, plus or minus a mask for each pair."""
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
        shares = {self.k: written(self.own_share, SHARE)}
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

def secure_sum(ask, ks, threshold, d, graph=None):
    """(sum, survivors), from masked vectors alone (Bonawitz et al. 2017, Figure 4, the server's
    side): survivors are those of ks that have sent their vector, a list; the sum, modulo 2^32, is
    that of their terms, (d,) uint32.

    ask(k, step, message): client k's answer, bytes, in a step of STEPS; None or ValueError once it
    is lost. A client whose answer makes no sense is lost too. graph: (degree, t), how many
    neighbours each client has, and their SecureClients' threshold, as of `neighborhood`; without
    it all are neighbours, and t is the threshold. Raises ValueError if fewer than threshold
    answer, or fewer than t of a client's neighbours.
    """
    def everyone(step, messages, parse):
        answers = parsed(ask, step, messages, parse)
        if len(answers) < threshold:
            raise ValueError(f'{len(answers)} of {len(ks)} clients have answered "{step}", '
                             f'{threshold} are needed')
        return answers
    degree, t = graph or (len(ks), threshold)
    near = ring(list(ks), degree)
    def among(clients, k):      # k and its neighbours, in the order of clients
        return [v for v in clients if v == k or v in near[k]]
    public = everyone('advertise', dict.fromkeys(ks, ''), lambda answer, k: keys_of(answer))
    keys = {k: [written(key, KEY) for key in pair] for k, pair in public.items()}
    sealed = everyone('share', {k: {v: keys[v] for v in among(public, k)} for k in public},
                      lambda answer, k: sealed_of(answer, set(among(public, k)) - {k}))
    masked = everyone('mask', {k: {v: sealed[v][k] for v in among(sealed, k) if v != k}
                               for k in sealed}, lambda answer, k: vector(answer, d))
    shares = everyone('reveal', {k: among(masked, k) for k in masked},
                      lambda answer, k: shares_of(answer, among(sealed, k)))
    total = np.zeros(d, np.uint32)
    for y in masked.values():
        total += y
    for v in sealed:
        holders = among(shares, v)[:t]
        unmask(total, recovered(v, {k: shares[k][v] for k in holders}, t), v,
               among(masked, v), public)
    return total, list(masked)

def parsed(ask, step, messages, parse):
    """{k: parse(answer, k)} of the clients whose answer to their message makes sense."""
    answers = {}
    for k, message in messages.items():
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            answer = ask(k, step, json.dumps(message).encode())
            if answer is not None:
                answers[k] = parse(answer, k)
    return answers

def recovered(v, shares, t):
    """Client v's secret, of which {k: share} are shares. Raises ValueError if they are fewer than
    t, or do not fit together."""
    if len(shares) < t:
        raise ValueError(f'{len(shares)} of client {v} and its neighbours have answered "reveal", '
                         f'{t} are needed')
    secret = join({k + 1: share for k, share in shares.items()})
    if secret >= 2**256:
        raise ValueError(f'the shares of client {v} do not fit together: it has dealt false ones, '
                         f'or one of the clients {", ".join(map(str, shares))} has sent one')
    return secret

def unmask(total, secret, v, survivors, public):
    """Takes out of total what client v's secret has put in: its seed's mask, or, if it is lost, the
    masks of its pairs with the survivors, which nothing cancels."""
    if v in survivors:
        total -= expand(secret.to_bytes(32, 'big'), len(total))
        return
    if pow(2, secret, PRIME) != public[v][1]:
        raise ValueError(f'the shares of client {v} give another key than its own')
    for k in survivors:
        pair = expand(agree(secret, public[k][1]), len(total))
        total += pair if k > v else -pair

################################### Who shares with whom ###################################

def ring(ks, degree):
    """{k: its neighbours}: ks on a ring in random order, each next to the degree / 2 on either
    side (Bell et al. 2020, Section 3: a Harary graph); all of them where that is no more."""
    order, m = list(ks), len(ks)
    if degree >= m - 1:
        return {k: set(ks) - {k} for k in ks}
    secrets.SystemRandom().shuffle(order)
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {k: {order[(i + step) % m] for step in steps} for i, k in enumerate(order)}

def neighborhood(m, stay, corrupt=0.05, sigma=40, eta=30):
    """(degree, t), how many neighbours each of m clients has and how many shares give a secret, if
    `stay` clients stay; None where all have to be neighbours.

    It is the least even degree, and with it the largest t, for which two things hold. Privacy: but
    with probability 2^-sigma, the honest clients that stay are connected, and none has t corrupt
    neighbours. Correctness: but with probability 2^-eta, each client has t neighbours that stay.
    Bell et al. 2020, Section 3, by the exact hypergeometric tails of the authors' implementation,
    which has sigma = 40 and eta = 20. corrupt: the fraction that colludes with the server.
    """
    missing = math.ceil(round(corrupt * m, 9)) + m - stay
    def fails(degree, t):       # some client of m has fewer than t neighbours that stay
        return at_least(degree - t + 1, m - stay, m, degree) >= 2.0 ** -eta / m
    for degree in range(2, m - 1, 2):
        # To cut the ring, degree / 2 successive clients have to be missing at two places.
        places = m * (m - degree - 1) // 2
        if places * math.perm(missing, degree) / math.perm(m, degree) < 2.0 ** -(sigma + 1):
            t = share_threshold(m, degree, corrupt, sigma)
            if not fails(degree, t):
                return degree, next(u for u in range(t, m) if fails(degree, u + 1))
    return None

def share_threshold(m, degree, corrupt=0.05, sigma=40):
    """How many shares give a secret, so that, but with a probability of 2^-(sigma + 1), no client
    of m has that many corrupt neighbours; at least 2."""
    t, bad = 2, math.ceil(round(corrupt * m, 9))
    while at_least(t, bad, m, degree) >= 2.0 ** -(sigma + 1) / m:
        t += 1
    return t

def at_least(t, marked, m, n):
    """The probability that of n drawn from m without replacement t or more are marked."""
    ways = sum(math.comb(marked, i) * math.comb(m - marked, n - i) for i in range(t, n + 1))
    return ways / math.comb(m, n)
