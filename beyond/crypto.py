"""What secure aggregation is made of: key agreement, masks, secret shares, messages.

    shares = split(secret, [1, 2, 3], threshold=2)
    secret = join({1: shares[1], 3: shares[3]})

Bonawitz et al. 2017 (ACM CCS, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning"), Section 3, from the standard library's hashes. It has not been audited.
"""
import functools
import hashlib
import hmac
import json
import math
import secrets

import numpy as np

# RFC 3526, group 14: 2 generates a group modulo this prime of 2048 bits. Private keys have 256.
PRIME = int('FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22'
            '514A08798E3404DDEF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6'
            'F44C42E9A637ED6B0BFF5CB6F406B7EDEE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3D'
            'C2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F83655D23DCA3AD961C62F356208552BB'
            '9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3BE39E772C180E8603'
            '9B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510'
            '15728E5A8AACAA68FFFFFFFFFFFFFFFF', 16)
FIELD = 2**521 - 1      # the prime of Shamir's field, above every secret
KEY, SHARE = 512, 131   # hexadecimal digits of a public key, of a share: always as many

def agree(private, public):
    """The 32 bytes that two key pairs have in common: Diffie-Hellman, hashed (Bonawitz et al.,
    Section 3.2). Raises ValueError for a public key out of range."""
    if not 1 < public < PRIME - 1:
        raise ValueError('a public key is out of range')
    return hashlib.sha256(pow(public, private, PRIME).to_bytes(256, 'big')).digest()

def expand(secret, d):
    """A secret's mask, (d,) uint32, by SHAKE-256 (Section 3.4)."""
    return np.frombuffer(hashlib.shake_256(secret).digest(4 * d), '<u4')

def split(secret, xs, threshold):
    """Shares {x: y} of a whole number below FIELD, of which `threshold` give it and fewer nothing
    (Shamir 1979; Section 3.1). xs: not 0."""
    polynomial = [secret] + [secrets.randbelow(FIELD) for _ in range(threshold - 1)]
    def value(x):
        return functools.reduce(lambda y, c: (y * x + c) % FIELD, reversed(polynomial), 0)
    return {x: value(x) for x in xs}

def join(shares):
    """The secret that split made shares {x: y} of: the value at 0 of the polynomial through
    them."""
    secret = 0
    for x, y in shares.items():
        others = [u for u in shares if u != x]
        inverse = pow(math.prod(u - x for u in others), -1, FIELD)
        secret += y * math.prod(others) * inverse
    return secret % FIELD

def seal(key, text):
    """text, bytes, encrypted by XOR with SHAKE-256 of a key used once, and authenticated by
    HMAC-SHA-256 (Section 3.3)."""
    body = bytes(a ^ b for a, b in zip(text, hashlib.shake_256(b'seal' + key).digest(len(text))))
    return body + hmac.digest(b'tag' + key, body, 'sha256')

def unseal(key, sealed):
    """What seal sealed. Raises ValueError if it was altered."""
    body, tag = sealed[:-32], sealed[-32:]
    if not hmac.compare_digest(tag, hmac.digest(b'tag' + key, body, 'sha256')):
        raise ValueError('a sealed share was altered')
    return bytes(a ^ b for a, b in zip(body, hashlib.shake_256(b'seal' + key).digest(len(body))))

def written(number, digits):
    """A whole number in hexadecimal, with so many digits whatever it is."""
    return f'{number:0{digits}x}'

def read(text, digits):
    """The number that `written` wrote. Raises ValueError for anything else."""
    if type(text) is not str or len(text) != digits or set(text) - set('0123456789abcdef'):
        raise ValueError('a number is not written in hexadecimal, or has another length')
    return int(text, 16)

def keys_of(answer):
    """The two public keys of an answer. Raises ValueError for anything else."""
    keys = [read(text, KEY) for text in json.loads(answer)]
    if len(keys) != 2 or not all(1 < key < PRIME - 1 for key in keys):
        raise ValueError('not two public keys')
    return keys

def about(answer, ks):
    """{k: value} of an answer about the clients ks. Raises ValueError for any others."""
    found = {int(v): value for v, value in json.loads(answer).items()}
    if set(found) != set(ks):
        raise ValueError('it is about other clients')
    return found

def sealed_of(answer, ks):
    """{k: hex} of an answer's sealed shares for the clients ks. Raises ValueError for anything
    else."""
    sealed = about(answer, ks)
    length = 2 * (len(json.dumps(['0' * SHARE] * 2)) + 32)
    for text in sealed.values():
        if type(text) is not str or len(text) != length:
            raise ValueError('a sealed share has another length')
        bytes.fromhex(text)
    return sealed

def shares_of(answer, ks):
    """{k: share} of an answer about the clients ks. Raises ValueError for anything else."""
    shares = {v: read(text, SHARE) for v, text in about(answer, ks).items()}
    if not all(share < FIELD for share in shares.values()):
        raise ValueError('a share is out of range')
    return shares

def vector(answer, d):
    """The masked vector of an answer, (d,) uint32. Raises ValueError for another length."""
    if len(answer) != 4 * d:
        raise ValueError('a masked vector has another length')
    return np.frombuffer(answer, '<u4')

def term(v, R, bits, weight, draw):
    """What a client adds to a sum modulo 2^32, (d,) uint32: weight times the level to which each of
    v, (d,), is rounded at random, of 2^bits evenly from -R to R, to which v is clamped; each level
    times 2 R / (2^bits - 1), minus R, is v on average (Konecny et al. 2016, Section 3). Raises
    ValueError if v is not finite."""
    v, top = np.asarray(v, np.float64), 2**bits - 1
    if not np.isfinite(v).all():
        raise ValueError('it holds NaN or infinity')
    x = (v.clip(-R, R) + R) * (top / (2 * R))
    return np.minimum(np.floor(x + draw.random(len(x))), top).astype(np.uint32) * np.uint32(weight)
