"""An update as bytes, and back; smaller by quantization and top-k; pruning.

    payload = encode(update, quantize=8)        # bytes, a quarter of fp32's
    update = decode(payload, len(update))       # or ValueError: nothing else, whatever the bytes

    Konecny et al. 2016 (arXiv 1610.05492), Section 3: probabilistic quantization
    Aji and Heafield 2017 (arXiv 1704.05021), Stich et al. 2018 (arXiv 1809.07599): top-k
    Zhu and Gupta 2017 (arXiv 1710.01878), Section 3: pruning on a cubic schedule

An update is a flat vector: this file knows no net and no data set. It needs numpy and torch.
"""
import struct
import zlib

import numpy as np
import torch

################################ Bytes: encode and decode ################################

# Little-endian: magic, bits per value, index coding, total values (d), values kept (n), the lowest
# level and the step between levels; then the indices, the values, and the CRC-32 of all of it.
HEADER, CRC = struct.Struct('<4sBBIIff'), struct.Struct('<I')
MAGIC = b'FAvg'
ALL, BITMAP, INDICES = range(3)         # index codings

def encode(update, quantize=None, topk=None, draw=None):
    """The bytes of a float vector: header, which values are kept, the values, a checksum.

    update: (d,) float tensor, d below 2^32. quantize: 1 to 16 bits a value, uniform over the range
    of the values kept, with stochastic rounding, which is unbiased (Konecny et al. 2016, Section
    3); None: fp32. topk: the fraction, (0, 1], of values kept, those of largest magnitude, at
    least one; the others are zero. draw: the NumPy generator of the rounding.
    Raises ValueError for other settings; NaN and infinity are left to decode.
    """
    check(update, quantize, topk)
    v, d = update.detach().float().cpu(), len(update)
    n = d if topk is None else min(max(round(topk * d), 1), d)
    coding, where, low, step = ALL, b'', 0.0, 0.0
    if n < d:
        kept = v.abs().topk(n, sorted=False).indices.sort().values
        coding, where = support(kept.numpy(), d)
        v = v[kept]
    if quantize:
        codes, low, step = levels(v.numpy(), quantize, draw or np.random.default_rng())
        values = pack(codes, quantize)
    else:
        values = v.numpy().astype('<f4').tobytes()
    body = HEADER.pack(MAGIC, quantize or 32, coding, d, n, low, step) + where + values
    return body + CRC.pack(zlib.crc32(body))

def check(update, quantize, topk):
    """Raises ValueError for what encode cannot encode."""
    if not torch.is_floating_point(update) or update.dim() != 1:
        raise ValueError('the update is not a flat float tensor, (d,)')
    whole = isinstance(quantize, (int, np.integer))
    if quantize is not None and not (whole and 1 <= quantize <= 16):
        raise ValueError(f'quantize {quantize!r}: a whole number of 1 to 16 bits, or None')
    if topk is not None and not 0 < topk <= 1:
        raise ValueError(f'topk {topk}: a fraction above 0 and at most 1, or None')
    if len(update) >= 2**32:
        raise ValueError(f'{len(update)} values: fewer than 2^32')

def decode(payload, d):
    """The vector, (d,) float32, that encode made payload from. Raises ValueError with the reason
    if payload does not encode d values.

    Nothing is allocated before the payload's length is known to be that of d values or fewer.
    """
    d = int(d)
    bits, coding, n, low, step, start, end = parsed(payload, d)
    if bits == 32:
        v = np.frombuffer(payload, '<f4', n, start).astype(np.float32)
    else:
        codes = unpack(payload[start:end], n, bits).astype(np.float32)
        with np.errstate(all='ignore'):
            v = np.float32(low) + np.float32(step) * codes
    if not np.isfinite(v).all():
        raise ValueError('it holds NaN or infinity, or spans more than fp32 can')
    if coding == ALL:
        return torch.from_numpy(v)
    where = payload[HEADER.size:start]
    if coding == BITMAP:
        kept = np.flatnonzero(unpack(where, d, 1))
    else:
        kept = unpack(where, n, width(d))
    unordered = (np.diff(kept.astype(np.int64)) <= 0).any()
    if len(kept) != n or (n and kept[-1] >= d) or unordered:
        raise ValueError('its indices are out of order or out of range')
    update = np.zeros(d, np.float32)
    update[kept] = v
    return torch.from_numpy(update)

def parsed(payload, d):
    """(bits, coding, n, low, step, start and end of the values) of a payload of d values, whose
    header, length and checksum are right. Raises ValueError if they are not."""
    if len(payload) < HEADER.size + CRC.size:
        raise ValueError(f'{len(payload)} bytes are too few for a header')
    magic, bits, coding, given, n, low, step = HEADER.unpack_from(payload)
    if magic != MAGIC:
        raise ValueError('it is not an encoded update')
    if given != d:
        raise ValueError(f'it has {given} values, not {d}')
    known = bits in (*range(1, 17), 32) and coding <= INDICES
    if not known or n > d or (coding == ALL and n < d):
        raise ValueError('its header contradicts itself')
    start = HEADER.size + {ALL: 0, BITMAP: size(d, 1), INDICES: size(n, width(d))}[coding]
    end = start + size(n, bits)
    if len(payload) != end + CRC.size:
        raise ValueError(f'it has {len(payload)} bytes, not {end + CRC.size}')
    if CRC.unpack_from(payload, end)[0] != zlib.crc32(memoryview(payload)[:end]):
        raise ValueError('its checksum is wrong')
    return bits, coding, n, low, step, start, end

def levels(v, bits, draw):
    """(codes, (n,) uint16, low, step): each of v, (n,) float32, rounded at random to one of the
    two nearest of 2^bits levels from the lowest value to the highest, so that low + step code is v
    on average."""
    if not len(v):
        return np.zeros(0, np.uint16), 0.0, 0.0
    with np.errstate(all='ignore'):
        low, span = v.min(), v.max() - v.min()
    if not np.isfinite(span):
        return np.zeros(len(v), np.uint16), np.nan, np.nan      # for decode to find
    step = span / np.float32(2**bits - 1)
    x = (v - low) / (step or np.float32(1))
    floor = np.floor(x)
    x -= floor                                                  # above the lower level, in [0, 1)
    floor += draw.random(len(v), np.float32) < x
    return np.minimum(floor, 2**bits - 1).astype(np.uint16), low, step

def support(kept, d):
    """(coding, bytes) for the ascending indices kept of d: a bitmap or packed indices, whichever
    is smaller."""
    if size(d, 1) > size(len(kept), width(d)):
        return INDICES, pack(kept, width(d))
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
    """The smallest NumPy type that holds `bits` bits, and how many it has."""
    room = next(room for room in (8, 16, 32) if bits <= room)
    return f'<u{room // 8}', room

def pack(codes, bits):
    """Whole numbers below 2^bits, (n,), as bytes: `bits` of each, lowest first, without gaps."""
    kind, room = cell(bits)
    codes = codes.astype(kind)
    if bits < room:
        octets = codes.view(np.uint8).reshape(-1, room // 8)
        each = np.unpackbits(octets, axis=1, count=bits, bitorder='little')     # (n, bits)
        codes = np.packbits(each, bitorder='little')
    return codes.tobytes()

def unpack(packed, n, bits):
    """pack's codes, (n,). Raises ValueError if the bits after the last code are not zero."""
    kind, room = cell(bits)
    if bits == room:
        return np.frombuffer(packed, kind, n)
    each = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder='little')
    if each[n * bits:].any():
        raise ValueError('its padding is not zero')
    codes = np.zeros(n, kind)
    for b in range(bits):
        codes |= each[b:n * bits:bits].astype(kind) << b
    return codes

######################################## Pruning ########################################

def sparsity(t, s, begin, end):
    """The fraction pruned in round t: none up to round `begin`, s from `end` on, a cubic between
    (Zhu and Gupta 2017, Equation 1). Raises ValueError if `end` does not come after `begin`."""
    if not begin < end:
        raise ValueError(f'{begin} to {end}: a schedule ends after it begins')
    return s * (1 - (1 - min(max((t - begin) / (end - begin), 0), 1)) ** 3)

def prune(v, s):
    """The mask of the weights v, (d,) bool, that remain after dropping the round(s d) smallest in
    magnitude. Of equal magnitudes the first are dropped. Raises ValueError for other s than
    0 to 1."""
    if not 0 <= s <= 1:
        raise ValueError(f'{s}: the fraction that is pruned is between 0 and 1')
    n, v = round(s * len(v)), v.detach().abs()
    if n == 0:
        return torch.ones(len(v), dtype=torch.bool, device=v.device)
    threshold = v.kthvalue(n).values
    stay, ties = v > threshold, (v == threshold).nonzero().flatten()
    pruned = n + len(ties) - int((~stay).sum())         # of the ties
    stay[ties[pruned:]] = True
    return stay
