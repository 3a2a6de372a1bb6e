"""Widths: a narrow client trains the leading part of the net, and that part alone is averaged.

    python -m pytest -q beyond/test_widths.py
"""
import copy
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import beyond
import fedavg
import models
import sampling
from beyond.engines import Stacked, memory
from beyond.widths import Widths, narrowed
from test_fedavg import data, final, refused, run, same      # noqa: F401

def test_a_narrow_net_has_the_leading_units_of_every_hidden_layer():
    args = SimpleNamespace(model='cnn', num_channels=1, num_classes=10, separable=1)
    net = models.build(args).eval()
    thin, w = narrowed(net, 0.3), net.state_dict()
    shapes = {'conv1.weight': (3, 1, 5, 5), 'conv2.0.weight': (3, 1, 5, 5),
              'conv2.1.weight': (6, 3, 1, 1), 'fc1.weight': (15, 96), 'fc2.weight': (10, 15)}
    for name, v in thin.state_dict().items():
        assert name.endswith('bias') or v.shape == shapes[name]
        assert torch.equal(v, w[name][tuple(map(slice, v.shape))])
    # Units that give 0 might as well not be there.
    for name in ('conv1', 'conv2.0', 'conv2.1', 'fc1'):
        for v in net.get_submodule(name).parameters():
            v.data[len(thin.get_submodule(name).bias):] = 0
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(thin(x), net(x))

class Averager:
    """A server with a net of two hidden units, and clients whose updates are given."""
    all_sum = staticmethod(lambda tensors: None)

    def __init__(self, args):
        self.args = args
        self.net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
        self.test_set = TensorDataset(torch.zeros(2, 1))
        values = ([[1.0], [2.0]], [3.0, 4.0], [[5.0, 6.0]], [7.0])
        self.w = dict(zip(self.net.state_dict(), map(torch.tensor, values)))

def test_each_weight_is_averaged_over_those_who_hold_it():
    server = type('Server', (Widths, beyond.Room, Averager), {})(
        SimpleNamespace(widths=(1.0, 0.5)))
    def update(k, n, value):
        return fedavg.Update(k, {name: torch.full_like(v, value) for name, v in server.w.items()},
                             n, 0.0)
    # Clients 0 and 2 hold all values, 1 and 3 those of the first hidden unit.
    updates = [update(0, 1, 0.0), update(1, 3, 5.0), update(2, 1, 2.0)]
    w = server.average(iter(updates), server.w, fedavg.Round(1))
    values = [v.tolist() for v in w.values()]
    held, rest = (1 * 0 + 3 * 5 + 1 * 2) / 5, (1 * 0 + 1 * 2) / 2
    assert np.allclose(np.concatenate([np.ravel(v) for v in values]),
                       [held, rest, held, rest, held, rest, held])
    w = server.average(iter([update(1, 3, 5.0), update(3, 1, 9.0)]), server.w, fedavg.Round(1))
    assert [v.tolist() for v in w.values()] == [[[6], [2]], [6, 4], [[6, 6]], [6]]
    assert same(server.average(iter([]), server.w, fedavg.Round(1)), server.w)

def test_a_narrow_client_trains_its_part_and_leaves_the_rest(data):     # noqa: F811
    server = fedavg.assembled(
        f'--data_dir {data} --num_users 10 --widths 1,0.5 --engine loop --gpu -1'.split(), ())
    server.prepare()
    w, r = copy.deepcopy(server.w), fedavg.Round(1)
    r.S_t = {0: 1, 3: 1}
    made = {u.k: u.w for u in server.train(w, r.S_t, r)}
    for k, net in ((0, server.net), (3, narrowed(server.net, 0.5))):
        net.load_state_dict({name: w[name][tuple(map(slice, v.shape))]
                             for name, v in net.state_dict().items()})
        sampling.seed_torch(1, 'train', 1, k)
        client = fedavg.LocalUpdate(server.args, server.train_set, server.parts[k])
        expected, _ = client.train(net)
        for name, v in w.items():
            at = tuple(map(slice, expected[name].shape))
            assert torch.equal(made[k][name][at], expected[name])
            assert not torch.equal(expected[name], v[at])
            rest = torch.ones_like(v, dtype=torch.bool)
            rest[at] = False
            assert torch.equal(made[k][name][rest], v[rest])

@pytest.mark.parametrize('engine', ['loop', 'stacked'])
def test_width_one_is_plain_fedavg_bit_for_bit_and_half_sends_less(run, engine):        # noqa: F811
    plain, one = (final(run, f'--engine {engine} {words}') for words in ('', '--widths 1'))
    assert same(plain, one)
    # Clients 0 to 8 hold a half, and they are all that is sampled.
    half = f'--engine {engine} --widths {"0.5," * 9}1 --epochs 1 --seed 4'
    assert 9 not in sampling.select(10, 0.3, sampling.rng(4, 'select', 1))
    size = 784 * 100 + 100 + 100 * 100 + 100 + 100 * 10 + 10
    row = run(half)[0]
    assert row['up_bytes'] == row['down_bytes'] == 3 * (26 + 4 * size)
    first, w = (final(run, words)['fc2.weight']
                for words in ('--lr 1e-30 --epochs 1 --seed 4', half))
    assert torch.equal(w[:, 100:], first[:, 100:]) and torch.equal(w[100:], first[100:])
    assert (w != first)[:100, :100].float().mean() > 0.5

def test_widths_go_with_a_smaller_wire(run):        # noqa: F811
    fp32 = run('--widths 1,0.5,0.25 --frac 1')
    history = run('--widths 1,0.5,0.25 --frac 1 --quantize 8 --topk 0.5 --prune 0.5')
    assert history[-1]['clients'] == 10 and history[-1]['up_bytes'] < fp32[-1]['up_bytes'] / 8

def test_a_net_of_other_layers_cannot_be_narrow(run, monkeypatch, capsys):      # noqa: F811
    class Normed(models.TwoNN):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.norm = nn.LayerNorm(200)
    monkeypatch.setattr(models, 'TwoNN', Normed)
    with pytest.raises(SystemExit):
        run('--widths 1,0.5')
    assert 'a layer of 2nn, LayerNorm, cannot be narrowed' in capsys.readouterr().err

class Beside(nn.Module):
    """Two layers beside each other."""
    def __init__(self, args):
        super().__init__()
        self.left, self.right = nn.Linear(784, 10), nn.Linear(784, 10)

    def forward(self, x):
        return self.left(x.flatten(1)) + self.right(x.flatten(1))

class Joined(nn.Module):
    """Two layers beside each other whose outputs a third one takes: shapes fit in a narrow net."""
    def __init__(self, args):
        super().__init__()
        self.first = nn.Linear(784, 20)
        self.left, self.right = nn.Linear(20, 20), nn.Linear(20, 20)
        self.last = nn.Linear(40, 10)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.last(torch.cat([self.left(x), self.right(x)], 1))

def test_layers_beside_each_other_cannot_be_narrow(refused, monkeypatch):        # noqa: F811
    words = '--widths 1,0.5 --model beyond.test_widths:Beside --num_users 2'.split()
    assert 'follow one another' in refused(words)
    joined = ['beyond.test_widths:Joined' if 'Beside' in word else word for word in words]
    assert 'its output is not that of the units' in refused(joined)
    def stack_size(self, net, B):
        """As on a GPU: it runs the nets."""
        memory(net, self.train_set.tensors[0][:1], B)
        return 1
    monkeypatch.setattr(Stacked, 'stack_size', stack_size)
    assert 'follow one another' in refused([*words, '--engine', 'stacked'])

def test_what_cannot_be_narrow_is_refused(refused, monkeypatch):        # noqa: F811
    monkeypatch.setattr(sampling, 'load', lambda *_: pytest.fail('data were read'))
    for words, said in (
            ('--widths 1,0', '--widths'), ('--widths 1,2', 'at most 1'),
            ('--widths 0.5', 'put a 1'), ('--widths half', 'as 1,0.5'),
            ('--widths 1,0.5 --secagg 1', '--secagg'),
            ('--widths 1,0.5 --dp user --clip 1 --noise 1', '--dp user'),
            ('--widths 1,0.5 --cut 1', '--cut'), ('--separable 1', '--model cnn')):
        assert said in refused(words.split())

def test_nothing_holds_a_server_whose_run_is_done(run):     # noqa: F811
    servers = []
    class Seen:
        def prepare(self):
            super().prepare()
            servers.append(weakref.ref(self))
    run('--widths 1,0.5 --epochs 1', Seen)
    gc.collect()
    assert servers[0]() is None
