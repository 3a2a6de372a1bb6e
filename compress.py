"""An update on the wire: a client's flat vector w_k - w_t as the bytes that it would upload, and back; smaller, and private.

    payload = encode(update, quantize=8)        # bytes, a quarter of fp32's
    update = decode(payload, len(update))       # or ValueError: nothing else, whatever the bytes are

    Konecny et al. 2016 (arXiv 1610.05492), Section 3: probabilistic quantization
    Aji and Heafield 2017 (arXiv 1704.05021), Stich et al. 2018 (arXiv 1809.07599): top-k with error feedback
    Zhu and Gupta 2017 (arXiv 1710.01878), Section 3: pruning on a cubic schedule

    Abadi et al. 2016 (arXiv 1607.00133), McMahan et al. 2018 (arXiv 1710.06963): differential privacy, of examples and of users
    Mironov et al. 2019 (arXiv 1908.10530), Canonne et al. 2020 (arXiv 2004.00010): what it costs
    Bonawitz et al. 2017 (ACM CCS, "Practical Secure Aggregation"): a sum whose terms the server does not see

This file knows no net and no data set. It needs numpy and torch. The privacy of noise is that of a model on paper: NumPy's generator
is not a cryptographic one. Secure aggregation is written to be read, and has not been audited: its server is honest but curious,
there are no signatures, so a server that lies about who is there, or who has gone, is not found out.
"""
import contextlib
import functools
import hashlib
import hmac
import json
import math
import secrets
import struct
import zlib

import numpy as np
import torch

#############################################
#         Bytes: encode and decode          #
#############################################

# Little-endian: magic, bits a value, index coding, values in all (d), values kept (n), the lowest level and the step
# between levels; then the indices, the values, and the CRC-32 of all before it.
HEADER, CRC = struct.Struct('<4sBBIIff'), struct.Struct('<I')
MAGIC = b'FAvg'
ALL, BITMAP, INDICES = range(3)         # index codings

def encode(update, quantize=None, topk=None, draw=None):
    """The bytes of a float vector: header, which values are kept, the values, a checksum.

    update: (d,) float tensor, d below 2^32. quantize: 1 to 16 bits a value, uniform over the range of the values kept, with
    stochastic rounding, which is unbiased (Konecny et al. 2016, Section 3); None: fp32 as they are.
    topk: the fraction, (0, 1], of values kept, those of largest magnitude, at least one; others count as zero.
    draw: the NumPy generator of the rounding. Raises ValueError for another setting; NaN and infinity are for decode to find.
    """
    if not torch.is_floating_point(update) or update.dim() != 1: raise ValueError('the update is not a flat float tensor, (d,)')
    if quantize is not None and (not isinstance(quantize, (int, np.integer)) or not 1 <= quantize <= 16):
        raise ValueError(f'quantize {quantize!r}: a whole number of 1 to 16 bits, or None')
    if topk is not None and not 0 < topk <= 1: raise ValueError(f'topk {topk}: a fraction above 0 and at most 1, or None')
    v, d = update.detach().float().cpu(), len(update)
    if d >= 2**32: raise ValueError(f'{d} values: below 2^32')
    n = d if topk is None else min(max(round(topk * d), 1), d)
    coding, where, low, step = ALL, b'', 0.0, 0.0
    if n < d:
        kept = v.abs().topk(n, sorted=False).indices.sort().values
        coding, where = support(kept.numpy(), d)
        v = v[kept]
    if quantize:
        codes, low, step = levels(v.numpy(), quantize, draw or np.random.default_rng())
        values = pack(codes, quantize)
    else: values = v.numpy().astype('<f4').tobytes()
    body = HEADER.pack(MAGIC, quantize or 32, coding, d, n, low, step) + where + values
    return body + CRC.pack(zlib.crc32(body))

def decode(payload, d):
    """The vector, (d,) float32, that encode made payload from. Raises ValueError with the reason if there is none of d values.

    Nothing is allocated before the payload's own length has been found to be that of d values or fewer.
    """
    d = int(d)
    if len(payload) < HEADER.size + CRC.size: raise ValueError(f'{len(payload)} bytes are too few for a header')
    magic, bits, coding, given, n, low, step = HEADER.unpack_from(payload)
    if magic != MAGIC: raise ValueError('not an encoded update')
    if given != d: raise ValueError(f'it is of {given} values, not of {d}')
    if bits not in (*range(1, 17), 32) or coding > INDICES or n > d or (coding == ALL and n < d):
        raise ValueError('its header contradicts itself')
    start = HEADER.size + {ALL: 0, BITMAP: size(d, 1), INDICES: size(n, width(d))}[coding]
    end = start + size(n, bits)
    if len(payload) != end + CRC.size: raise ValueError(f'it has {len(payload)} bytes, {end + CRC.size} were to come')
    if CRC.unpack_from(payload, end)[0] != zlib.crc32(memoryview(payload)[:end]): raise ValueError('its checksum is wrong')
    if bits == 32: v = np.frombuffer(payload, '<f4', n, start).astype(np.float32)
    else:
        with np.errstate(all='ignore'): v = np.float32(low) + np.float32(step) * unpack(payload[start:end], n, bits).astype(np.float32)
    if not np.isfinite(v).all(): raise ValueError('it holds NaN or infinity, or spans more than fp32 can')
    if coding == ALL: return torch.from_numpy(v)
    where = payload[HEADER.size:start]
    kept = np.flatnonzero(unpack(where, d, 1)) if coding == BITMAP else unpack(where, n, width(d))
    if len(kept) != n or (n and kept[-1] >= d) or (np.diff(kept.astype(np.int64)) <= 0).any():
        raise ValueError('its indices are out of order or out of range')
    update = np.zeros(d, np.float32)
    update[kept] = v
    return torch.from_numpy(update)

def levels(v, bits, draw):
    """(codes, (n,) uint16, low, step): each of v, (n,) float32, rounded at random to one of the two nearest of 2^bits levels from
    the lowest value to the highest, so that low + step code is v on average."""
    if not len(v): return np.zeros(0, np.uint16), 0.0, 0.0
    with np.errstate(all='ignore'): low, span = v.min(), v.max() - v.min()
    if not np.isfinite(span): return np.zeros(len(v), np.uint16), np.nan, np.nan        # for decode to find
    step = span / np.float32(2**bits - 1)
    x = (v - low) / (step or np.float32(1))
    floor = np.floor(x)
    x -= floor                                                  # how far above the lower level, in [0, 1)
    floor += draw.random(len(v), np.float32) < x
    return np.minimum(floor, 2**bits - 1).astype(np.uint16), low, step

def support(kept, d):
    """(coding, bytes) for the ascending indices kept of d: a bitmap or packed indices, whichever is smaller."""
    if size(d, 1) > size(len(kept), width(d)): return INDICES, pack(kept, width(d))
    bitmap = np.zeros(d, np.uint8)
    bitmap[kept] = 1
    return BITMAP, pack(bitmap, 1)

def width(d):
    """Bits of an index below d."""
    return max((d - 1).bit_length(), 1)

def size(n, bits):
    """Bytes of n packed values."""
    return (n * bits + 7) // 8

def cell(bits):
    """The smallest NumPy type with room for `bits` bits, and how many it has."""
    room = next(room for room in (8, 16, 32) if bits <= room)
    return f'<u{room // 8}', room

def pack(codes, bits):
    """Whole numbers below 2^bits, (n,), as bytes: `bits` of each, lowest first, without gaps."""
    kind, room = cell(bits)
    codes = codes.astype(kind)
    if bits < room:
        codes = np.unpackbits(codes.view(np.uint8).reshape(-1, room // 8), axis=1, count=bits, bitorder='little')    # (n, bits)
        codes = np.packbits(codes, bitorder='little')
    return codes.tobytes()

def unpack(packed, n, bits):
    """pack's codes, (n,). Raises ValueError if the bits left over are not zero."""
    kind, room = cell(bits)
    if bits == room: return np.frombuffer(packed, kind, n)
    each = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder='little')
    if each[n * bits:].any(): raise ValueError('its padding is not zero')
    codes = np.zeros(n, kind)
    for b in range(bits): codes |= each[b:n * bits:bits].astype(kind) << b
    return codes

#############################################
#                  Pruning                  #
#############################################

def sparsity(t, s, begin, end):
    """The fraction pruned away in round t: none up to round `begin`, s from `end` on, a cubic between (Zhu and Gupta 2017, Eq. 1)."""
    return s * (1 - (1 - min(max((t - begin) / (end - begin), 0), 1)) ** 3)

def prune(v, s):
    """Which of the weights v, (d,), are left without the round(s d) of smallest magnitude: (d,) bool."""
    n, v = round(s * len(v)), v.detach().abs()
    if n == 0: return torch.ones(len(v), dtype=torch.bool, device=v.device)
    cut = v.kthvalue(n).values
    left, ties = v > cut, (v == cut).nonzero().flatten()
    left[ties[n + len(ties) - int((~left).sum()):]] = True      # as many of those equal to the cut go as make n
    return left

#############################################
#       Private: differential privacy       #
#############################################

# Orders of the Renyi divergence; an epsilon is the least that any of them gives.
ORDERS = np.concatenate([np.arange(1.5, 11, 0.1), np.arange(11, 64), 2.0 ** np.arange(6, 15)])

def clip(update, S):
    """update, (d,), scaled down to an L2 norm of S if it is longer (McMahan et al. 2018, arXiv 1710.06963, Section 2)."""
    norm = update.double().norm()
    return update * (S / norm) if norm > S else update

@functools.lru_cache(None)
def renyi(q, noise):
    """The Renyi divergence at ORDERS of one step of the sampled Gaussian mechanism (Mironov et al. 2019, Section 3.3, whose sum
    for a fractional order a ends by itself at a whole one)."""
    with np.errstate(all='ignore'): gauss = ORDERS / (2 * np.float64(noise)**2)        # nobody left out: the Gaussian mechanism's
    if q in (0, 1): return gauss if q else np.zeros(len(ORDERS))
    return np.maximum(np.fmin([divergence(a, q, np.float64(noise)) for a in ORDERS], gauss), 0)     # sampling never costs privacy

def divergence(a, q, noise):
    """renyi at one order a, or NaN where it is beyond what floating point holds."""
    i = np.arange(math.ceil(a) + 1000.0)
    with np.errstate(all='ignore'):
        factors = np.append(1, (a - i[:-1]) / (i[:-1] + 1))
        log_binomial, sign = np.cumsum(np.log(np.abs(factors))), np.cumprod(np.sign(factors))       # of a over i
        z0 = noise**2 * math.log(1 / q - 1) + 0.5
        terms = np.concatenate([
            log_binomial + k * math.log(q) + (a - k) * math.log1p(-q) + k * (k - 1) / (2 * noise**2)
            + torch.special.log_ndtr(torch.from_numpy(side * (z0 - k) / noise)).numpy() for k, side in ((i, 1), (a - i, -1))])
        top = np.max(terms)
        return (top + np.log(np.sum(np.tile(sign, 2) * np.exp(terms - top)))) / (a - 1)

def epsilon(q, noise, steps, delta):
    """The epsilon at delta of `steps` sums, each over a sample in which everyone is with probability q, of terms clipped to S, with
    Gaussian noise of deviation noise S: whether somebody is in the data hides as well as (epsilon, delta) says.

    Renyi divergences (Mironov et al. 2019, arXiv 1908.10530) converted by Canonne et al. 2020 (arXiv 2004.00010, Proposition 12).
    inf where there is no bound. Raises ValueError if q is not in [0, 1], delta not in (0, 1), or noise or steps below 0.
    """
    if not 0 <= q <= 1: raise ValueError(f'q {q}: from 0 to 1')
    if not 0 < delta < 1: raise ValueError(f'delta {delta}: above 0 and below 1')
    if not (0 <= noise < math.inf and 0 <= steps < math.inf): raise ValueError(f'noise {noise}, steps {steps}: finite and at least 0')
    if not steps or not q: return 0.0
    found = steps * renyi(float(q), float(noise)) + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(float(found.min()), 0.0)

def least_noise(spent, target):
    """By bisection, the least noise, to 0.1 %, from 0.01 on, with spent(noise), an epsilon that falls with it, at most target."""
    low = high = 0.01
    while spent(high) > target:
        if high > 1e6: raise ValueError(f'epsilon {target}: no noise up to 10^6 gives it')
        low, high = high, 2 * high
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if spent(middle) <= target else (middle, high)
    return high

#############################################
#        Private: secure aggregation        #
#############################################

STEPS = 'advertise', 'share', 'mask', 'reveal'      # the protocol's rounds
# RFC 3526, group 14: 2 generates a group modulo this prime of 2048 bits. Private keys have 256 bits.
PRIME = int('FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DDEF9519B3CD3A'
            '431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7EDEE386BFB5A899FA5AE9F2411'
            '7C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F83655D23DCA3AD961C62F356208552BB9ED5'
            '29077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3BE39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9'
            'DE2BCBF6955817183995497CEA956AE515D2261898FA051015728E5A8AACAA68FFFFFFFFFFFFFFFF', 16)
FIELD = 2**521 - 1      # the prime of Shamir's field, above every secret

def agree(private, public):
    """The 32 bytes that two key pairs have in common: Diffie-Hellman, hashed (Bonawitz et al., Section 3.2).

    Raises ValueError for a public key out of range.
    """
    if not 1 < public < PRIME - 1: raise ValueError('a public key is out of range')
    return hashlib.sha256(pow(public, private, PRIME).to_bytes(256, 'big')).digest()

def expand(secret, d):
    """A secret's mask, (d,) uint32, by SHAKE-256 (Section 3.4)."""
    return np.frombuffer(hashlib.shake_256(secret).digest(4 * d), '<u4')

def split(secret, xs, threshold):
    """Shares {x: y} of a whole number below FIELD, of which `threshold` give it and fewer nothing (Shamir 1979; Section 3.1).
    xs: not 0."""
    polynomial = [secret] + [secrets.randbelow(FIELD) for _ in range(threshold - 1)]
    return {x: functools.reduce(lambda y, c: (y * x + c) % FIELD, reversed(polynomial), 0) for x in xs}

def join(shares):
    """The secret that split made shares {x: y} of: the value at 0 of the polynomial through them."""
    secret = 0
    for x, y in shares.items():
        others = [u for u in shares if u != x]
        secret += y * math.prod(others) * pow(math.prod(u - x for u in others), -1, FIELD)
    return secret % FIELD

def seal(key, text):
    """text, bytes, encrypted by XOR with SHAKE-256 of a key used once, and authenticated by HMAC-SHA-256 (Section 3.3)."""
    body = bytes(a ^ b for a, b in zip(text, hashlib.shake_256(b'seal' + key).digest(len(text))))
    return body + hmac.digest(b'tag' + key, body, 'sha256')

def unseal(key, sealed):
    """What seal sealed. Raises ValueError if it was altered."""
    body, tag = sealed[:-32], sealed[-32:]
    if not hmac.compare_digest(tag, hmac.digest(b'tag' + key, body, 'sha256')): raise ValueError('a sealed share was altered')
    return bytes(a ^ b for a, b in zip(body, hashlib.shake_256(b'seal' + key).digest(len(body))))

def term(v, R, bits, weight, draw):
    """What a client adds to a sum modulo 2^32, (d,) uint32: weight times the level to which each of v, (d,), is rounded at random, of
    2^bits evenly from -R to R, beyond which v is clamped; each level times 2 R / (2^bits - 1), minus R, is v on average.

    Raises ValueError if v is not finite.
    """
    v, top = np.asarray(v, np.float64), 2**bits - 1
    if not np.isfinite(v).all(): raise ValueError('it holds NaN or infinity')
    x = (v.clip(-R, R) + R) * (top / (2 * R))
    return np.minimum(np.floor(x + draw.random(len(x))), top).astype(np.uint32) * np.uint32(weight)

class SecureClient:
    """One client's side of secure aggregation (Bonawitz et al. 2017, Figure 4): four answers to the server, bytes for bytes.

    k: its number; x: (d,) uint32, what it adds to the sum modulo 2^32; threshold: how many clients must stay.
    """
    def __init__(self, k, x, threshold):
        self.k, self.x, self.threshold, self.steps = k, x, threshold, STEPS
        self.sealing, self.masking, self.seed = (secrets.randbits(256) for _ in range(3))       # c^SK, s^SK and b of the paper

    def answer(self, step, message):
        """Its answer in a step, each of STEPS once and in order. Raises ValueError, and answers no more, if the clients are fewer
        than the threshold or the message is not what it should be."""
        if step not in self.steps[:1]: raise ValueError(f'{step!r} is not what comes next')
        steps, self.steps = self.steps[1:], ()
        try: answer = getattr(self, step)(message)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as e: raise ValueError(f'a message makes no sense: {e!r}') from e
        self.steps = steps
        return answer

    def advertise(self, _):
        """Round 0: its two public keys."""
        return json.dumps([pow(2, self.sealing, PRIME), pow(2, self.masking, PRIME)]).encode()

    def share(self, message):
        """Round 1: the public keys of all, {k: keys}, in; out, for each of the others, sealed shares of masking key and seed."""
        self.public = {int(v): keys for v, keys in json.loads(message).items()}
        self.enough(self.public)
        if len({key for keys in self.public.values() for key in keys}) < 2 * len(self.public): raise ValueError('two keys are the same')
        self.common = {v: agree(self.sealing, keys[0]) for v, keys in self.public.items() if v != self.k}
        key, seed = (split(secret, [v + 1 for v in self.public], self.threshold) for secret in (self.masking, self.seed))
        self.own = seed[self.k + 1]
        return json.dumps({v: seal(self.channel(v, self.k), json.dumps([key[v + 1], seed[v + 1]]).encode()).hex()
                           for v in self.public if v != self.k}).encode()

    def mask(self, message):
        """Round 2: what the others have sealed for it, {k: hex}, in; out x, plus its seed's mask, plus or minus a mask for each pair."""
        self.sealed = {int(v): bytes.fromhex(text) for v, text in json.loads(message).items()}
        self.enough([self.k, *self.sealed])
        y = self.x + expand(self.seed.to_bytes(32, 'big'), len(self.x))
        for v in self.sealed:
            pair = expand(agree(self.masking, self.public[v][1]), len(y))
            y = y + pair if self.k < v else y - pair
        return y.astype('<u4').tobytes()

    def reveal(self, message):
        """Round 3: who has sent its masked x, [k, ...], in; out {k: share}: of the seed of those who have, of the masking key of
        those who have not. Both of one client would unmask it."""
        survivors = set(json.loads(message)) & {self.k, *self.sealed}
        self.enough(survivors)
        if self.k not in survivors: raise ValueError('it has sent its masked vector')
        shares = {v: json.loads(unseal(self.channel(v, v), text))[v in survivors] for v, text in self.sealed.items()}
        return json.dumps({self.k: self.own} | shares).encode()

    def channel(self, v, sender):
        """The key under which `sender`, this client or v, seals for the other of the two."""
        return hashlib.sha256(self.common[v] + sender.to_bytes(8, 'big')).digest()

    def enough(self, clients):
        if len(clients) < self.threshold: raise ValueError(f'{len(clients)} clients are left, {self.threshold} are needed')

def secure_sum(ask, ks, threshold, d):
    """(sum, who): the sum modulo 2^32, (d,) uint32, of what the clients add that have sent it, a list, from masked vectors alone.

    ask(k, step, message): client k's answer, bytes, in a step of STEPS; None or ValueError once it is lost. A client whose answer
    makes no sense is lost too. Raises ValueError if fewer than threshold answer. The server's side of Bonawitz et al. 2017, Figure 4.
    """
    def everyone(step, messages, read):
        answers = {}
        for k, message in messages.items():
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                answer = ask(k, step, message)
                if answer is not None: answers[k] = read(k, answer)
        if len(answers) < threshold: raise ValueError(f'{len(answers)} of {len(ks)} clients have come to "{step}", {threshold} are needed')
        return answers
    def numbers(answer, keys):
        """{k: ...} of a JSON answer, which must be about the clients `keys`."""
        found = {int(v): y for v, y in json.loads(answer).items()}
        if set(found) != set(keys): raise ValueError
        return found
    def keys_of(_, answer):
        found = json.loads(answer)
        if len(found) != 2 or not all(type(key) is int and 1 < key < PRIME - 1 for key in found): raise ValueError
        return found
    def shares_of(_, answer):
        found = numbers(answer, sealed)
        if not all(type(y) is int and 0 <= y < FIELD for y in found.values()): raise ValueError
        return found
    def vector(_, answer):
        if len(answer) != 4 * d: raise ValueError
        return np.frombuffer(answer, '<u4')

    public = everyone('advertise', dict.fromkeys(ks, b''), keys_of)
    everybody = dict.fromkeys(public, json.dumps(public).encode())
    sealed = everyone('share', everybody, lambda k, answer: numbers(answer, set(public) - {k}))
    messages = {k: {v: sealed[v][k] for v in sealed if v != k} for k in sealed}
    masked = everyone('mask', {k: json.dumps(message).encode() for k, message in messages.items()}, vector)
    survivors = dict.fromkeys(masked, json.dumps(list(masked)).encode())
    shares = everyone('reveal', survivors, shares_of)
    total = np.zeros(d, np.uint32)
    for y in masked.values(): total += y
    for v in sealed:
        secret = join({k + 1: shares[k][v] for k in list(shares)[:threshold]})
        if secret >= 2**256: raise ValueError(f'the shares of client {v} do not fit together')
        if v in masked: total -= expand(secret.to_bytes(32, 'big'), d)      # its seed's mask
        else:                                                               # the masks of its pairs, which nobody cancels
            for k in masked:
                pair = expand(agree(secret, public[k][1]), d)
                if k < v: total -= pair
                else: total += pair
    return total, list(masked)
