"""The wire: what crosses is bytes, is counted, and what cannot be read is left out."""
import math
import re
import struct
import tracemalloc
import weakref
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import beyond
import compress
import fedavg
import options
from beyond.wire import Feedback, Wire
from test_fedavg import data, final, near, read_log, run, same, weights     # noqa: F401

FP32 = 26 + 4 * 199210          # the payload of the 2NN

class Still:
    """A server with weights w and ten clients of one example each, which does not train."""
    Update, Round, rank, K = fedavg.Update, fedavg.Round, 0, 10
    receive, end = fedavg.Server.receive, fedavg.Server.end

    def __init__(self, args):
        self.args, self.n_k, self.history = args, np.ones(10, int), []

    def send(self, w, S_t, r):
        return w

def server(w, *rooms, **more):
    """A Still server with the rooms, for weights like w and the flags in more."""
    args = options.args_parser([], beyond.rooms())
    vars(args).update(more)
    class Weights(Still):
        def __init__(self, args):
            super().__init__(args)
            learns = [(name, torch.nn.Parameter(v)) for name, v in w.items()
                      if v.is_floating_point()]
            self.w, self.net = w, SimpleNamespace(state_dict=lambda: w,
                                                  named_parameters=lambda **_: learns)
    return type('Server', (*rooms, beyond.Room, Weights), {})(args)

def sent(made, updates, t=1):
    """(what arrives of the updates {k: (w_k, loss)} in round t, the round)."""
    r = fedavg.Round(t)
    r.S_t = dict.fromkeys(updates, 1)
    w = made.send(made.w, r.S_t, r)
    terms = (fedavg.Update(k, w_k, made.n_k[k], loss) for k, (w_k, loss) in updates.items())
    return list(made.receive(terms, w, r)), r

@pytest.mark.parametrize('bits', [None, *range(1, 17)])
@pytest.mark.parametrize('d', [0, 1, 5, 1000])
def test_decode_gives_back_what_encode_took(bits, d):
    v = torch.randn(d, generator=torch.Generator().manual_seed(d))
    payload = compress.encode(v, bits)
    assert len(payload) == 26 + math.ceil(d * (bits or 32) / 8)
    step = (v.max() - v.min()) / (2 ** bits - 1) if bits and d else torch.tensor(0.0)
    assert ((compress.decode(payload, d) - v).abs() <= step * 1.001 + 1e-7 * bool(bits)).all()
    constant = torch.full((d,), 0.7)
    assert torch.equal(compress.decode(compress.encode(constant, bits), d), constant)

@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
def test_quantization_is_unbiased(bits):
    v = torch.tensor([-1.0, -0.999, -0.3, 0.0, 0.123, 0.77, 1.0])
    draw, step = np.random.default_rng(0), 2 / (2 ** bits - 1)
    decoded = [compress.decode(compress.encode(v, bits, draw=draw), 7) for _ in range(4000)]
    mean = torch.stack(decoded).double().mean(0)
    assert ((mean - v).abs() < 5 * step / 2 / 4000 ** 0.5).all()
    assert mean[0] == -1 and mean[-1] == pytest.approx(1, abs=1e-5)

@pytest.mark.parametrize('bits', [None, 1, 4])
def test_topk_keeps_the_largest_under_the_shorter_index_coding(bits):
    v = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    # Bytes of the indices: 10 bits each, or a bitmap.
    for f, where in ((0.01, 13), (0.05, 63), (0.5, 125), (1e-9, 2), (1, 0)):
        payload, n = compress.encode(v, bits, f), max(round(f * 1000), 1)
        assert len(payload) == 26 + where + math.ceil(n * (bits or 32) / 8)
        decoded, largest = compress.decode(payload, 1000), v.abs().topk(n).indices
        assert set(decoded.nonzero().flatten().tolist()) <= set(largest.tolist())
        if not bits:
            assert torch.equal(decoded[largest], v[largest])

def signed(body):
    return body + struct.pack('<I', zlib.crc32(body))

def damages(whole, draw):
    """A payload damaged in seven ways; the last but three have a right checksum."""
    at, cut = draw.integers(len(whole), size=2)
    flipped, header, body = bytearray(whole), bytearray(whole[:-4]), bytearray(whole[:-4])
    flipped[at] ^= 1 << draw.integers(8)
    header[draw.integers(26)] = draw.integers(256)
    body[draw.integers(22, len(body))] = draw.integers(256)
    junk = draw.bytes(draw.integers(40))
    return (whole[:cut], bytes(flipped), whole + junk + b'0', junk, signed(bytes(header)),
            signed(bytes(body)), whole[cut:] + whole[:cut])

def test_damaged_and_foreign_bytes_raise_valueerror_and_nothing_else():
    draw = np.random.default_rng(0)
    v, refused = torch.randn(300, generator=torch.Generator().manual_seed(0)), 0
    wholes = [compress.encode(v, bits, f) for bits in (None, 1, 5, 8) for f in (None, 0.02, 0.5)]
    for i in range(6000):
        whole = wholes[i % len(wholes)]
        damaged = damages(whole, draw)[i % 7]
        try:
            decoded = compress.decode(damaged, 300)
        except ValueError as e:
            refused += bool(str(e))
            continue
        assert decoded.shape == (300,) and torch.isfinite(decoded).all()
        assert i % 7 > 3 or damaged == whole
    assert refused > 4500
    for d in (0, 299, 301, 2**32):
        with pytest.raises(ValueError, match=f'not {d}'):
            compress.decode(wholes[0], d)

def test_a_payload_that_claims_to_be_huge_takes_no_memory():
    huge = b'FAvg' + bytes([32, 0]) + struct.pack('<IIff', 2**32 - 1, 2**32 - 1, 0, 0)
    tracemalloc.start()
    with pytest.raises(ValueError, match='bytes, not'):
        compress.decode(signed(huge), 2**32 - 1)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()

@pytest.mark.parametrize('v, bits', [
    *(([1.0, bad, 2.0], bits) for bad in (math.nan, math.inf, -math.inf) for bits in (None, 8)),
    ([3e38, -3e38, 1.0], 8)])
def test_what_is_not_finite_is_refused(v, bits):
    with pytest.raises(ValueError, match='NaN'):
        compress.decode(compress.encode(torch.tensor(v), bits), 3)

def test_encode_refuses_settings_that_do_not_exist():
    for more in (dict(quantize=0), dict(quantize=17), dict(quantize=8.0), dict(topk=0),
                 dict(topk=1.5)):
        with pytest.raises(ValueError):
            compress.encode(torch.ones(3), **more)
    for update in (torch.ones(3, 2), torch.ones(3, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match='flat'):
            compress.encode(update)
    payload = compress.encode(torch.ones(3), np.int64(8))
    assert compress.decode(payload, np.int64(3)).tolist() == [1, 1, 1]


def test_lost_clients_are_renormalised_and_counted(capsys):
    w = {'v': torch.tensor([1.0]), 'i': torch.tensor(3)}
    values = (2.0, 0.5), (math.nan, 0.1), (6.0, 1.5), (math.inf, 0.1)
    updates = {k: ({'v': torch.tensor([v]), 'i': torch.tensor(3)}, loss)
               for k, (v, loss) in enumerate(values)}
    for bits, tolerance in ((None, 0), (16, 1e-6)):
        made = server(w, Wire, quantize=bits)
        made.n_k = [1, 9, 3, 9]
        arrived, r = sent(made, updates)
        average = fedavg.FedAvg(arrived)
        assert average['v'].item() == pytest.approx(5, abs=tolerance)       # (1*2 + 3*6) / 4
        assert average['i'] == 3
        tally = dict(r.tally)
        assert tally.pop('down_bytes') == 4 * 30
        assert tally == {'sent': 4, 'clients': 2, 'rejected': 2, 'm_t': 4, 'loss': 5.0,
                         'up_bytes': 4 * len(compress.encode(torch.ones(1), bits))}
        assert 'client 1 is left out: it holds NaN' in capsys.readouterr().out

def test_a_round_without_survivors_ends_the_run_and_keeps_w(run, tmp_path, capsys):    # noqa: F811
    run(f'--checkpoint {tmp_path}/c.pt --epochs 1 --lr 1e-30')
    good = weights(tmp_path / 'c.pt')
    with pytest.raises(SystemExit) as e:
        run(f'--checkpoint {tmp_path}/d.pt --lr 1e9 --local_ep 5')
    assert e.value.code == 1 and 'lower --lr' in capsys.readouterr().err
    assert same(weights(tmp_path / 'd.pt'), good)       # w_0; a step of 1e-30 changes no bit of it

def test_a_loss_beyond_fp32_is_logged_as_it_is(run):    # noqa: F811
    class Infinite:
        def train(self, w, S_t, r):
            for u in super().train(w, S_t, r):
                yield u._replace(loss=math.inf)
    assert [row['train_loss'] for row in run('--epochs 1', Infinite)] == [math.inf]

def test_a_damaged_payload_is_left_out_of_its_round_and_counted(run, capsys):   # noqa: F811
    class Damaged:
        def transmit(self, payload, x, k, r):
            payload = bytearray(super().transmit(payload, x, k, r))
            if r.t == 1 and k == min(r.S_t):
                payload[1000] ^= 1
            return bytes(payload)
    history = run('--quantize 8 --epochs 2', Damaged)
    assert [(row['clients'], row['rejected']) for row in history] == [(2, 1), (3, 0)]
    assert history[0]['up_bytes'] == history[1]['up_bytes']
    assert 'its checksum is wrong' in capsys.readouterr().out

def test_what_a_client_does_not_send_it_adds_next_time():
    w = {'v': torch.zeros(4)}
    def round_of(made, v):
        arrived, r = sent(made, {7: ({'v': torch.tensor(v)}, 0.0)})
        made.end(w, {}, r)
        return [u.w['v'].tolist() for u in arrived]
    made = server(w, Feedback, Wire, topk=0.25)
    assert round_of(made, [3.0, 2.0, 0.5, 0.0]) == [[3, 0, 0, 0]]
    assert made.residuals[7].tolist() == [0, 2, 0.5, 0]
    assert round_of(made, [0.0, 1.0, 0.5, 2.5]) == [[0, 3, 0, 0]]
    assert made.residuals[7].tolist() == [0, 0, 1, 2.5]
    assert round_of(made, [math.nan] * 4) == [] and made.residuals[7].tolist() == [0, 0, 1, 2.5]
    made = server(w, Wire, topk=0.25)
    assert round_of(made, [3.0, 2.0, 0.5, 0.0]) == [[3, 0, 0, 0]]
    assert round_of(made, [0.0, 1.0, 0.5, 2.5]) == [[0, 0, 0, 2.5]]
    made = server(w, Feedback, Wire, topk=0.75, quantize=1)     # rounding is a residual too
    arrived = round_of(made, [1.0, 0.4, 0.3, 0.2])[0]
    both = torch.tensor(arrived) + made.residuals[7]
    assert arrived[3] == 0 and both.tolist() == pytest.approx([1, 0.4, 0.3, 0.2])

def test_a_round_that_is_broken_off_leaves_no_residual():
    w = {'v': torch.zeros(4)}
    made = server(w, Feedback, Wire, topk=0.25)
    sent(made, {7: ({'v': torch.tensor([3.0, 2.0, 0.5, 0.0])}, 0.0)})
    assert made.residuals == {}

def test_each_round_rounds_anew():
    w, v = {'v': torch.zeros(100)}, {'v': torch.linspace(-1, 1, 100)}
    made = server(w, Wire, quantize=1)
    a, b, again, other = (sent(made, {k: (v, 0.0)}, t)[0][0].w['v']
                          for k, t in ((7, 1), (7, 2), (7, 1), (8, 1)))
    assert torch.equal(a, again) and not torch.equal(a, b) and not torch.equal(a, other)

def test_float_buffers_travel_with_the_weights():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).half()
    w, w_k = net.state_dict(), {name: v + 1 for name, v in net.state_dict().items()}
    arrived, r = sent(server(w, Wire), {0: (w_k, 0.0)})
    got = dict(arrived[0].w)
    assert got.pop('1.num_batches_tracked') == 0 and w_k.pop('1.num_batches_tracked') == 1
    assert same(got, w_k) and all(got[name].dtype == v.dtype for name, v in w_k.items())
    assert r.tally['up_bytes'] == 26 + 4 * 14

def test_bytes_in_the_log_are_those_of_the_payloads(run, tmp_path, capsys):     # noqa: F811
    up = []
    class Watched:
        def transmit(self, payload, x, k, r):
            up.append(len(payload))
            return super().transmit(payload, x, k, r)
    words = f'--quantize 4 --topk 0.1 --csv {tmp_path}/l.csv --target 1 --lr 0.01'
    history = run(words, Watched)
    sums = [sum(up[i:i + 3]) for i in (0, 3, 6)]
    assert len(up) == 9 and [row['up_bytes'] for row in history] == sums
    assert [int(row['up_bytes']) for row in read_log(tmp_path / 'l.csv')[1]] == sums
    assert {row['down_bytes'] for row in history} == {3 * FP32}
    line = (f'uploaded {sum(up) / 1e6:.2f} MB (fp32: {9 * FP32 / 1e6:.2f} MB, '
            f'{9 * FP32 / sum(up):.1f} times that)')
    assert line in capsys.readouterr().out

def test_megabytes_to_target_are_interpolated_as_the_rounds_are(run, capsys):   # noqa: F811
    history = run('--target 0.5 --epochs 60 --local_ep 5 --frac 1')
    out = capsys.readouterr().out
    megabytes = float(re.search(r'([\d.]+) MB uploaded by the target', out)[1])
    rounds = fedavg.rounds_to(0.5, [row['test_acc'] for row in history])
    assert megabytes == pytest.approx(rounds * 10 * FP32 / 1e6, rel=1e-3)

def test_all_of_topk_is_all_and_sixteen_bits_are_nearly_fp32(run):  # noqa: F811
    flat = [torch.cat([v.flatten() for v in final(run, f'--epochs 2 {words}').values()])
            for words in ('', '--topk 1', '--quantize 16', '--quantize 8')]
    far = [((v - flat[0]).norm() / flat[0].norm()).item() for v in flat[1:]]
    assert far[0] < 1e-6 and 1e-7 < far[1] < 1e-4 and far[1] * 50 < far[2] < 1e-2

def test_a_smaller_wire_is_the_same_in_both_engines(run):   # noqa: F811
    words = '--quantize 12 --topk 0.3 --prune 0.5 --prune_end 2 --engine'
    assert near(final(run, f'{words} loop'), final(run, f'{words} stacked'), 1e-3)

class Counted(dict):
    """A state_dict of which `alive` exist."""
    references = []
    def __init__(self, w):
        super().__init__(w)
        Counted.references.append(weakref.ref(self))

    @classmethod
    def alive(cls):
        return sum(reference() is not None for reference in cls.references)

def test_few_models_are_in_memory_at_a_time(run):
    class Watched:
        def train(self, w, S_t, r):
            for u in super().train(w, S_t, r):
                assert Counted.alive() < 5
                yield u._replace(w=Counted(u.w))
    assert len(run('--frac 1 --epochs 2', Watched)) == 2 and len(Counted.references) == 20
    Counted.references.clear()
    def updates():
        for _ in range(50):
            assert Counted.alive() < 5
            yield Counted({'v': torch.ones(2)})
    assert fedavg.FedAvg(updates())['v'].sum() == 2

