"""Algorithm 1 as an executable specification: hand-worked numbers, torch itself as the oracle, the program as a user runs it.

    python -m pytest -q                                        # offline, on small digits that the tests draw themselves
    FEDAVG_DATA=/folder/that/holds/MNIST python -m pytest -q   # on the real MNIST too
"""
import ast
import contextlib
import copy
import csv
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import weakref
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from torchvision import datasets

import compress
import fedavg
import models
import options
import sampling

HERE = pathlib.Path(__file__).parent
MODULES = {'options.py': 'import options; assert options.args_parser([]).num_users == 100',
           'sampling.py': 'import sampling; assert len(sampling.mnist_iid(range(50), 7)[6]) == 7',
           'models.py': 'import models; models.MLP(784, 200, 10)',
           'compress.py': 'import compress, torch; compress.decode(compress.encode(torch.ones(3), 8, 0.5), 3)'}

#############################################
#                  Helpers                  #
#############################################

def write_idx(path, array):
    """A uint8 array as an IDX file, the format of MNIST's own files."""
    path.write_bytes(bytes((0, 0, 8, array.ndim)) + struct.pack(f'>{array.ndim}i', *array.shape) + array.tobytes())

def write_mnist(root, kind='MNIST', train=300, test=100):
    """A small data set of drawn digits under root, in the files that torchvision reads."""
    raw = root / kind / 'raw'
    raw.mkdir(parents=True)
    for name, n in (('train', train), ('t10k', test)):
        x, y = sampling.synthetic(n, 0, name).tensors
        write_idx(raw / f'{name}-images-idx3-ubyte', ((x[:, 0] + 1) * 60).clamp(0, 255).byte().numpy())
        write_idx(raw / f'{name}-labels-idx1-ubyte', y.byte().numpy())
    return str(root)

@pytest.fixture(scope='session')
def data(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp('data'))

@pytest.fixture
def run(data):
    """main() on 300 small digits and 10 clients, in this process."""
    small = '--num_users 10 --frac 0.3 --local_ep 1 --epochs 3 --gpu -1'.split()
    return lambda words='': fedavg.main(['--data_dir', data, *small, *words.split()])

@pytest.fixture
def refused(data, capsys):
    """The one line on stderr with which main() refuses the flags in words."""
    def line(words):
        with pytest.raises(SystemExit) as e: fedavg.main(['--data_dir', data, '--gpu', '-1', *words])
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count('\n') == 1, err
        return err
    return line

def shell(words, **more):
    """The program as a process of its own, as a user starts it."""
    return subprocess.Popen([sys.executable, str(HERE / 'fedavg.py'), *words.split()], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **more)

def client_args(**more):
    return SimpleNamespace(**{'local_ep': 1, 'local_bs': 10, 'lr': 0.1, 'momentum': 0.0, 'device': 'cpu'} | more)

def toy(n=12, dim=5, seed=0):
    """n examples with dim features in 3 classes, and a linear net for them."""
    torch.manual_seed(seed)
    return TensorDataset(torch.randn(n, dim), torch.randint(3, (n,))), nn.Linear(dim, 3)

def wired(w, **more):
    """A Wire for weights like w, and an empty tally."""
    off = dict.fromkeys(('quantize', 'topk', 'prune', 'silo', 'verbose', 'dp', 'secagg', 'widths', 'cut', 'personal_layers'))
    wire = fedavg.Wire(SimpleNamespace(**off | dict(error_feedback=1, seed=1) | more), w, n_k=[1] * 10)
    wire.tally = dict.fromkeys(fedavg.TALLY, 0)
    return wire, wire.tally

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def weights(path):
    return torch.load(path, weights_only=True)['w']

#############################################
#          The average (a, g, l, m)         #
#############################################

def test_weighted_mean_equals_a_hand_calculation():
    w = [{'v': torch.tensor([1.0, 10.0])}, {'v': torch.tensor([4.0, -2.0])}, {'v': torch.tensor([0.0, 6.0])}]
    # (1*1 + 2*4 + 5*0) / 8 and (1*10 + 2*-2 + 5*6) / 8: m_t is the sum over these three, not over all clients
    assert torch.equal(fedavg.FedAvg(w, [1, 2, 5])['v'], torch.tensor([9 / 8, 36 / 8]))
    assert torch.equal(fedavg.FedAvg(zip(w, [1, 2, 5]))['v'], torch.tensor([9 / 8, 36 / 8]))
    assert torch.equal(fedavg.FedAvg(w)['v'], torch.tensor([5 / 3, 14 / 3]))

def test_average_refuses_what_has_no_mean():
    one = {'v': torch.ones(2)}
    assert fedavg.FedAvg([]) is None and fedavg.FedAvg([one], [0]) is None
    for w, n in (([one, {'u': torch.ones(2)}], [1, 1]), ([one, {'v': torch.ones(1)}], [1, 1]), ([one], [1, 2])):
        with pytest.raises(ValueError): fedavg.FedAvg(w, n)

def test_average_of_half_precision_does_not_overflow():
    w = [{'v': torch.full((3,), 200.0, dtype=torch.float16)}] * 2
    assert torch.equal(fedavg.FedAvg(w, [600, 600])['v'], w[0]['v'])

def test_float_buffers_are_averaged_and_integer_buffers_kept():
    a, b = nn.BatchNorm1d(2).state_dict(), nn.BatchNorm1d(2).state_dict()
    a['running_mean'], b['running_mean'] = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 4.0])
    a['num_batches_tracked'], b['num_batches_tracked'] = torch.tensor(7), torch.tensor(8)
    w = fedavg.FedAvg([a, b], [1, 3])
    assert torch.equal(w['running_mean'], torch.tensor([4.0, 3.5]))
    assert w['num_batches_tracked'] == 7 and w['num_batches_tracked'].dtype == torch.int64

def test_server_weights_never_alias_a_clients():
    one = {'v': torch.ones(2), 'i': torch.ones(2, dtype=torch.int64)}
    w = fedavg.FedAvg([one])
    for v in one.values(): v.zero_()
    assert w['v'].sum() == 2 and w['i'].sum() == 2
    dataset, net = toy()
    before = copy.deepcopy(net.state_dict())
    w_k, _ = fedavg.LocalUpdate(client_args(), dataset, range(12)).train(net)
    assert same(net.state_dict(), before) and not same(w_k, before)

def test_average_needs_few_models_not_m():
    seen = []
    class Watched(dict): pass
    def updates():
        for i in range(50):
            assert sum(ref() is not None for ref in seen) < 5
            w_k = Watched(v=torch.ones(2))
            seen.append(weakref.ref(w_k))
            yield w_k, 1
    assert fedavg.FedAvg(updates())['v'].sum() == 2

def test_a_run_holds_few_models_at_a_time(run, monkeypatch):
    seen, train = [], fedavg.LocalUpdate.train
    class Watched(dict): pass
    def watched(*words):
        assert sum(ref() is not None for ref in seen) < 5
        w_k, loss = train(*words)
        w_k = Watched(w_k)
        seen.append(weakref.ref(w_k))
        return w_k, loss
    monkeypatch.setattr(fedavg.LocalUpdate, 'train', watched)
    run('--frac 1 --epochs 2 --engine loop')
    assert len(seen) == 20

def test_lost_clients_are_renormalised_and_counted(capsys):
    w = {'v': torch.tensor([1.0]), 'i': torch.tensor(3)}
    updates = [(k, {'v': torch.tensor([v]), 'i': torch.tensor(3)}, loss)
               for k, (v, loss) in enumerate([(2.0, 0.5), (math.nan, 0.1), (6.0, 1.5), (math.inf, 0.1)])]
    for bits, tolerance in ((None, 0), (16, 1e-6)):
        wire, row = wired(w, quantize=bits)
        wire.n_k = [1, 9, 3, 9]
        average = fedavg.FedAvg(wire.uplink(updates, w, 1, [], {}))
        assert average['v'].item() == pytest.approx(5, abs=tolerance) and average['i'] == 3         # (1*2 + 3*6) / 4
        payload = len(compress.encode(torch.ones(1), bits))
        assert row == dict.fromkeys(row, 0) | {'clients': 2, 'rejected': 2, 'm_t': 4, 'loss': 5.0, 'senders': 4, 'up_bytes': 4 * payload}   # 1*0.5 + 3*1.5
        assert 'client 1 is left out: it holds NaN' in capsys.readouterr().out

def test_a_round_without_survivors_ends_the_run_and_keeps_w(run, tmp_path, capsys):
    run(f'--checkpoint {tmp_path}/c.pt --epochs 1 --lr 1e-30')
    good = weights(tmp_path / 'c.pt')
    with pytest.raises(SystemExit) as e: run(f'--checkpoint {tmp_path}/d.pt --lr 1e9 --local_ep 5')
    assert e.value.code == 1 and 'lower --lr' in capsys.readouterr().err
    assert same(weights(tmp_path / 'd.pt'), good)       # w_0; a step of 1e-30 changes no bit of it

def test_a_loss_beyond_fp32_is_logged_as_it_is(run, monkeypatch):
    train = fedavg.local_updates
    monkeypatch.setattr(fedavg, 'local_updates', lambda *words: ((k, w_k, math.inf) for k, w_k, _ in train(*words)))
    assert [row['train_loss'] for row in run('--engine loop --epochs 1')] == [math.inf]

def test_all_clients_counts_those_not_asked_with_the_old_weights(run, tmp_path):
    for name, words in (('w0', '--lr 1e-30'), ('part', ''), ('all', '--all_clients 1')):
        run(f'--epochs 1 --unequal 1 --checkpoint {tmp_path}/{name} {words}')
    parts = sampling.partition(np.zeros(300), 10, unequal=True, seed=1)
    m_t = sum(len(parts[k]) for k in sampling.select(10, 0.3, sampling.rng(1, 'select', 1)))
    old, part, full = (weights(tmp_path / name)['fc3.weight'] for name in ('w0', 'part', 'all'))
    torch.testing.assert_close(full, old + (part - old) * m_t / 300)

#############################################
#        ClientUpdate (b, c, h, i, n)       #
#############################################

@pytest.mark.parametrize('sizes', [(3, 3, 3, 3), (1, 2, 4, 5)])
def test_one_epoch_of_full_batches_is_one_central_gradient_step(sizes):
    dataset, net = toy()
    idxs = torch.arange(12).split(sizes)
    updates = [fedavg.LocalUpdate(client_args(local_bs=math.inf, lr=0.7), dataset, i.tolist()).train(net)[0] for i in idxs]
    w = fedavg.FedAvg(updates, sizes)
    x, y = dataset.tensors
    F.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(w['weight'], net.weight - 0.7 * net.weight.grad)
    torch.testing.assert_close(w['bias'], net.bias - 0.7 * net.bias.grad)

@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_one_client_is_plain_sgd(momentum):
    dataset, net = toy()
    torch.manual_seed(3)
    w_k, loss = fedavg.LocalUpdate(client_args(local_ep=2, local_bs=5, momentum=momentum), dataset, range(12)).train(net)
    torch.manual_seed(3)
    shuffles, velocity, losses = [torch.randperm(12) for _ in range(2)], [0, 0], []
    for shuffle in shuffles:
        for batch in shuffle.split(5):
            x, y = dataset[batch]
            l = F.cross_entropy(net(x), y)
            losses.append(l.item() * len(y))
            for i, (p, g) in enumerate(zip(net.parameters(), torch.autograd.grad(l, list(net.parameters())))):
                velocity[i] = momentum * velocity[i] + g
                p.data -= 0.1 * velocity[i]
    assert same(fedavg.FedAvg([w_k], [12]), w_k)
    torch.testing.assert_close(w_k['weight'], net.weight.data)
    assert loss == pytest.approx(sum(losses) / 24)

@pytest.mark.parametrize('n, B, batches', [(7, 3, [3, 3, 1]), (2, 10, [2]), (4, math.inf, [4]), (6, 3, [3, 3])])
def test_the_last_smaller_batch_is_used(n, B, batches):
    dataset, net = toy(n)
    seen = []
    net.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    fedavg.LocalUpdate(client_args(local_ep=2, local_bs=B), dataset, range(n)).train(net)
    assert seen == batches * 2

def test_each_epoch_sees_every_example_once_in_another_order():
    dataset, net = TensorDataset(torch.arange(20.).view(20, 1), torch.zeros(20, dtype=torch.int64)), nn.Linear(1, 2)
    seen = []
    net.register_forward_pre_hook(lambda _, x: seen.extend(x[0].flatten().tolist()))
    fedavg.LocalUpdate(client_args(local_ep=2, local_bs=6), dataset, range(5, 20)).train(net)
    assert sorted(seen[:15]) == sorted(seen[15:]) == list(range(5, 20)) and seen[:15] != seen[15:]

@pytest.mark.parametrize('more', [{'momentum': 0.9}, {'optimizer': 'adamw'}])
def test_a_client_starts_each_round_with_a_fresh_optimizer(more):
    dataset, net = toy()
    client, results = fedavg.LocalUpdate(client_args(local_bs=4, **more), dataset, range(12)), []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(client.train(net)[0])
    assert same(*results)

def test_training_has_dropout_whatever_the_nets_mode():
    dataset, (a, b) = toy(dim=20)[0], (nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 3)) for _ in range(2))
    b.load_state_dict(a.state_dict())
    loss = lambda net: fedavg.LocalUpdate(client_args(lr=1e-30, local_ep=5), dataset, range(12)).train(net)[1]
    assert loss(a.eval()) != pytest.approx(fedavg.evaluate(b, *dataset.tensors, 5)[0], rel=1e-3) and not a.training

def test_adamw_and_the_decay_of_lr_reach_the_step():
    dataset, net = toy()
    w, _ = fedavg.LocalUpdate(client_args(local_bs=math.inf, optimizer='adamw'), dataset, range(12)).train(net, lr=0.02)
    # Adam's first step is lr in each coordinate, after AdamW's decay by 1 - lr * 0.01
    torch.testing.assert_close((w['bias'] - net.bias * (1 - 0.02 * 0.01)).abs(), torch.full((3,), 0.02), rtol=1e-4, atol=0)
    args = client_args(lr=0.1, lr_decay=0.5, seed=1, local_bs=math.inf)
    moved = [fedavg.FedAvg([w for _, w, _ in fedavg.local_updates(args, net, dataset, {0: range(12)}, {0: 1}, t)])['bias'] - net.bias
             for t in (1, 3)]
    torch.testing.assert_close(moved[0] * 0.25, moved[1], rtol=1e-4, atol=1e-7)
    full = fedavg.LocalUpdate(args, dataset, range(12)).train(net)[0]['bias'] - net.bias
    torch.testing.assert_close(moved[0], full)
    assert same(fedavg.LocalUpdate(args, dataset, range(12)).train(net, lr=0.0)[0], net.state_dict())

def test_any_image_label_data_set_trains_and_its_tensors_are_made_once(data):
    class Counting(datasets.MNIST):
        reads = 0
        def __getitem__(self, i):
            self.reads += 1
            return super().__getitem__(i)
    Counting.__name__ = 'MNIST'
    dataset = Counting(data, transform=lambda image: torch.from_numpy(np.array(image)).float().view(1, 28, 28) / 255)
    users = sampling.mnist_iid(dataset, 10)
    for _ in range(2): w, loss = fedavg.LocalUpdate(client_args(), dataset, users[0]).train(models.TwoNN(784, 20, 10))
    assert dataset.reads == 30 and math.isfinite(loss)
    other = fedavg.LocalUpdate(client_args(), dataset, users[1])
    assert other.y.tolist() == [int(dataset.targets[i]) for i in users[1]]
    plain = [(torch.ones(5), 1), (torch.zeros(5), 0)]
    assert fedavg.LocalUpdate(client_args(), plain, {0, 1}).train(nn.Linear(5, 3))[1] > 0
    with pytest.raises(ValueError): fedavg.LocalUpdate(client_args(), plain, [])

def test_m_is_rounded_and_at_least_one():
    asked = lambda K, C: len(sampling.select(K, C, sampling.rng(0)))
    assert [asked(100, 0.29), asked(100, 0), asked(100, 1), asked(7, 0.1), asked(10, 0.35)] == [29, 1, 100, 1, 4]
    S_t = sampling.select(50, 0.5, sampling.rng(0))
    assert len(set(S_t)) == 25 and 0 <= S_t.min() and S_t.max() < 50

#############################################
#           The stacked engine              #
#############################################

def image_toy(name, n=70):
    """n random images of the net's size in 10 classes, and the net."""
    torch.manual_seed(0)
    channels, side = (3, 32) if name == 'cifar' else (1, 28)
    net = models.build(SimpleNamespace(model='cnn' if name == 'cifar' else name, num_channels=channels, num_classes=10))
    return TensorDataset(torch.randn(n, channels, side, side), torch.randint(10, (n,))), net

def both(args, net, dataset, parts, size=4, mask=None, epochs=None, own=None):
    """What the loop and a Stacked of `size` make of all clients, each as {k: (w_k, loss)}."""
    for name, value in dict(seed=1, lr_decay=0.9, compile=0, dp=None, mu=getattr(args, 'mu', 0), device=torch.device('cpu')).items(): setattr(args, name, value)
    runs = fedavg.local_updates, fedavg.Stacked(args, net, size)
    return [{k: rest for k, *rest in run(args, net, dataset, parts, epochs or dict.fromkeys(parts, args.local_ep), 2, mask, own)} for run in runs]

MORE = [{}, {'momentum': 0.9, 'lr': 0.02}, {'optimizer': 'adamw', 'lr': 0.001}, {'local_bs': math.inf}, {'local_ep': 3}, {'mu': 0.5, 'local_ep': 2}]
STACKS = [dict(iid_=1), dict(iid_=0), dict(iid_=1, unequal=1), dict(iid_=0, alpha=0.5, unequal=1)]

@pytest.mark.parametrize('name, split, more', [('2nn', *both) for both in itertools.product(STACKS, MORE)]
                         + [(name, STACKS[i % 4], more) for name in ('paper_cnn', 'cifar') for i, more in enumerate(MORE)])
def test_stacked_clients_equal_the_loops(name, split, more):
    dataset, net = image_toy(name, 70 if name == '2nn' else 30)
    parts = sampling.partition(dataset.tensors[1], 7 if name == '2nn' else 3, **split)
    loop, stacked = both(client_args(**{'local_bs': 4, 'lr': 0.05} | more), net, dataset, parts)
    assert loop.keys() == stacked.keys()
    for k, (w_k, loss) in loop.items():
        assert loss == pytest.approx(stacked[k][1], rel=1e-5)
        assert w_k.keys() == stacked[k][0].keys()
        # The first steps of AdamW are plus or minus lr, however small a gradient is that rounding gives another sign.
        for key, v in w_k.items(): assert (v - stacked[k][0][key]).norm() <= (1e-4 if 'optimizer' in more else 1e-5) * v.norm()

def test_a_client_that_is_done_is_frozen_while_others_go_on():
    dataset, net = image_toy('2nn')
    alone, _ = both(client_args(momentum=0.9, lr=0.02), net, dataset, {0: np.arange(3)})
    _, beside = both(client_args(momentum=0.9, lr=0.02), net, dataset, {0: np.arange(3), 1: np.arange(3, 70)})
    torch.testing.assert_close(alone[0][0]['fc1.weight'], beside[0][0]['fc1.weight'])

def test_a_stack_is_never_larger_than_its_size(monkeypatch):
    dataset, net = image_toy('2nn')
    sizes, step = [], fedavg.Stacked.step
    monkeypatch.setattr(fedavg.Stacked, 'step', lambda self, x, y, i, w: (sizes.append(len(i)), step(self, x, y, i, w))[1])
    both(client_args(), net, dataset, sampling.partition(dataset.tensors[1], 10), size=4)
    assert sizes == [4, 4, 2]
    sizes.clear()       # clients that are done leave: 3, 2 and 1 batches of 10
    both(client_args(), net, dataset, {0: np.arange(10), 1: np.arange(30), 2: np.arange(20)}, size=4)
    assert sizes == [3, 2, 1]

def test_stacked_clients_have_dropout_of_their_own(monkeypatch):
    dataset, net = image_toy('mlp', 30)
    monkeypatch.setattr(fedavg, 'shuffles', lambda n_k, E: torch.arange(n_k).expand(E, n_k))
    losses = [loss for _, loss in both(client_args(lr=1e-30), net, dataset, {k: np.arange(30) for k in range(3)})[1].values()]
    assert len({round(loss, 4) for loss in losses}) == 3

def test_what_cannot_be_stacked_is_refused_or_left_to_the_loop(capsys):
    net, args = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), client_args(engine='auto', compile=0, dp=None, model='2nn', cut=None, mu=0, device=torch.device('cpu'))
    assert fedavg.engine(args, net, 10, 10) is fedavg.local_updates
    args.engine = 'stacked'
    with pytest.raises(SystemExit): fedavg.engine(args, net, 10, 10)
    assert capsys.readouterr().err.count('running statistics') == 1
    args.engine = 'auto'
    assert isinstance(fedavg.engine(args, nn.Linear(4, 4), 10, 10), fedavg.Stacked)
    args.model = 'paper_cnn'
    assert fedavg.engine(args, nn.Linear(4, 4), 10, 10) is fedavg.local_updates

@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler')
def test_the_compiled_step_equals_the_plain_one(run, tmp_path, capsys):
    for name in ('0', '1'): run(f'--frac 0.7 --unequal 1 --momentum 0.5 --lr_decay 0.9 --lr 0.02 --local_bs 40 --prune 0.5 --compile {name} --checkpoint {tmp_path}/{name}')
    a, b = weights(tmp_path / '0'), weights(tmp_path / '1')
    assert all((a[name] - b[name]).norm() <= 1e-5 * a[name].norm() for name in a)
    assert capsys.readouterr().out.count('--compile 1: compiled in') == 1

def test_a_machine_without_a_compiler_gets_one_line(refused, monkeypatch):
    def broken(step, **_): raise RuntimeError('no C++ compiler\nand a long story')
    monkeypatch.setattr(torch, 'compile', lambda step, **_: lambda *words: broken(step))
    assert 'does not work here (no C++ compiler)' in refused(['--num_users', '10', '--compile', '1'])

#############################################
#         More than one process             #
#############################################

AMONG = '--num_users 10 --frac 0.8 --local_ep 1 --epochs 3 --gpu -1'       # that several processes share

def torchrun(words, data, processes=2, flags='--standalone'):
    """The program under torchrun, on small digits and 10 clients."""
    command = f'-m torch.distributed.run --nproc_per_node={processes} {flags} -- {HERE}/fedavg.py {AMONG} --data_dir {data} {words}'
    return subprocess.Popen([sys.executable, *command.split()], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

class Ranks:
    """torchrun's equal without its start-up: the ranks are forked from a process that has imported torch."""
    def __init__(self, words, data, processes=2):
        words = f'{AMONG} --data_dir {data} {words}'
        server = multiprocessing.get_context('forkserver')
        server.set_forkserver_preload(['fedavg'])
        self.said, port = [pathlib.Path(tempfile.mkstemp()[1]) for _ in range(2)], free_port()
        self.ranks = [server.Process(target=one_rank, args=(words.split(), rank, processes, port, self.said)) for rank in range(processes)]
        for process in self.ranks: process.start()

    def communicate(self, timeout):
        for process in self.ranks: process.join(timeout)
        self.returncode = next((process.exitcode for process in self.ranks if process.exitcode != 0), 0)
        for process in self.ranks: process.kill()
        texts = [path.read_text() for path in self.said]
        for path in self.said: path.unlink()
        return texts

def one_rank(words, rank, processes, port, said):
    """fedavg.main(words) as torchrun would start it, its output appended to the two files in said."""
    for stream, path in zip((1, 2), said): os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.environ |= elastic(rank, processes, port)
    torch.set_num_threads(1)
    fedavg.main(words)

def elastic(rank, processes, port):
    """The environment in which torchrun starts a process."""
    return dict(TORCHELASTIC_RUN_ID='by hand', WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))

def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]

def test_shares_are_balanced_by_work():
    assert fedavg.shares([3, 5, 8], {3: 10, 5: 6, 8: 5}, 2) == [[3], [5, 8]]
    assert fedavg.shares([3, 5], {3: 1, 5: 1}, 3) == [[3], [5], []]
    busiest = []
    for seed in range(200):
        n_k = sampling.sizes(60000, 100, unequal=True, seed=seed)
        S_t = sampling.select(100, 0.16, sampling.rng(seed))
        work = [sum(n_k[k] for k in ks) for ks in fedavg.shares(S_t, n_k, 4)]
        assert sum(work) == n_k[S_t].sum()
        busiest.append(max(work) / max(np.mean(work), n_k[S_t].max()))      # no share is smaller than the largest client
    assert np.median(busiest) < 1.05 and np.quantile(busiest, 0.9) < 1.1

def test_silos_have_layers_of_their_own_and_the_last_average(tmp_path):
    for rank in (0, 1): write_mnist(tmp_path / f'silo{rank}', train=60, test=30)
    silos = Ranks(f'--silo 1 --frac 1 --epochs 2 --personal layers --personal_layers fc2 --checkpoint {tmp_path}/c.pt', f'{tmp_path}/silo{{rank}}')
    out, err = silos.communicate(timeout=100)
    assert silos.returncode == 0, err
    kept = [torch.load(tmp_path / name, weights_only=True)['wire']['kept'][2] for name in ('c.pt', 'c.pt.1')]
    assert all(v[rank].shape == (40200,) and (v[rank] != 0).all() for rank, v in enumerate(kept)) and 'accuracy on the labels' in out
    _, (_, low, high) = accuracies(out)
    assert low == high and not torch.equal(kept[0][0], kept[1][1])      # the same w on the same files in both silos; other shuffles

@pytest.mark.parametrize('words', ['--unequal 1 --widths 1,0.5 --balance 1', '--unequal 1 --all_clients 1 --mu 0.1 --personal layers --personal_layers fc3',
    '--iid 0 --engine loop --model mlp --cut 1 --personal mix --speeds lognormal:1 --deadline 0.8 --corrupt 0.3'])
def test_two_processes_give_what_one_gives(data, run, tmp_path, capsys, words):
    two = Ranks(f'{words} --checkpoint {tmp_path}/two --log {tmp_path}/two.csv', data)
    out, err = two.communicate(timeout=100)
    assert two.returncode == 0 and out.count('round    3/3') == 1, err
    run(f'{words} --frac 0.8 --checkpoint {tmp_path}/one --log {tmp_path}/one.csv')
    a, b = weights(tmp_path / 'one'), weights(tmp_path / 'two')
    assert all((a[name] - b[name]).norm() <= 1e-5 * a[name].norm() for name in a)
    logs = [read_log(tmp_path / f'{name}.csv')[1] for name in ('one', 'two')]
    for one, two in zip(*logs, strict=True):
        assert all(one[name] == two[name] for name in ('round', 'test_acc', 'clients', 'rejected', 'late', 'up_bytes', 'down_bytes', 'round_time'))
        assert float(one['train_loss']) == pytest.approx(float(two['train_loss']), rel=1e-5)
    assert capsys.readouterr().out.partition('accuracy on')[2] == out.partition('accuracy on')[2]

def pid_of_rank(rank, mark):
    """The process that torchrun started as `rank`, with `mark` in its command line."""
    for process in pathlib.Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):      # one that has ended meanwhile
            if f'RANK={rank}' in (process / 'environ').read_text().split('\0') and mark in (process / 'cmdline').read_text():
                return int(process.name)

def test_a_killed_process_is_restarted_and_the_run_ends_as_if_undisturbed(data, run, tmp_path):
    words = f'--local_ep 10 --epochs 12 --checkpoint {tmp_path}/c.pt --log {tmp_path}/l.csv --resume'
    killed = torchrun(words, data, flags='--standalone --max-restarts=3')
    while not (tmp_path / 'c.pt').exists() and killed.poll() is None: time.sleep(0.01)
    os.kill(pid_of_rank(0, str(tmp_path)), signal.SIGKILL)
    out, err = killed.communicate(timeout=100)
    assert killed.returncode == 0 and out.count('resumed from') == 1, err
    run(f'{words} --frac 0.8'.replace('c.pt', 'full.pt').replace('l.csv', 'full.csv').replace('--resume', ''))
    a, b = weights(tmp_path / 'c.pt'), weights(tmp_path / 'full.pt')
    assert all((a[name] - b[name]).norm() <= 1e-5 * a[name].norm() for name in a)
    assert [r['round'] for r in read_log(tmp_path / 'l.csv')[1]] == [str(t) for t in range(1, 13)]

def test_silos_train_on_their_own_files(tmp_path, capsys):
    for rank, n in enumerate((100, 50)): write_mnist(tmp_path / f'silo{rank}', train=n, test=30)
    silos = torchrun(f'--silo 1 --frac 1 --epochs 1 --checkpoint {tmp_path}/c.pt', f'{tmp_path}/silo{{rank}}')
    out, err = silos.communicate(timeout=100)
    assert silos.returncode == 0 and '2 clients with 50 to 100' in out, err
    args = options.args_parser('--gpu -1 --local_ep 1'.split())
    args.device = torch.device('cpu')
    fedavg.seed_torch(args.seed, 'init')
    net, w = models.build(args), []
    for k, n in enumerate((100, 50)):
        train, test = sampling.load('mnist', tmp_path / f'silo{k}')
        w += [w_k for _, w_k, _ in fedavg.local_updates(args, net, train, {k: np.arange(n)}, {k: 1}, 1)]
    expected, got = fedavg.FedAvg(w, [100, 50]), weights(tmp_path / 'c.pt')
    assert all((expected[name] - got[name]).norm() <= 1e-5 * got[name].norm() for name in got)

def test_a_silo_that_dies_is_named(tmp_path):
    assert fedavg.gone(RuntimeError('Rank 1 failed to pass\nand more')) == 'Rank 1 failed to pass'
    for rank in range(2): write_mnist(tmp_path / f'silo{rank}', train=60, test=20)
    port = free_port()
    words = f'--silo 1 --data_dir {tmp_path}/silo{{rank}} --frac 1 --epochs 1000000 --gpu -1 --log {tmp_path}/l.csv'
    silos = [shell(words, env=os.environ | elastic(rank, 2, port)) for rank in range(2)]
    while not ((tmp_path / 'l.csv').exists() and len(read_log(tmp_path / 'l.csv')[1]) > 1) and silos[0].poll() is None: time.sleep(0.05)
    silos[1].kill()
    out, err = silos[0].communicate(timeout=100)
    assert silos[0].returncode == 1 and 'another process has gone' in err and 'ank 1' in err and 'Traceback' not in err, err

#############################################
#                 The wire                  #
#############################################

SMALLER = '--quantize 8 --topk 0.1 --prune 0.5 --prune_end 2'

def test_a_payload_is_its_header_its_values_and_a_checksum():
    v = torch.tensor([0.0, 3.0, 1.0, 2.0, 3.0])
    head = b'FAvg' + bytes([2, 0]) + struct.pack('<IIff', 5, 5, 0.0, 1.0)
    body = head + bytes([0b10_01_11_00, 0b11])              # two bits each, the first lowest: 0 3 1 2, then 3
    assert compress.encode(v, quantize=2) == body + struct.pack('<I', zlib.crc32(body))
    sparse = compress.encode(v * torch.tensor([1, -1, 1, 1, 1.1]), topk=0.4)
    assert sparse[5:14] == bytes([1]) + struct.pack('<II', 5, 2) and sparse[22:23] == bytes([0b10010])      # a bitmap of 5
    torch.testing.assert_close(compress.decode(sparse, 5), torch.tensor([0, -3.0, 0, 0, 3.3]))

@pytest.mark.parametrize('bits', [None, *range(1, 17)])
@pytest.mark.parametrize('d', [0, 1, 5, 1000])
def test_decode_gives_back_what_encode_took(bits, d):
    v = torch.randn(d, generator=torch.Generator().manual_seed(d))
    payload = compress.encode(v, bits)
    assert len(payload) == 26 + math.ceil(d * (bits or 32) / 8)
    step = (v.max() - v.min()) / (2 ** bits - 1) if bits and d else torch.tensor(0.0)
    assert ((compress.decode(payload, d) - v).abs() <= step * 1.001 + 1e-7 * bool(bits)).all()
    assert torch.equal(compress.decode(compress.encode(torch.full((d,), 0.7), bits), d), torch.full((d,), 0.7))

@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
def test_quantization_is_unbiased(bits):
    v, draw = torch.tensor([-1.0, -0.999, -0.3, 0.0, 0.123, 0.77, 1.0]), np.random.default_rng(0)
    mean = torch.stack([compress.decode(compress.encode(v, bits, draw=draw), 7) for _ in range(4000)]).double().mean(0)
    step = 2 / (2 ** bits - 1)
    assert ((mean - v).abs() < 5 * step / 2 / 4000 ** 0.5).all() and mean[0] == -1 and mean[-1] == pytest.approx(1, abs=1e-5)

@pytest.mark.parametrize('bits', [None, 1, 4])
def test_topk_keeps_the_largest_under_the_shorter_index_coding(bits):
    v = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for f, where in ((0.01, math.ceil(10 * 10 / 8)), (0.05, math.ceil(50 * 10 / 8)), (0.5, 125), (1e-9, 2), (1, 0)):   # 10 bits an index
        payload, n = compress.encode(v, bits, f), max(round(f * 1000), 1)
        assert len(payload) == 26 + where + math.ceil(n * (bits or 32) / 8)
        got, largest = compress.decode(payload, 1000), v.abs().topk(n).indices
        assert set(got.nonzero().flatten().tolist()) <= set(largest.tolist())
        if not bits: assert torch.equal(got[largest], v[largest])

def test_damaged_and_foreign_bytes_raise_valueerror_and_nothing_else():
    draw, v = np.random.default_rng(0), torch.randn(300, generator=torch.Generator().manual_seed(0))
    wholes = [compress.encode(v, bits, f) for bits in (None, 1, 5, 8) for f in (None, 0.02, 0.5)]
    sign = lambda body: body + struct.pack('<I', zlib.crc32(body))
    refused = 0
    for i in range(6000):
        whole = wholes[i % len(wholes)]
        at, cut, junk = draw.integers(len(whole)), draw.integers(len(whole)), draw.bytes(draw.integers(40))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << draw.integers(8)
        header = bytearray(whole[:-4])
        header[draw.integers(26)] = draw.integers(256)
        body = bytearray(whole[:-4])
        body[draw.integers(22, len(body))] = draw.integers(256)
        damaged = [whole[:cut], bytes(flipped), whole + junk + b'0', junk, sign(bytes(header)), sign(bytes(body)), whole[cut:] + whole[:cut]][i % 7]
        try:
            got = compress.decode(damaged, 300)
            assert got.shape == (300,) and torch.isfinite(got).all() and (i % 7 > 3 or damaged == whole)
        except ValueError as e: refused += bool(str(e))
    assert refused > 4500
    for d in (0, 299, 301, 2**32):
        with pytest.raises(ValueError, match='not of'): compress.decode(wholes[0], d)
    huge = b'FAvg' + bytes([32, 0]) + struct.pack('<IIff', 2**32 - 1, 2**32 - 1, 0, 0)
    tracemalloc.start()
    with pytest.raises(ValueError, match='were to come'): compress.decode(sign(huge), 2**32 - 1)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()

@pytest.mark.parametrize('bits', [None, 8])
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bits, bad):
    with pytest.raises(ValueError, match='NaN'): compress.decode(compress.encode(torch.tensor([1.0, bad, 2.0]), bits), 3)
    with pytest.raises(ValueError, match='NaN'): compress.decode(compress.encode(torch.tensor([3e38, -3e38, 1]), 8), 3)

def test_a_damaged_payload_is_left_out_of_its_round_and_counted(run, monkeypatch, capsys):
    real, seen = compress.encode, []
    def damaged(*words, **more):
        payload = bytearray(real(*words, **more))
        if payload[4] == 8:         # an upload
            seen.append(0)
            if len(seen) == 2: payload[1000] ^= 1
        return bytes(payload)
    monkeypatch.setattr(fedavg, 'encode', damaged)
    history = run('--quantize 8 --epochs 2')
    assert [(row['clients'], row['rejected']) for row in history] == [(2, 1), (3, 0)] and history[0]['up_bytes'] == history[1]['up_bytes']
    assert 'its checksum is wrong' in capsys.readouterr().out

def test_a_target_counts_for_the_pruned_model_only(run, capsys):
    history = run('--epochs 5 --prune 0.9 --prune_end 4 --target 0.01')
    assert len(history) == 4 and 'rounds to 1.00 %: 4.0' in capsys.readouterr().out

def test_encode_refuses_settings_that_do_not_exist():
    for more in (dict(quantize=0), dict(quantize=17), dict(quantize=8.0), dict(topk=0), dict(topk=1.5)):
        with pytest.raises(ValueError): compress.encode(torch.ones(3), **more)
    for update in (torch.ones(3, 2), torch.ones(3, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match='flat'): compress.encode(update)
    assert compress.decode(compress.encode(torch.ones(3), np.int64(8)), np.int64(3)).tolist() == [1, 1, 1]

def test_what_a_client_does_not_send_it_adds_next_time():
    w = {'v': torch.zeros(4)}
    def sent(v, t=1):
        wire.downlink(w, None, [7], tally)
        got = [w_k['v'].tolist() for w_k, _ in wire.uplink([(7, {'v': torch.tensor(v)}, 0.0)], w, t, [], {})]
        wire.commit()
        return got
    wire, tally = wired(w, topk=0.25)
    assert sent([3.0, 2.0, 0.5, 0.0]) == [[3, 0, 0, 0]] and wire.kept[7].tolist() == [0, 2, 0.5, 0]
    assert sent([0.0, 1.0, 0.5, 2.5]) == [[0, 3, 0, 0]] and wire.kept[7].tolist() == [0, 0, 1, 2.5]
    assert sent([math.nan] * 4) == [] and wire.kept[7].tolist() == [0, 0, 1, 2.5]
    wire, tally = wired(w, topk=0.25, error_feedback=0)
    assert sent([3.0, 2.0, 0.5, 0.0]) == [[3, 0, 0, 0]] and sent([0.0, 1.0, 0.5, 2.5]) == [[0, 0, 0, 2.5]] and not wire.kept
    wire, tally = wired(w, topk=0.75, quantize=1)       # what rounding has added is kept back too
    got = sent([1.0, 0.4, 0.3, 0.2])
    assert got[0][3] == 0 and (torch.tensor(got[0]) + wire.kept[7]).tolist() == pytest.approx([1, 0.4, 0.3, 0.2])

def test_each_round_rounds_anew(monkeypatch):
    w, draws = {'v': torch.zeros(100)}, []
    wire, tally = wired(w, quantize=1)
    wire.downlink(w, None, [7], tally)
    v = {'v': torch.linspace(-1, 1, 100)}
    a, b, again, other = (next(wire.uplink([(k, v, 0.0)], w, t, [], {}))[0]['v'] for k, t in ((7, 1), (7, 2), (7, 1), (8, 1)))
    assert torch.equal(a, again) and not torch.equal(a, b) and not torch.equal(a, other)

def test_what_a_round_changes_is_kept_when_it_is_done():
    w = {'v': torch.arange(1.0, 17).view(4, 4)}
    wire, tally = wired(w, topk=0.25, prune=0.5)
    wire.downlink(w, 0.25, [1], tally), wire.commit()
    before = wire.state(1)
    wire.downlink(w, 0.5, [2], tally)
    list(wire.uplink([(2, {'v': torch.ones(4, 4)}, 0.0)], w, 2, [], {}))
    again = wire.state(1)
    assert again['kept'] == before['kept'] == {1: {}} and again['holders'] == [1] and again['left'].sum() == 12
    wire.commit()
    assert list(wire.state(2)['kept'][2]) == [2] and wire.state(2)['holders'] == [2] and wire.state(2)['left'].sum() == 8

def test_float_buffers_travel_with_the_weights():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).half()
    w, w_k = net.state_dict(), {name: v + 1 for name, v in net.state_dict().items()}
    wire, tally = wired(w)
    wire.n_k = [5]
    got, n_k = next(wire.uplink([(0, w_k, 0.0)], w, 1, [], {}))
    assert n_k == 5 and got.pop('1.num_batches_tracked') == 0 and w_k.pop('1.num_batches_tracked') == 1 and same(got, w_k)
    assert all(got[name].dtype == v.dtype for name, v in w_k.items()) and tally['up_bytes'] == 26 + 4 * 14

def test_sparsity_is_zhu_and_guptas_cubic():
    assert [compress.sparsity(t, 0.8, 2, 6) for t in (0, 2, 4, 6, 9)] == pytest.approx([0, 0, 0.8 * 7 / 8, 0.8, 0.8])
    assert compress.prune(torch.tensor([3.0, -1, 0.5, -4, 1]), 0.6).tolist() == [True, False, False, True, False]

def test_pruning_takes_the_smallest_weights_of_all_matrices_and_no_bias():
    w = {'a.weight': torch.tensor([[1.0, -5], [2, 6]]), 'a.bias': torch.tensor([0.1, 0]), 'b.weight': torch.tensor([[-3.0, 0.2]]), 'n': torch.tensor(7)}
    wire, tally = wired(w, prune=0.5)
    v, mask = wire.downlink(w, 0.5, [0], tally)
    assert v['a.weight'].tolist() == [[0, -5], [0, 6]] and v['b.weight'].tolist() == [[-3, 0]] and same(mask, {
        'a.weight': v['a.weight'] != 0, 'a.bias': torch.tensor([True, True]), 'b.weight': v['b.weight'] != 0})
    assert torch.equal(v['a.bias'], w['a.bias']) and v['n'] == 7 and wire.downlink(w, None, [0], tally) == (w, None)
    assert compress.prune(torch.tensor([0.0, 1, -1, 0, 1, 1]), 0.5).tolist() == [False, False, True, False, True, True]    # ties: the first go

@pytest.mark.parametrize('more', [{}, {'momentum': 0.9, 'lr': 0.02}, {'optimizer': 'adamw', 'lr': 0.001}])
def test_pruned_weights_stay_zero_in_both_engines(more):
    dataset, net = image_toy('2nn')
    wire, tally = wired(net.state_dict(), prune=0.7)
    w, mask = wire.downlink(net.state_dict(), 0.7, [], tally)
    net.load_state_dict(w)
    loop, stacked = both(client_args(local_bs=4, **more), net, dataset, sampling.partition(dataset.tensors[1], 3), mask=mask)
    for k, (w_k, _) in loop.items():
        for name, left in mask.items():
            assert (w_k[name][~left] == 0).all() and (stacked[k][0][name][~left] == 0).all() and (w_k[name][left] != w[name][left]).any()
            assert (w_k[name] - stacked[k][0][name]).norm() <= 1e-5 * w_k[name].norm()

@pytest.mark.parametrize('words', ['--engine loop', '--model cnn --separable 1 --lr 0.02', '--quantize 8 --topk 0.5 --momentum 0.5 --lr 0.02'])
def test_the_final_model_has_exactly_the_sparsity_asked_for(run, tmp_path, words):
    history = run(f'--epochs 4 --prune 0.9 --prune_begin 1 --prune_end 3 --checkpoint {tmp_path}/c.pt {words}')
    matrices = [v for v in weights(tmp_path / 'c.pt').values() if v.dim() > 1]
    assert sum((v == 0).sum().item() for v in matrices) == round(0.9 * sum(v.numel() for v in matrices))
    assert history[0]['down_bytes'] > 3 * history[3]['down_bytes'] and history[0]['up_bytes'] > 3 * history[3]['up_bytes']

def test_the_mask_is_counted_once_for_each_client_when_it_changes():
    w = {'v': torch.arange(1.0, 17).view(4, 4)}
    wire, down = wired(w, prune=0.5)[0], []
    for s, S_t in ((0, [1, 2]), (0.5, [1, 2]), (0.5, [2, 3]), (0.5, [1, 3]), (0.75, [1]), (0.75, [1])):
        tally = {'down_bytes': 0}
        w, _ = wire.downlink(w, s, S_t, tally)
        wire.commit()
        down.append(tally['down_bytes'])
        if len(down) == 5: w = {'v': w['v'].flip(0)}        # as many pruned, but others
    values = lambda n: 26 + 4 * n
    assert down == [2 * values(16), 2 * (values(8) + 28), 2 * values(8) + 28, 2 * values(8), values(4) + 28, values(4) + 28]      # a mask: 26 + 16 bits

def test_bytes_in_the_log_are_those_of_the_payloads(run, tmp_path, monkeypatch, capsys):
    sent, encode = [], compress.encode
    monkeypatch.setattr(fedavg, 'encode', lambda *words, **more: (sent.append(encode(*words, **more)), sent[-1])[1])
    history = run(f'--quantize 4 --topk 0.1 --log {tmp_path}/l.csv --bandwidth 2 --target 1 --lr 0.01')
    up = [len(p) for p in sent if p[4] == 4]
    assert len(up) == 9 and [row['up_bytes'] for row in history] == [sum(up[i:i + 3]) for i in (0, 3, 6)]
    assert {row['down_bytes'] for row in history} == {3 * (26 + 4 * 199210)}
    assert [float(r['upload_seconds']) for r in read_log(tmp_path / 'l.csv')[1]] == pytest.approx([sum(up[i:i + 3]) / 3 / 2e6 for i in (0, 3, 6)])
    times = 9 * (26 + 4 * 199210) / sum(up)
    assert f'uploaded {sum(up) / 1e6:.2f} MB (fp32: {9 * 0.796866:.2f} MB, {times:.1f} times that)' in capsys.readouterr().out

def test_megabytes_to_target_are_interpolated_as_the_rounds_are(run, capsys):
    run('--target 0.5 --epochs 60 --local_ep 5 --frac 1')
    reached, megabytes = map(float, re.search(r'rounds to 50.00 %: ([\d.]+), with ([\d.]+) MB uploaded', capsys.readouterr().out).groups())
    assert megabytes == pytest.approx(reached * 10 * (26 + 4 * 199210) / 1e6, rel=0.05)

def test_all_of_topk_is_all_and_sixteen_bits_are_nearly_fp32(run, tmp_path):
    for name, words in (('plain', ''), ('all', '--topk 1'), ('16', '--quantize 16'), ('8', '--quantize 8')):
        run(f'--epochs 2 --checkpoint {tmp_path}/{name} {words}')
    plain, *others = (torch.cat([v.flatten() for v in weights(tmp_path / name).values()]) for name in ('plain', 'all', '16', '8'))
    distances = [((v - plain).norm() / plain.norm()).item() for v in others]
    assert distances[0] < 1e-6 and 1e-7 < distances[1] < 1e-4 and distances[1] * 50 < distances[2] < 1e-2

def test_a_smaller_wire_is_the_same_in_both_engines(run, tmp_path):
    for name in ('loop', 'stacked'): run(f'--quantize 12 --topk 0.3 --prune 0.5 --prune_end 2 --engine {name} --checkpoint {tmp_path}/{name}')
    a, b = weights(tmp_path / 'loop'), weights(tmp_path / 'stacked')
    assert all((a[name] - b[name]).norm() <= 1e-3 * a[name].norm() for name in a)

def test_two_processes_send_what_one_sends(data, run, tmp_path):
    words = f'{SMALLER} --engine loop --epochs 4'
    two = Ranks(f'{words} --checkpoint {tmp_path}/two --log {tmp_path}/two.csv', data)
    out, err = two.communicate(timeout=100)
    assert two.returncode == 0, err
    history = run(f'{words} --frac 0.8 --checkpoint {tmp_path}/one')
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ('one', 'two'))
    assert all((a['w'][name] - b['w'][name]).norm() <= 1e-3 * a['w'][name].norm() for name in a['w'])
    for row, logged in zip(history, read_log(tmp_path / 'two.csv')[1], strict=True):
        assert all(str(row[name]) == logged[name] for name in ('clients', 'up_bytes', 'down_bytes'))
    one, two = (saved['wire']['kept'][4] for saved in (a, b))
    assert one.keys() == two.keys() and all((one[k] - two[k]).norm() <= 0.05 * one[k].norm() > 0 for k in one)

def test_silos_send_bytes_and_go_on_with_what_they_kept(tmp_path):
    for rank, n in enumerate((60, 30)): write_mnist(tmp_path / f'silo{rank}', train=n, test=30)
    def started(name, epochs):
        words = f'--silo 1 --frac 0.5 {SMALLER} --checkpoint {tmp_path}/{name} --log {tmp_path}/{name}.csv --resume --epochs {epochs}'
        return Ranks(words, f'{tmp_path}/silo{{rank}}')
    def ended(*runs):
        for silos in runs:
            out, err = silos.communicate(timeout=100)
            assert silos.returncode == 0 and 'is lost' not in err, err
        return out
    ended(started('full', 4), started('part', 2))
    assert 'after round 2; --epochs is 4' in ended(started('part', 4))
    full, part = (torch.load(tmp_path / name, weights_only=True) for name in ('full', 'part'))
    assert same(full['w'], part['w']) and list(full['wire']['kept'][4]) == [0]
    other = torch.load(tmp_path / 'full.1', weights_only=True)
    assert list(other['wire']['kept'][4]) == [1] and list(other['wire']['kept']) == [3, 4]
    up = [int(r['up_bytes']) for r in read_log(tmp_path / 'full.csv')[1]]
    assert 0 < up[-1] < 2 * 4 * 199210 / 15 and (sum((v == 0).sum().item() for v in full['w'].values() if v.dim() > 1)) == 198800 / 2

@pytest.mark.parametrize('words', ['', '--silo 1 --frac 0.5'])
def test_the_last_report_knows_the_mask_of_a_run_that_had_ended(data, tmp_path, words):
    for rank in range(2 if words else 0): write_mnist(tmp_path / f'silo{rank}', train=60, test=30)
    def report():
        ranks = Ranks(f'{words} --prune 0.9 --prune_end 2 --personal finetune --epochs 3 --checkpoint {tmp_path}/c.pt --resume', f'{tmp_path}/silo{{rank}}' if words else data)
        out, err = ranks.communicate(timeout=100)
        assert ranks.returncode == 0, err
        return out.partition('accuracy on')[2]
    assert report() == report() != ''

#############################################
#           Differential privacy            #
#############################################

# (q, noise, steps, delta): epsilon by dp-accounting 0.6's RdpAccountant
ACCOUNTED = {(0.01, 4, 10000, 1e-5): 1.03549, (256 / 60000, 1.1, 14040, 1e-5): 2.594363, (0.1, 0.5, 10, 1e-5): 14.418327,
             (1, 5, 50, 1e-5): 7.077392, (0.001, 0.8, 100000, 1e-6): 3.187805, (0.02, 10, 1000, 1e-8): 0.342466, (0.1, 1, 200, 1e-3): 8.254141}

@pytest.mark.parametrize('case', ACCOUNTED)
def test_epsilon_is_what_an_independent_accountant_says(case):
    assert compress.epsilon(*case) == pytest.approx(ACCOUNTED[case], rel=0.01)

@pytest.mark.parametrize('q, noise', [(0.1, 1.0), (0.5, 2.0), (0.01, 0.7), (0.9, 5.0)])
def test_renyi_divergences_are_those_of_the_integral(q, noise):
    x = np.linspace(-40 * noise, 40 * noise + 40, 2_000_001)
    ratio = np.logaddexp(math.log(1 - q), math.log(q) + (2 * x - 1) / (2 * noise**2))        # of N(0) mixed with N(1) to N(0)
    got = compress.renyi(q, noise)
    for i in (0, 5, 19, 56, 95):            # orders 1.5, 2, 3.4, 7.1 and 11
        a = compress.ORDERS[i]
        log_density = a * ratio - x**2 / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
        expected = (log_density.max() + math.log(np.exp(log_density - log_density.max()).sum() * (x[1] - x[0]))) / (a - 1)
        assert got[i] == pytest.approx(expected, rel=1e-5)

def test_epsilon_of_extremes_is_a_number_or_an_error():
    for q in (0, 1e-300, 1e-9, 0.5, 1 - 1e-12, 1):
        for noise in (0, 1e-200, 1e-3, 0.1, 1e3, 1e100, 1e200):
            found = [compress.epsilon(q, noise, steps, 1e-5) for steps in (0, 1, 1000, 10**6)]
            assert found == sorted(found) and found[0] == 0 and (found[3] < math.inf) == (q == 0 or noise > 1e-200), (q, noise, found)
    for bad in ((-0.1, 1, 1, 0.1), (1.1, 1, 1, 0.1), (0.1, -1, 1, 0.1), (0.1, 1, -1, 0.1), (0.1, 1, 1, 0), (0.1, 1, 1, 1), (math.nan, 1, 1, 0.1),
                (0.1, math.nan, 1, 0.1), (0.1, math.inf, 1, 0.1)):
        with pytest.raises(ValueError): compress.epsilon(*bad)

def test_the_least_noise_spends_what_is_planned_and_no_more():
    spent = lambda noise: compress.epsilon(0.1, noise, 50, 1e-3)
    noise = compress.least_noise(spent, 3.0)
    assert spent(noise) <= 3 < spent(noise * 0.995)
    with pytest.raises(ValueError, match='no noise'): compress.least_noise(lambda noise: 1, 0.5)

def test_clipping_shortens_what_is_longer():
    assert compress.clip(torch.tensor([3.0, 4.0]), 1).tolist() == pytest.approx([0.6, 0.8]) and compress.clip(torch.tensor([3.0, 4.0]), 6).tolist() == [3, 4]
    assert compress.clip(torch.zeros(3), 1).tolist() == [0, 0, 0]

def test_dp_fedavg_is_a_clipped_noised_sum_over_a_fixed_denominator():
    w = {'v': torch.tensor([1.0, 1.0])}
    updates = [({'v': torch.tensor([4.0, 5.0])}, 1), ({'v': torch.tensor([1.0, 0.5])}, 1)]
    noised = lambda updates, noise, w=w: fedavg.FedAvg(fedavg.noised(updates, w, 1.0, noise, 4.0, np.random.default_rng(0), True))['v']
    torch.testing.assert_close(noised(updates, 0.0), torch.tensor([1 + 0.6 / 4, 1 + (0.8 - 0.5) / 4]))
    w = {'v': torch.zeros(100000)}
    for updates in ([], [(w, 1)] * 9):      # the noise is there whoever came
        assert noised(updates, 3.0, w).std().item() == pytest.approx(3 / 4, rel=0.02)

def test_poisson_sampling_draws_each_client_on_its_own():
    drawn = [sampling.poisson(20, 0.1, sampling.rng(0, t)) for t in range(2000)]
    sizes = np.bincount([len(S_t) for S_t in drawn]) / 2000
    assert np.mean([len(S_t) for S_t in drawn]) == pytest.approx(2, rel=0.05) and sizes[0] == pytest.approx(0.9**20, rel=0.15)
    together = np.mean([{3, 4} <= set(S_t.tolist()) for S_t in drawn])
    assert together == pytest.approx(0.01, abs=0.006)

def test_dp_runs_log_what_they_cost_and_stop_when_it_is_spent(run, capsys, tmp_path):
    history = run('--dp user --clip 0.5 --noise 0.8 --frac 0.1 --epochs 12')
    assert [row['epsilon'] for row in history] == [compress.epsilon(0.1, 0.8, t, 0.1) for t in range(1, 13)]
    assert any(row['clients'] == 0 for row in history) and len({row['test_loss'] for row in history}) == 12
    words = f'--dp user --clip 0.5 --epsilon 4 --checkpoint {tmp_path}/c.pt'
    noise = float(re.search(r'noise ([\d.]+) for 3 rounds', (run(words), capsys.readouterr().out)[1])[1])
    assert compress.epsilon(0.3, noise, 3, 0.1) <= 4 < compress.epsilon(0.3, noise, 4, 0.1)
    assert len(run(f'{words} --epochs 6 --resume')) == 3 and '--epsilon 4.0 is spent after round 3' in capsys.readouterr().out
    history = run('--dp example --clip 1 --noise 2 --unequal 1')
    n_k, cost = sampling.sizes(300, 10, unequal=True, seed=1), [0]
    took = np.zeros(10, int)
    for t in (1, 2, 3):
        took[sampling.select(10, 0.3, sampling.rng(1, 'select', t))] += 1
        cost.append(max(compress.epsilon(min(10 / n, 1), 2, r * math.ceil(n / 10), 1 / max(n, 2)) for n, r in zip(n_k.tolist(), took.tolist())))
    assert [row['epsilon'] for row in history] == cost[1:]
    whole = run('--dp example --clip 1 --noise 2 --local_bs inf --frac 1')       # no sampling: the Gaussian mechanism, a step a round
    assert [row['epsilon'] for row in whole] == [compress.epsilon(1, 2, t, 1 / 30) for t in (1, 2, 3)]

@pytest.mark.parametrize('S', [1e6, 0.3])
def test_dp_sgd_clips_each_examples_gradient(S):
    dataset, net = toy()
    x, y = dataset.tensors
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(12):
        g = torch.autograd.grad(F.cross_entropy(net(x[i:i + 1]), y[i:i + 1]), list(net.parameters()))
        scale = min(1, S / torch.cat([v.flatten() for v in g]).norm().item())
        for v, u in zip(expected, g): v += scale * u / 8
    loss = fedavg.private_gradients(net, x, y, S, 0.0, 8)
    for v, p in zip(expected, net.parameters()): torch.testing.assert_close(p.grad, v)
    assert loss.item() == pytest.approx(F.cross_entropy(net(x), y).item())
    grads = []
    for n in (0, 12):       # the noise does not depend on how many examples came
        torch.manual_seed(0)
        fedavg.private_gradients(net, x[:n], y[:n], S, 2 / S, 8)
        grads.append(net.weight.grad.clone())
    torch.testing.assert_close(grads[1] - grads[0], expected[0], rtol=1e-3, atol=1e-5)
    big = nn.Linear(5, 3000)
    fedavg.private_gradients(big, x[:0], y[:0], S, 2 / S, 8)
    assert big.weight.grad.std().item() == pytest.approx(2 / 8, rel=0.05)

def test_dp_sgds_batches_are_poisson_samples():
    torch.manual_seed(0)
    batches = list(fedavg.samples(25, 200, 10, 'cpu'))
    assert len(batches) == 600 and np.mean([len(b) for b in batches]) == pytest.approx(10, rel=0.03) and len({len(b) for b in batches}) > 8
    assert np.bincount(torch.cat(batches)).min() > 180
    dataset, net = toy()
    net.weight.data[0, 0] = math.inf       # an example whose gradient is not finite counts for nothing, and spoils nothing
    fedavg.private_gradients(net, *dataset.tensors, 1.0, 1.0, 8)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())

def test_a_clients_training_is_dp_sgd():
    dataset, net = toy()[0], nn.Linear(5, 3000)
    train = lambda **more: fedavg.LocalUpdate(client_args(local_bs=4, local_ep=3, dp='example', **more), dataset, range(12)).train(net)[0]
    moved = train(clip=0.01, noise=40.0)['weight'] - net.weight
    assert moved.std().item() == pytest.approx(0.1 * 40 * 0.01 / 4 * 9 ** 0.5, rel=0.05)      # lr z S / B, in nine steps
    clipped = train(clip=0.01, noise=0.0)
    assert 0 < sum((clipped[name] - v).square().sum() for name, v in net.state_dict().items()).sqrt() < 0.1 * 0.01 / 4 * 60      # 60 examples at most

#############################################
#            Secure aggregation             #
#############################################

def test_the_group_is_rfc_3526s():
    def arctan(k, one):         # of 1/k
        total, term, i = 0, one // k, 1
        while term: total, term, i = total + (term // i if i % 4 == 1 else -(term // i)), term // k**2, i + 2
        return total
    one = 1 << 2100
    pi = 4 * (4 * arctan(5, one) - arctan(239, one))
    assert compress.PRIME == 2**2048 - 2**1984 - 1 + 2**64 * ((pi >> (2100 - 1918)) + 124476)

def test_shares_give_the_secret_and_too_few_do_not():
    secret = 2**256 - 12345
    shares = compress.split(secret, [1, 2, 5, 9, 14], 3)
    assert all(compress.join({x: shares[x] for x in xs}) == secret for xs in ((1, 2, 5), (14, 9, 2), (1, 2, 5, 9, 14)))
    assert compress.join({x: shares[x] for x in (1, 2)}) != secret
    sealed = compress.seal(b'k' * 32, b'a share')
    assert compress.unseal(b'k' * 32, sealed) == b'a share' and b'share' not in sealed
    for bad in (sealed[:-1], b'x' + sealed[1:], b''):
        with pytest.raises(ValueError): compress.unseal(b'k' * 32, bad)
    for public in (0, 1, compress.PRIME - 1, compress.PRIME):
        with pytest.raises(ValueError): compress.agree(5, public)

STEPS = compress.STEPS

def protocol(m, d, lost, threshold, xs=None):
    """secure_sum among m clients with random terms, those in lost {k: step} gone from that step on: its result, them, all answers."""
    draw = np.random.default_rng(0)
    clients = {7 * k: compress.SecureClient(7 * k, draw.integers(2**32, size=d, dtype=np.uint32) if xs is None else xs, threshold) for k in range(m)}
    answers = {step: {} for step in STEPS}
    def ask(k, step, message):
        if k in lost and STEPS.index(step) >= STEPS.index(lost[k]): return None
        answers[step][k] = clients[k].answer(step, message)
        return answers[step][k]
    try: return compress.secure_sum(ask, list(clients), threshold, d), clients, answers
    except ValueError as e: return e, clients, answers

@pytest.mark.parametrize('lost', [{}, {0: 'advertise'}, {7: 'share'}, {14: 'mask'}, {21: 'reveal'}, {7: 'share', 14: 'mask', 28: 'reveal'}])
def test_the_sum_of_the_survivors_is_exact(lost):
    (total, who), clients, answers = protocol(6, 50, lost, 3)
    assert who == [k for k in clients if lost.get(k) in (None, 'reveal')]
    assert np.array_equal(total, sum(clients[k].x.astype(np.uint64) for k in who).astype(np.uint32))
    shares = {k: json.loads(answer) for k, answer in answers['reveal'].items()}
    for v in answers['share']:          # of one that has sent its vector the server has the seed, of one that has not the masking key
        secret = compress.join({k + 1: its[str(v)] for k, its in list(shares.items())[:3]})
        assert secret == (clients[v].seed if v in who else clients[v].masking)
    for k in shares:
        with pytest.raises(ValueError, match='next'): clients[k].answer('reveal', json.dumps(who).encode())

def test_under_the_threshold_nothing_is_revealed():
    for step, left in (('advertise', 3), ('share', 3), ('mask', 3), ('reveal', 3)):
        error, _, answers = protocol(6, 5, {0: step, 7: step, 14: step}, 4)
        assert isinstance(error, ValueError) and '4 are needed' in str(error) and (step == 'reveal' or not answers['reveal'])

@pytest.mark.parametrize('message', [b'[0, 7]', b'[0, 7, 9998, 9999]', b'[7, 14, 21, 28]', b'{}', b'junk', b'[[]]'])
def test_a_client_reveals_nothing_to_a_server_that_asks_wrongly(message):
    _, clients, _ = protocol(6, 5, {k: 'reveal' for k in range(0, 42, 7)}, 4)      # all have sent their masked vectors
    with pytest.raises(ValueError): clients[0].answer('reveal', message)            # too few, unknown ones, all but itself, no list
    with pytest.raises(ValueError, match='next'): clients[0].answer('reveal', b'[0, 7, 14, 21]')
    fresh = compress.SecureClient(0, np.zeros(3, np.uint32), 2)
    with pytest.raises(ValueError, match='next'): fresh.answer('mask', b'{}')
    keys = json.loads(fresh.answer('advertise', b''))
    with pytest.raises(ValueError, match='same'): fresh.answer('share', json.dumps({0: keys, 1: keys}).encode())

def test_answers_that_make_no_sense_are_those_of_lost_clients():
    draw = np.random.default_rng(0)
    junks = b'junk', b'{}', b'[1]', b'', b'[1, 2]', b'["x", 7]', json.dumps({k: 'x' for k in range(5)}).encode()
    for step, junk in itertools.product(STEPS, junks):
        clients = {k: compress.SecureClient(k, draw.integers(2**32, size=5, dtype=np.uint32), 3) for k in range(5)}
        ask = lambda k, at, message: junk if (k, at) == (2, step) else clients[k].answer(at, message)
        total, who = compress.secure_sum(ask, range(5), 3, 5)
        assert np.array_equal(total, sum(clients[k].x.astype(np.uint64) for k in who).astype(np.uint32)) and len(who) >= 4

def test_a_masked_vector_looks_uniform():
    _, clients, answers = protocol(3, 50000, {}, 2, np.zeros(50000, np.uint32))
    for k in clients:
        y = np.frombuffer(answers['mask'][k], '<u4')
        for byte in range(4):
            counts = np.bincount(y >> (8 * byte) & 255, minlength=256)
            assert ((counts - 50000 / 256) ** 2 / (50000 / 256)).sum() < 360        # chi-squared, 255 degrees of freedom: p < 1e-5

def test_secure_aggregation_gives_the_weighted_mean(run, tmp_path):
    words = '--unequal 1 --epochs 2 --frac 0.5'
    histories = {name: run(f'{words} {more} --checkpoint {tmp_path}/{name}') for name, more in
                 (('plain', ''), ('secure', '--secagg 1'), ('pruned', '--prune 0.9 --prune_end 1'), ('both', '--secagg 1 --prune 0.9 --prune_end 1'))}
    w = {name: torch.cat([v.flatten() for v in weights(tmp_path / name).values()]) for name in histories}
    for a, b in (('plain', 'secure'), ('pruned', 'both')):
        assert 0 < (w[a] - w[b]).norm() < 5e-3 * w[a].norm()
        assert histories[a][1]['train_loss'] == pytest.approx(histories[b][1]['train_loss'], rel=1e-3)
        assert histories[b][0]['up_bytes'] > histories[a][0]['up_bytes'] and histories[b][0]['clients'] == 5
    assert (w['both'] == 0).sum() == (w['pruned'] == 0).sum() > 170000

def test_a_round_below_the_threshold_leaves_the_weights(run, tmp_path, capsys):
    history = run(f'--secagg 1 --frac 0.8 --drop 0.7 --epochs 4 --seed 3')
    given_up = [row['round'] for row in history if not row['clients']]
    out = capsys.readouterr().out
    assert given_up and all(f'round {t}: secure aggregation is given up' in out for t in given_up)
    for t in given_up:
        if t > 1: assert history[t - 1]['test_loss'] == history[t - 2]['test_loss']

def test_private_and_secure_go_together(run, tmp_path):
    for name, more in (('dp', ''), ('both', '--secagg 1')):
        history = run(f'--dp user --clip 0.3 --noise 0.01 --frac 0.6 {more} --checkpoint {tmp_path}/{name}')
    a, b = (torch.cat([v.flatten() for v in weights(tmp_path / name).values()]) for name in ('dp', 'both'))
    assert 0 < (a - b).norm() < 2e-3 * a.norm() and history[-1]['epsilon'] > 0

def test_a_terms_rounding_does_not_lengthen_it_beyond_the_clip():
    w = {'v': torch.zeros(1000)}
    wire, _ = wired(w, dp='user', clip=0.5, range=0.5, secagg=1, quantize=12)
    secure = fedavg.SecureWire(wire.args, w, np.ones(4, int))
    secure.downlink(w, None, [0], {'down_bytes': 0})
    for k in range(4):
        x = secure.term({'v': torch.randn(1000, generator=torch.Generator().manual_seed(k))}, 1.0, torch.zeros(1000), k, 1)
        assert 0.4 < np.linalg.norm(x[:-1] * secure.step - 0.5) <= 0.5
        assert x[-1] * secure.step / 0.5 * 8 == pytest.approx(1.0, abs=0.01)

def test_a_sum_that_could_overflow_is_refused_and_so_is_rounding_longer_than_the_clip(capsys):
    bits = lambda d=3, n=6, K=10000, **more: fedavg.SecureWire(wired({'v': torch.zeros(3)}, range=1.0, secagg=1, **more)[0].args, {'v': torch.zeros(d)}, np.full(K, n)).bits
    assert bits() == 16 and bits(n=7) == 15 and bits(n=7, quantize=15) == 15       # 10,000 clients of 6: 60,000 examples fit at 16 bits
    assert bits(d=199210, dp='user', clip=1.0, quantize=11) == 11
    for more in (dict(n=7, quantize=16), dict(n=10**6), dict(d=199210, dp='user', clip=1.0, quantize=10)):
        with pytest.raises(SystemExit): bits(**more)
    err = capsys.readouterr().err
    assert '15 fit' in err and 'too many examples' in err and 'take 11 or more' in err

def test_dp_adds_noise_of_z_times_s_to_what_is_not_pruned(run, tmp_path):
    words = '--dp user --clip 0.5 --lr 1e-9 --epochs 1 --frac 0.4 --prune 0.5 --prune_begin 0 --prune_end 1'
    for noise in (0, 3): run(f'{words} --noise {noise} --checkpoint {tmp_path}/{noise}')
    a, b = (torch.cat([v.flatten() for v in weights(tmp_path / str(noise)).values()]) for noise in (0, 3))
    assert ((a - b) == 0).sum() == 99400 == (b == 0).sum()
    assert (a - b)[a != 0].std().item() == pytest.approx(3 * 0.5 / 4, rel=0.02)     # z S / (C K)

def test_a_nan_client_does_not_end_a_secure_run(run, monkeypatch, capsys):
    train = fedavg.local_updates
    def one_nan(*words):
        for i, (k, w_k, loss) in enumerate(train(*words)):
            yield k, {name: v * math.nan for name, v in w_k.items()} if i == 0 else w_k, loss
    monkeypatch.setattr(fedavg, 'local_updates', one_nan)
    history = run('--engine loop --secagg 1 --frac 0.5 --epochs 2')
    assert [(row['clients'], row['rejected']) for row in history] == [(4, 1), (4, 1)]
    history = run('--engine loop --secagg 1 --frac 0.5 --epochs 1 --threshold 1')
    assert history[0]['clients'] == 0 and 'given up: 4 of 4' in capsys.readouterr().out

def test_secure_silos_and_processes_give_what_one_gives(data, run, tmp_path):
    words = '--secagg 1 --drop 0.2 --epochs 3 --engine loop'
    two = Ranks(f'{words} --checkpoint {tmp_path}/two', data)
    for rank in range(4): write_mnist(tmp_path / f'silo{rank}', train=30, test=20)
    silos = Ranks(f'{words} --drop 0.1 --epochs 2 --seed 5 --silo 1 --frac 1 --log {tmp_path}/l.csv', f'{tmp_path}/silo{{rank}}', processes=4)
    run(f'{words} --frac 0.8 --checkpoint {tmp_path}/one')
    for job in (two, silos):
        out, err = job.communicate(timeout=100)
        assert job.returncode == 0, err
    a, b = (torch.cat([v.flatten() for v in weights(tmp_path / name).values()]) for name in ('one', 'two'))
    assert (a - b).norm() < 1e-4 * a.norm()
    logged = read_log(tmp_path / 'l.csv')[1]
    assert [r['lost'] for r in logged] == ['1', '0'] and [r['clients'] for r in logged] == ['3', '4']      # one lost after its keys were shared
    assert all(float(r['train_loss']) < 2.5 for r in logged)

def test_lost_clients_come_at_random_and_are_left_out(run):
    lost = [sampling.lose(range(100), 0.3, sampling.rng(0, t)) for t in range(50)]
    assert np.mean([len(them) for them in lost]) == pytest.approx(30, rel=0.1) and {stage for them in lost for stage in them.values()} == {0, 1, 2}
    history = run('--drop 0.5 --frac 1')
    assert all(row['clients'] + row['lost'] == 10 for row in history) and sum(row['lost'] for row in history) > 5
    assert [row['up_bytes'] / row['clients'] for row in history] == [26 + 4 * 199210] * 3
    nobody = run('--drop 1 --epochs 2')
    assert [row['clients'] for row in nobody] == [0, 0] and nobody[0]['test_loss'] == nobody[1]['test_loss'] and nobody[0]['train_loss'] == ''

#############################################
#              Unequal clients              #
#############################################

def test_a_narrow_net_has_the_leading_units_of_every_hidden_layer():
    net = models.build(SimpleNamespace(model='cnn', num_channels=1, num_classes=10, separable=1)).eval()
    thin, w = models.narrowed(net, 0.3), net.state_dict()
    shapes = {'conv1.weight': (3, 1, 5, 5), 'conv2.0.weight': (3, 1, 5, 5), 'conv2.1.weight': (6, 3, 1, 1), 'fc1.weight': (15, 96), 'fc2.weight': (10, 15)}
    for name, v in thin.state_dict().items():
        assert name.endswith('bias') or v.shape == shapes[name]
        assert torch.equal(v, w[name][tuple(map(slice, v.shape))])
    for name in ('conv1', 'conv2.0', 'conv2.1', 'fc1'):        # units that give 0 might as well not be there
        for v in net.get_submodule(name).parameters(): v.data[len(thin.get_submodule(name).bias):] = 0
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(thin(x), net(x))

def test_each_weight_is_averaged_over_those_who_hold_it():
    w = {'v': torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    ones = {'v': torch.ones(2, 2)}
    narrow = {'v': torch.full((2, 2), 5.0)}, {'v': torch.tensor([[3.0, 0.0], [0.0, 0.0]])}     # holds one value, n_k = 3
    assert fedavg.FedAvg([(w, {'v': torch.zeros(2, 2)}), (ones, {'v': torch.tensor([[1.0, 1.0], [1.0, 0.0]])}), narrow])['v'].tolist() == [[4, 1], [1, 4]]

def test_a_narrow_client_trains_its_part_and_leaves_the_rest():
    dataset, net = image_toy('2nn', 20)
    args = client_args(widths=(1.0, 0.5), seed=1, lr_decay=1.0, compile=0, dp=None, mu=0, device=torch.device('cpu'))
    parts = {0: np.arange(10), 3: np.arange(10, 20)}
    made = {k: w_k for k, w_k, _ in fedavg.Widths(args, net, lambda net: fedavg.local_updates)(args, net, dataset, parts, {0: 1, 3: 1}, 1)}
    small = models.narrowed(net, 0.5)
    fedavg.seed_torch(1, 'train', 1, 3)
    expected, _ = fedavg.LocalUpdate(args, dataset, parts[3]).train(small)
    for name, v in net.state_dict().items():
        at = tuple(map(slice, expected[name].shape))
        assert torch.equal(made[3][name][at], expected[name]) and not torch.equal(expected[name], v[at])
        rest = torch.ones_like(v, dtype=torch.bool)
        rest[at] = False
        assert torch.equal(made[3][name][rest], v[rest])
    assert same(made[0], next(w for _, w, _ in fedavg.local_updates(args, net, dataset, parts, {0: 1}, 1)))

@pytest.mark.parametrize('engine', ['loop', 'stacked'])
def test_width_one_is_plain_fedavg_bit_for_bit_and_half_sends_less(run, tmp_path, engine):
    for name, words in (('plain', ''), ('one', '--widths 1'), ('half', '--widths 0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,1 --epochs 1 --seed 4')):
        history = run(f'--engine {engine} {words} --checkpoint {tmp_path}/{name}')
    assert same(weights(tmp_path / 'plain'), weights(tmp_path / 'one'))
    assert 9 not in sampling.select(10, 0.3, sampling.rng(4, 'select', 1))          # so that all of them hold a half
    half = 784 * 100 + 100 + 100 * 100 + 100 + 100 * 10 + 10
    assert history[0]['up_bytes'] == history[0]['down_bytes'] == 3 * (26 + 4 * half)
    run(f'--lr 1e-30 --epochs 1 --seed 4 --checkpoint {tmp_path}/w0')
    half, first = (weights(tmp_path / name)['fc2.weight'] for name in ('half', 'w0'))
    assert torch.equal(half[:, 100:], first[:, 100:]) and torch.equal(half[100:], first[100:]) and (half != first)[:100, :100].float().mean() > 0.5

def test_widths_go_with_a_smaller_wire(run):
    fp32 = run('--widths 1,0.5,0.25 --frac 1')
    history = run('--widths 1,0.5,0.25 --frac 1 --quantize 8 --topk 0.5 --prune 0.5')
    assert history[-1]['clients'] == 10 and history[-1]['up_bytes'] < fp32[-1]['up_bytes'] / 8

@pytest.mark.parametrize('model, channels, layers', [('2nn', 1, 3), ('mlp', 1, 2), ('cnn', 1, 4), ('cnn', 3, 5), ('paper_cnn', 1, 4), ('paper_cnn', 3, 5)])
def test_a_net_that_is_cut_is_the_net(model, channels, layers):
    net = models.build(SimpleNamespace(model=model, num_channels=channels, num_classes=10)).eval()
    x = torch.randn(2, channels, *((28, 28) if channels == 1 else (32, 32)))
    for L in range(1, layers):
        front, back = models.split(net, L)
        assert torch.equal(back(front(x)), net(x))
        assert {**front.state_dict(), **back.state_dict()}.keys() == net.state_dict().keys()
        assert {*map(id, front.parameters())} | {*map(id, back.parameters())} == {*map(id, net.parameters())}
        assert len([*front.parameters()]) + len([*back.parameters()]) == len([*net.parameters()])
    for L in (0, layers):
        with pytest.raises(ValueError, match=f'1 to {layers - 1}'): models.split(net, L)

def test_a_cut_run_is_the_uncut_one_and_counts_what_crosses(run, tmp_path, capsys):
    history = run(f'--cut 2 --momentum 0.5 --checkpoint {tmp_path}/cut')
    whole = run(f'--momentum 0.5 --engine loop --checkpoint {tmp_path}/whole')
    a, b = weights(tmp_path / 'cut'), weights(tmp_path / 'whole')
    assert all((a[name] - b[name]).abs().max() <= 1e-6 for name in a) and [r['test_acc'] for r in history] == [r['test_acc'] for r in whole]
    front = 26 + 4 * (784 * 200 + 200 + 200 * 200 + 200)
    assert history[0]['up_bytes'] == 3 * (front + 3 * (26 + 4 * 10 * (200 + 1)))        # 3 batches of 10, activations and labels
    assert history[0]['down_bytes'] == 3 * (front + 3 * (26 + 4 * 10 * 200))            # and the activations' gradients
    with pytest.raises(SystemExit) as e: run('--cut 1 --lr 1e9 --local_ep 5')           # what is not finite crosses, and is refused in the end
    assert e.value.code == 1 and 'lower --lr' in capsys.readouterr().err

def test_a_cut_net_keeps_back_what_topk_does_not_send_of_its_front(run, tmp_path):
    for name, words in (('kept', ''), ('lost', '--error_feedback 0')): run(f'--cut 1 --topk 0.01 --frac 1 {words} --checkpoint {tmp_path}/{name}')
    kept, lost = (torch.load(tmp_path / name, weights_only=True) for name in ('kept', 'lost'))
    assert kept['wire']['kept'][3][0].norm() > 0 and not lost['wire']['kept'][3] and not same(kept['w'], lost['w'])
    assert run(f'--cut 1 --topk 0.01 --frac 1 --checkpoint {tmp_path}/kept --resume --personal finetune')       # nothing left to train

def test_the_halves_of_a_net_may_lie_on_two_devices():
    net = models.MLP(784, 20, 10)
    x, y, crossed = torch.randn(4, 1, 28, 28), torch.arange(4), []
    front, back = models.split(net, 1)
    back.to('meta')
    with pytest.raises(NotImplementedError, match='meta'):      # it has no data, so the gradient is stuck there: but it was made there
        fedavg.split_gradients(front, back, x, y, cross=lambda v, up: (crossed.append((up, v.device.type, tuple(v.shape))), v)[1])
    assert crossed == [(True, 'cpu', (4, 21)), (False, 'meta', (4, 20))]

def test_the_first_gpu_named_is_the_clients(run, monkeypatch):
    class Seen(Exception): pass
    def seen(front, back, *more): raise Seen(*(next(part.parameters()).device.type for part in (front, back)))
    monkeypatch.setattr(fedavg, 'split_gradients', seen)
    monkeypatch.setattr(fedavg, 'device_of', lambda gpu: torch.device(['cpu', 'meta'][gpu]))
    with pytest.raises(Seen) as e: run('--gpu 0,1 --cut 1')
    assert e.value.args == ('cpu', 'meta')

def test_the_halves_train_on_two_gpus(run, tmp_path):
    if torch.cuda.device_count() < 2: pytest.skip('two GPUs are needed')
    for name, words in (('two', '--gpu 0,1 --cut 2'), ('one', '--gpu 0 --engine loop')): run(f'{words} --checkpoint {tmp_path}/{name}')
    a, b = weights(tmp_path / 'two'), weights(tmp_path / 'one')
    assert all((a[name] - b[name]).abs().max() <= 1e-5 for name in a)

def test_distillation_is_hintons_loss():
    student, teacher, a, T = [1.0, 3.0], [2.0, -1.0], 0.3, 2.0
    soft = lambda z, T: [math.exp(v / T) / sum(math.exp(u / T) for u in z) for v in z]
    p, q = soft(teacher, T), soft(student, T)
    by_hand = 0.7 * -math.log(soft(student, 1)[0]) + 0.3 * 4 * sum(p_i * math.log(p_i / q_i) for p_i, q_i in zip(p, q))
    y = torch.tensor([[0.0, *teacher]])
    assert fedavg.distillation(torch.tensor([student]), y, a, T).item() == pytest.approx(by_hand, rel=1e-6)
    assert fedavg.distillation(torch.tensor([teacher]), y, 1.0, T).item() == pytest.approx(0, abs=1e-7)
    assert fedavg.distillation(torch.tensor([student]), y, 0.0, T).item() == pytest.approx(F.cross_entropy(torch.tensor([student]), torch.tensor([0])).item())

def test_a_teacher_teaches_a_smaller_net(run, refused, tmp_path, capsys):
    for name, words in (('teacher', '--model cnn --epochs 2'), ('alone', ''), ('untaught', f'--teacher {tmp_path}/teacher --distill 0'),
                        ('taught', f'--teacher {tmp_path}/teacher --distill 1'), ('loop', f'--teacher {tmp_path}/teacher --distill 1 --engine loop')):
        history = run(f'{words} --lr 0.05 --checkpoint {tmp_path}/{name}')
    alone, untaught, taught, loop = (weights(tmp_path / name)['fc3.weight'] for name in ('alone', 'untaught', 'taught', 'loop'))
    torch.testing.assert_close(alone, untaught, rtol=0, atol=1e-6)      # a = 0 is plain training
    torch.testing.assert_close(taught, loop, rtol=0, atol=1e-6)
    assert (taught - alone).abs().max() > 1e-3 and history[0]['up_bytes'] == 3 * (26 + 4 * 199210)
    out = capsys.readouterr().out
    assert 'student 2nn: 199,210 parameters, 0.797 MB' in out and 'teacher cnn: 21,840 parameters, 0.0874 MB' in out
    (tmp_path / 'junk').write_bytes(b'junk')
    assert 'not a checkpoint' in refused(['--num_users', '10', '--teacher', f'{tmp_path}/junk'])
    saved = torch.load(tmp_path / 'teacher', weights_only=True)
    for name, value, said in (('dataset', 'fmnist', 'take one of mnist'), ('personal_layers', ('fc2',), 'fc2'), ('model', '2nn', 'not those of 2nn')):
        torch.save(saved | {'options': saved['options'] | {name: value}}, tmp_path / 'other')
        assert said in refused(['--num_users', '10', '--teacher', f'{tmp_path}/other'])

def test_a_clients_accuracy_is_that_on_the_labels_it_holds():
    class Says(nn.Module):      # 0, whatever it sees
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.zeros(3))
        def forward(self, x): return self.v.expand(len(x), 3)
    test, net = TensorDataset(torch.zeros(10, 1), torch.tensor([0] * 5 + [1] * 4 + [2])), Says()
    w = {'v': torch.tensor([1.0, 0.0, 0.0])}
    args = SimpleNamespace(num_users=2, device='cpu', num_classes=3, bs=4)
    labels = {0: torch.tensor([0, 1, 1, 1]), 1: torch.tensor([2, 2])}
    got = fedavg.personal(args, [(0, w), (1, {'v': torch.tensor([0.0, 0.0, 1.0])})], net, w, *test.tensors, labels)
    assert got.tolist() == [[0.25, 1.0], [0.25, 0.0]]       # a quarter of client 0's labels are 0; client 1's own says 2

def accuracies(out): return [[float(v) for v in re.findall(r'([\d.]+) %', line)] for line in out.splitlines()[-2:]]

def test_mix_goes_from_finetune_to_the_global_model(run, tmp_path, capsys):
    lines = {}
    run(f'--iid 0 --personal finetune --log {tmp_path}/l.csv')
    own, w = np.array(read_log(tmp_path / 'l.csv')[0]['accuracies']).T
    assert accuracies(capsys.readouterr().out)[0][0] == round(100 * own.mean(), 2) and len(own) == len(w) == 10
    for words in ('finetune', 'mix --mix 0', 'mix --mix 1', 'mix --mix 0.5 --engine loop'):
        run(f'--iid 0 --personal {words}')
        lines[words] = accuracies(capsys.readouterr().out)
    own, w = lines['finetune']
    assert lines['mix --mix 0'] == [own, w] and lines['mix --mix 1'] == [w, w] and own[0] > w[0] + 20 and lines['mix --mix 0.5 --engine loop'][0] != own

def test_personal_layers_stay_with_their_clients(run, tmp_path):
    for engine in ('loop', 'stacked'):
        history = run(f'--personal layers --personal_layers fc1,fc3 --frac 1 --iid 0 --engine {engine} --checkpoint {tmp_path}/{engine}')
    run(f'--lr 1e-30 --checkpoint {tmp_path}/w0')
    first, w = weights(tmp_path / 'w0'), weights(tmp_path / 'loop')
    assert all(torch.equal(first[name], w[name]) != name.startswith('fc2') for name in w)
    assert history[0]['up_bytes'] == history[0]['down_bytes'] == 10 * (26 + 4 * (200 * 200 + 200))
    loop, stacked = (torch.load(tmp_path / name, weights_only=True)['wire']['kept'][3] for name in ('loop', 'stacked'))
    start = torch.cat([v.flatten() for name, v in first.items() if not name.startswith('fc2')])
    for k in range(10): assert (loop[k] - stacked[k]).norm() <= 1e-4 * loop[k].norm() and (loop[k] != start).float().mean() > 0.5
    assert len(loop[0]) == 199210 - 40200 and not torch.equal(loop[0], loop[1])

def test_who_is_late_and_what_the_others_do_in_time():
    seconds, draw = {1: 0.5, 2: 2.0, 5: 4.0, 7: 9.0}, sampling.rng(0)
    in_time = lambda S_t, seconds, E, m, deadline=math.inf: sampling.in_time(S_t, seconds, E, m, deadline, draw)
    assert in_time([1, 2, 5, 7], seconds, 4, 4) == ({1: 4, 2: 4, 5: 4, 7: 4}, 9)
    assert in_time([1, 2, 5, 7], seconds, 4, 4, deadline=3.0) == ({1: 4, 2: 4, 5: 3.0, 7: 4 / 3}, 3)
    assert in_time([1, 2, 5, 7], seconds, 4, 4, deadline=1.0) == ({1: 4, 2: 2, 5: 1}, 1)        # 7 would do 4/9 of an epoch
    assert in_time([1, 5, 7], seconds, 1, 2) == ({1: 1, 5: 1}, 4)                               # the first two
    assert in_time([1], seconds, 1, 2, deadline=3.0) == ({1: 1}, 3)                             # it waits for another in vain
    assert in_time([], seconds, 1, 2) == ({}, 0)
    ties = [k for _ in range(300) for k in in_time(range(10), np.ones(10), 1, 5)[0]]     # equals come first by turns
    assert min(ties.count(k) for k in range(10)) > 100
    assert sampling.durations([10, 20, 40], 0).tolist() == [0.5, 1, 2]
    speeds = np.log(sampling.durations(np.ones(20000), 0.7))
    assert abs(speeds.std() - 0.7) < 0.02 and (sampling.durations([1, 1, 1], 1, 0) != sampling.durations([1, 1, 1], 1, 1)).any()
    assert fedavg.steps(25, 1.5, 10) == 4 and fedavg.steps(25, 3, math.inf) == 3 and fedavg.steps(3, 2, 10) == 2

def test_clients_do_the_steps_that_fit_in_both_engines():
    dataset, net = image_toy('2nn')
    parts, epochs = sampling.partition(dataset.tensors[1], 4, True, unequal=True), {0: 1.0, 1: 1.7, 2: 3, 3: 2.2}
    loop, stacked = both(client_args(local_ep=3, local_bs=4, lr=0.05), net, dataset, parts, epochs=epochs, own={1: {'fc3.bias': torch.ones(10)}})
    for k, (w_k, loss) in loop.items():
        assert loss == pytest.approx(stacked[k][1], rel=1e-5)
        for name, v in w_k.items(): assert (v - stacked[k][0][name]).norm() <= 1e-5 * v.norm()
    fedavg.seed_torch(1, 'train', 2, 0)
    plain, _ = fedavg.LocalUpdate(client_args(local_bs=4), dataset, parts[0]).train(net, 0.05 * 0.9)
    assert same(plain, loop[0][0]) and loop[1][0]['fc3.bias'].mean() > 0.9

def test_a_deadline_far_away_changes_nothing_and_a_close_one_does(run, tmp_path, capsys):
    words = '--local_ep 2 --frac 0.5 --seed 2'
    for name, more in (('none', ''), ('far', '--speeds lognormal:1 --deadline 1e9'), ('near', '--speeds lognormal:1 --deadline 0.7')):
        history = run(f'{words} {more} --checkpoint {tmp_path}/{name}')
    assert same(weights(tmp_path / 'none'), weights(tmp_path / 'far')) and not same(weights(tmp_path / 'none'), weights(tmp_path / 'near'))
    duration = sampling.durations([30] * 10, 1.0, 2)
    for row in history:
        S_t = sampling.select(10, 0.5, sampling.rng(2, 'select', row['round']))
        assert row['late'] == sum(duration[k] > 1.4 for k in S_t) == 5 - row['clients'] and row['round_time'] == 0.7
    assert sum(row['late'] for row in history) and 'simulated time 2.1' in capsys.readouterr().out

def test_the_first_m_of_more_are_averaged(run, tmp_path):
    history = run('--speeds lognormal:1 --overselect 0.5 --frac 0.4')
    duration = sampling.durations([30] * 10, 1.0, 1)
    for row in history:
        S_t = sampling.select(10, 0.4, sampling.rng(1, 'select', row['round']), 0.5)
        assert len(S_t) == 6 and row['clients'] == 4 and row['late'] == 2 and row['round_time'] == sorted(duration[S_t])[3]
        assert row['down_bytes'] == 6 / 4 * row['up_bytes']

def test_corrupt_updates_are_refused_in_turn_and_the_others_averaged(run, capsys):
    x = torch.arange(5.0)
    for kind, reason in enumerate(('NaN', 'NaN', 'not an encoded update', 'values')):
        for coded in (compress.encode, lambda x: compress.encode(x, 4, 0.5)):
            payload = coded(x)
            with pytest.raises(ValueError, match=reason): compress.decode(fedavg.damaged(x, payload, kind, coded, sampling.rng(1)), 5)
    assert [*sampling.corrupted(range(6), 1.0, sampling.rng(0)).values()] in [[*itertools.islice(itertools.cycle(range(4)), i, i + 6)] for i in range(4)]
    hits = [len(sampling.corrupted(range(10), 0.3, sampling.rng(t))) for t in range(2000)]
    assert np.mean(hits) == pytest.approx(3, abs=0.1)
    history = run('--corrupt 0.4 --frac 1 --epochs 5')
    said = capsys.readouterr().out
    assert all(row['rejected'] + row['clients'] == 10 for row in history) and said.count('is left out') == sum(row['rejected'] for row in history) > 10
    assert [row['clients'] for row in run('--corrupt 1 --frac 0.1 --epochs 2')] == [0, 0]       # and the run goes on

def test_fedprox_pulls_each_step_towards_the_start():
    dataset, net = toy(8)
    w, lr, mu = [p.detach().clone() for p in net.parameters()], 0.1, 0.5
    expected = copy.deepcopy(net)
    for _ in range(2):
        loss = F.cross_entropy(expected(dataset.tensors[0]), dataset.tensors[1]) + mu / 2 * sum(((p - p_0) ** 2).sum() for p, p_0 in zip(expected.parameters(), w))
        expected.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in expected.parameters(): p -= lr * p.grad
    def train(**more):
        torch.manual_seed(0)
        return fedavg.LocalUpdate(client_args(local_ep=2, local_bs=math.inf, **more), dataset, range(8)).train(net)[0]
    for name, v in expected.state_dict().items(): torch.testing.assert_close(train(mu=mu)[name], v)
    assert same(train(mu=0.0), train()) and not same(train(mu=mu), train())

def test_mu_reaches_the_run(run, tmp_path):
    for name in ('0', '0.00', '50'): run(f'--lr 0.01 --local_ep 3 --mu {name} --checkpoint {tmp_path}/{name}')
    assert same(weights(tmp_path / '0'), weights(tmp_path / '0.00')) and not same(weights(tmp_path / '0'), weights(tmp_path / '50'))

def test_images_are_turned_sheared_zoomed_and_shifted():
    no, one = torch.zeros(1), torch.ones(1, 2)
    x = torch.arange(25.0).view(1, 1, 5, 5)
    shown = lambda *theta: F.grid_sample(x, F.affine_grid(sampling.affine(*theta), x.shape, align_corners=False), align_corners=False)
    torch.testing.assert_close(shown(no, no, one, torch.zeros(1, 2)), x)
    torch.testing.assert_close(shown(torch.tensor([math.pi / 2]), no, one, torch.zeros(1, 2)), x.rot90(1, (2, 3)))
    torch.testing.assert_close(shown(no, no, one, torch.tensor([[0.4, 0.0]]))[..., :4], x[..., 1:])       # 2 is the width
    torch.manual_seed(0)
    x = sampling.synthetic(64, 0, 'train').tensors[0]
    seen = sampling.augmented(x)
    assert seen.shape == x.shape and (seen != x).flatten(1).any(1).all() and abs(seen.mean() - x.mean()) < 0.1
    left = torch.zeros(400, 3, 32, 32)
    left[..., :16] = 1
    mirrored = sampling.augmented(left, flip=True)[..., :4].mean((1, 2, 3)) < 0.5
    assert 150 < mirrored.sum() < 250 and not (sampling.augmented(left)[..., :4].mean((1, 2, 3)) < 0.5).any()

def test_cifars_images_are_the_tutorials():
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in sampling.MEAN_STD['cifar'])
    raw = torch.rand(40, 3, 32, 32)
    x = (raw - mean) / std
    one = raw[0, :, 4:28, 4:28]
    torch.testing.assert_close(sampling.tutorial(x, False)[0], (one - one.mean()) / one.std(correction=0), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    raw = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing='ij'))[[0, 1, 1]].expand(400, 3, 32, 32) / 32   # row, column, column
    shown = sampling.tutorial((raw - mean) / std)
    torch.testing.assert_close(shown.mean((1, 2, 3)), torch.zeros(400), rtol=0, atol=1e-5)
    step = shown[..., 0, 1] - shown[..., 0, 0]                          # of the column's channel: its sign says which are mirrored
    assert 150 < (step[:, 1] < 0).sum() < 250 and (shown[:, 0, 1, 0] > shown[:, 0, 0, 0]).all()
    shown = sampling.tutorial((raw + torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1) - mean) / std)
    contrast = shown.std((2, 3))[:, 0] / (shown.mean((2, 3))[:, 2] - shown.mean((2, 3))[:, 0])     # within a channel, beside that between two
    assert contrast.max() > 5 * contrast.min()      # 0.2 to 1.8; the crops alone would make less than 2
    dot = torch.zeros(400, 3, 32, 32)
    dot[..., 16, 16] = 1
    at = sampling.tutorial(dot)[:, 0].flatten(1).argmax(1)
    assert {*(at // 24).tolist()} == {*range(8, 17)} and {*(at % 24).tolist()} == {*range(7, 17)}      # all crops, and mirrored
    dim = (0.5 + 0.004 * raw[:2] - mean) / std          # a contrast of one grey level is stretched, none at all is not
    assert sampling.tutorial(dim, False).std((1, 2, 3), correction=0).min() > 0.9 and sampling.tutorial(torch.zeros(1, 3, 32, 32), False).isfinite().all()
    assert sampling.tutorial(x[:0]).shape == (0, 3, 24, 24) and sampling.augmented(x[:0]).shape == (0, 3, 32, 32)

def test_small_clients_get_copies_of_their_rare_labels():
    labels = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 0])
    parts = {0: np.array([0, 1, 2, 3]), 1: np.array([4, 5, 6, 7, 8, 9]), 2: np.array([10])}
    more = sampling.lacking(parts, labels, 4.0, sampling.rng(0))
    assert more[0].tolist() == [3] and more[1].tolist() == [9, 9] and more[2].tolist() == [10, 10, 10]     # 2 of each label; 3; 4
    train = TensorDataset(torch.rand(11, 1, 28, 28), torch.from_numpy(labels))
    bigger, grown = fedavg.balanced(train, parts, 4.0, 0)
    torch.manual_seed(5)
    assert torch.equal(fedavg.balanced(train, parts, 4.0, 0)[0].tensors[0], bigger.tensors[0])     # whatever was drawn before
    assert {k: len(v) for k, v in grown.items()} == {0: 5, 1: 8, 2: 4} and len(bigger) == 17
    x, y = bigger.tensors
    assert y[grown[0]].tolist() == [0, 0, 0, 1, 1] and y[grown[2]].tolist() == [0] * 4 and torch.equal(x[:11], train.tensors[0])
    assert len({*map(int, np.concatenate(list(grown.values())))}) == 17 and not torch.equal(x[11], x[3])

def test_copies_do_not_weigh_in_the_average(run, monkeypatch):
    weighed = []
    monkeypatch.setattr(fedavg, 'FedAvg', lambda w, average=fedavg.FedAvg, **more: average([(v, (weighed.append(n), n)[1]) for v, n in w], **more))
    durations, loads = fedavg.durations, []
    monkeypatch.setattr(fedavg, 'durations', lambda load, *more: (loads.extend(load), durations(load, *more))[1])
    run('--balance 1 --augment 1 --unequal 1 --frac 1 --epochs 1')
    n_k = sampling.sizes(300, 10, True, 1)
    assert sorted(weighed) == sorted([0, *n_k]) and min(loads) > 15 > min(n_k)      # but they take time

def test_augmentation_reaches_the_step(run, tmp_path):
    for engine in ('loop', 'stacked'):
        for name in (0, 1): run(f'--augment {name} --epochs 1 --engine {engine} --checkpoint {tmp_path}/{engine}{name}')
        assert not same(weights(tmp_path / f'{engine}0'), weights(tmp_path / f'{engine}1'))

#############################################
#            Partitions (d, e)              #
#############################################

SPLITS = [dict(iid_=1), dict(iid_=0), dict(iid_=0, alpha=1e-300), dict(iid_=0, alpha=0.1), dict(iid_=0, alpha=1e300)]

@pytest.mark.parametrize('unequal', [0, 1])
@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('K', [1, 7, 50, 100, 137, 599, 1000])
def test_partitions_are_disjoint_and_cover_every_example(K, split, unequal):
    labels = np.random.default_rng(0).integers(10, size=1000)
    parts = sampling.partition(labels, K, **split, unequal=unequal)
    assert list(parts) == list(range(K)) and min(map(len, parts.values())) >= 1
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1000))
    sizes = sorted(map(len, parts.values()))
    assert (sizes[-1] > 2 * sizes[0]) if unequal and 1 < K < 500 else unequal or sizes[-1] - sizes[0] <= 1

def test_more_clients_than_examples_is_an_error():
    for K in (0, 1001):
        with pytest.raises(ValueError, match='1 to 1000'): sampling.partition(np.zeros(1000), K)

@pytest.mark.parametrize('unequal', [0, 1])
@pytest.mark.parametrize('K', [7, 100, 137])
def test_a_client_has_at_most_two_label_sorted_shards(K, unequal):
    labels = np.random.default_rng(1).permutation(1000)     # all different: a shard is a run of whole numbers
    for idxs in sampling.partition(labels, K, iid_=0, unequal=unequal).values():
        assert (np.diff(np.sort(labels[idxs])) > 1).sum() <= 1

def test_the_papers_partitions_of_mnist():
    class Labels:
        targets = torch.arange(60000) // 6000
        def __len__(self): return 60000
    mnist = Labels()
    for users in (sampling.mnist_iid(mnist, 100), sampling.mnist_noniid(mnist, 100), sampling.cifar_iid(mnist, 100)):
        assert {len(idxs) for idxs in users.values()} == {600} and len(np.unique(np.concatenate(list(users.values())))) == 60000
    labels = [len(set((idxs // 6000).tolist())) for idxs in sampling.mnist_noniid(mnist, 100).values()]
    assert max(labels) == 2 and min(labels) == 1            # 300 divides 6000: no shard holds two labels
    assert sampling.labels_of([(None, 3), (None, 5)]).tolist() == [3, 5]

def test_dirichlet_goes_from_one_label_a_client_to_all_alike():
    labels = np.arange(10000) % 10
    def commonest(alpha):       # mean share of a client's commonest label
        parts = sampling.partition(labels, 50, iid_=0, alpha=alpha)
        return np.mean([np.bincount(labels[i], minlength=10).max() / len(i) for i in parts.values()])
    shares = [commonest(alpha) for alpha in (0.01, 1, 1000)]
    assert shares[0] > 0.85 and 0.2 < shares[1] < 0.5 and shares[2] < 0.17

#############################################
#        Nets and evaluation (f, j)         #
#############################################

def test_the_papers_cnn_starts_from_glorots_initialisation():
    w = models.PaperCNNMnist(SimpleNamespace(num_channels=1, num_classes=10)).state_dict()
    for name, fans in {'conv1': 25 + 32 * 25, 'conv2': 32 * 25 + 64 * 25, 'fc1': 3136 + 512, 'fc2': 512 + 10}.items():
        v, bound = w[f'{name}.weight'], math.sqrt(6 / fans)
        assert 0.95 * bound < v.abs().max() <= bound and abs(v.std() / bound - 3**-0.5) < 0.05 and not w[f'{name}.bias'].any()

@pytest.mark.parametrize('name, channels, count', [('2nn', 1, 199210), ('paper_cnn', 1, 1663370), ('paper_cnn', 3, 1068298),
                                                   ('mlp', 1, 159010), ('cnn', 1, 21840), ('cnn', 3, 62006),
                                                   ('separable', 1, 17300), ('separable', 3, 59858)])
def test_parameter_counts(name, channels, count):
    args = SimpleNamespace(model='cnn', separable=1) if name == 'separable' else SimpleNamespace(model=name)
    args.num_channels, args.num_classes = channels, 10
    net = models.build(args)
    assert sum(p.numel() for p in net.parameters()) == count
    assert net(torch.randn(2, channels, *((28, 28) if channels == 1 else (32, 32)))).shape == (2, 10)

def test_a_net_that_is_not_known_is_refused():
    for model, channels in (('resnet', 1), ('2nn', 2)):
        with pytest.raises(KeyError): models.build(SimpleNamespace(model=model, num_channels=channels, num_classes=10))

def test_the_papers_nets_are_their_layers_in_order():
    net, x = models.TwoNN(784, 200, 10), torch.randn(3, 1, 28, 28)
    assert torch.equal(net(x), nn.Sequential(nn.Flatten(), net.fc1, nn.ReLU(), net.fc2, nn.ReLU(), net.fc3)(x))
    net, pool = models.PaperCNNMnist(SimpleNamespace(num_channels=1, num_classes=10)), nn.MaxPool2d(2)
    layers = net.conv1, nn.ReLU(), pool, net.conv2, nn.ReLU(), pool, nn.Flatten(), net.fc1, nn.ReLU(), net.fc2
    assert torch.equal(net(x), nn.Sequential(*layers)(x))
    net, x = models.PaperCNNCifar(SimpleNamespace(num_channels=3, num_classes=10)), torch.randn(3, 3, 24, 24)
    pool = nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), -math.inf), nn.MaxPool2d(3, 2))     # TensorFlow's SAME, from 24 to 12
    layers = (net.conv1, nn.ReLU(), pool, net.norm, net.conv2, nn.ReLU(), net.norm, pool, nn.Flatten(),
              net.fc1, nn.ReLU(), net.fc2, nn.ReLU(), net.fc3)
    torch.testing.assert_close(net(x), nn.Sequential(*layers)(x))

def test_state_dict_keys_of_the_mirrored_layout():
    both = lambda *layers: [f'{layer}.{kind}' for layer in layers for kind in ('weight', 'bias')]
    args = SimpleNamespace(num_channels=1, num_classes=10)
    assert list(models.MLP(784, 200, 10).state_dict()) == both('layer_input', 'layer_hidden')
    assert list(models.CNNMnist(args).state_dict()) == both('conv1', 'conv2', 'fc1', 'fc2')
    args.num_channels = 3
    assert list(models.CNNCifar(args).state_dict()) == both('conv1', 'conv2', 'fc1', 'fc2', 'fc3')

def test_dropout_is_where_the_layout_has_it():
    net, x = models.CNNMnist(SimpleNamespace(num_channels=1, num_classes=10)), torch.randn(3, 1, 28, 28)
    assert not torch.equal(net.train()(x), net(x)) and torch.equal(net.eval()(x), net(x))
    net.conv2_drop = nn.Identity()
    assert not torch.equal(net.train()(x), net(x))          # fc1's
    mlp = models.MLP(784, 50, 10)
    seen = []
    mlp.relu.register_forward_pre_hook(lambda _, h: seen.append(h[0]))
    mlp.train()(x)
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7        # half of the relu's inputs are dropped

def test_the_cifar_net_sees_the_central_crop_and_tensorflows_normalization():
    net, x = models.build(SimpleNamespace(model='paper_cnn', num_channels=3, num_classes=10)), torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), net(x[..., 4:28, 4:28]))
    v = torch.randn(1, 64, 1, 1)        # channel 30 is divided by (1 + 0.001/9 * sum of squares of channels 26 to 34) ** 0.75
    torch.testing.assert_close(net.norm(v)[0, 30], v[0, 30] / (1 + 0.001 / 9 * (v[0, 26:35] ** 2).sum()) ** 0.75)

def test_evaluation_is_right_and_changes_nothing():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    net[1].eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    x, y, grad = torch.randn(25, 4), torch.randint(3, (25,)), []
    net.register_forward_hook(lambda _, __, logits: grad.append(logits.requires_grad))
    state = torch.get_rng_state()
    loss, accuracy = fedavg.evaluate(net, x, y, 10)
    assert same(net.state_dict(), before) and torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes and not any(grad)
    logits = copy.deepcopy(net).eval()(x)
    assert loss == pytest.approx(F.cross_entropy(logits, y).item()) and accuracy == (logits.argmax(1) == y).sum().item() / 25

#############################################
#              Randomness (k)               #
#############################################

def test_same_seed_same_bits_other_seed_other_bits(run, tmp_path):
    for name, words in (('a', '--seed 4'), ('b', '--seed 4 --bs 7 --verbose'), ('c', '--seed 5')):
        run(f'--model mlp --unequal 1 --checkpoint {tmp_path}/{name} {words}')
    a, b, c = (weights(tmp_path / name) for name in 'abc')
    assert same(a, b) and not same(a, c)

def test_the_seed_reaches_partition_selection_initialisation_and_shuffling(run, tmp_path):
    labels = np.arange(100) % 10
    for split in SPLITS[:2] + SPLITS[3:4]:
        a, b, c = (np.concatenate(list(sampling.partition(labels, 10, **split, seed=s).values())) for s in (1, 1, 2))
        assert (a == b).all() and (a != c).any()
    lengths = [[len(i) for i in sampling.partition(labels, 10, unequal=True, seed=s).values()] for s in (1, 1, 2)]
    assert lengths[0] == lengths[1] != lengths[2]
    draws = {s: [tuple(sampling.select(100, 0.1, sampling.rng(s, 'select', t))) for t in (1, 2)] for s in (1, 2)}
    assert len({*draws[1], *draws[2]}) == 4
    for s in (1, 2): run(f'--epochs 1 --lr 1e-30 --seed {s} --checkpoint {tmp_path}/w{s}')
    assert not same(weights(tmp_path / 'w1'), weights(tmp_path / 'w2'))
    dataset, net = toy()
    first = lambda s, t, k: next(fedavg.local_updates(client_args(seed=s, lr_decay=1.0, local_bs=2), net, dataset, {k: range(12)}, {k: 1}, t))[1]
    assert same(first(1, 1, 0), first(1, 1, 0))
    assert not any(same(first(1, 1, 0), other) for other in (first(2, 1, 0), first(1, 2, 0), first(1, 1, 1)))

def test_synthetic_digits_are_the_same_for_the_same_seed():
    a, b, c = (sampling.synthetic(200, s, 'train').tensors for s in (1, 1, 2))
    assert not torch.equal(sampling.synthetic(200, 1, 'test').tensors[0], a[0])
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])
    assert a[0].shape == (200, 1, 28, 28) and set(a[1].tolist()) == set(range(10))

#############################################
#                 The data                  #
#############################################

def test_small_files_of_each_format_load_standardised(tmp_path, monkeypatch):
    write_mnist(tmp_path), write_mnist(tmp_path, 'FashionMNIST')
    raw = np.fromfile(tmp_path / 'MNIST/raw/train-images-idx3-ubyte', np.uint8)[16:].reshape(300, 28, 28)
    train, test = sampling.load('mnist', tmp_path)
    x, y = train.tensors
    assert x.shape == (300, 1, 28, 28) and x.dtype == torch.float32 and y.dtype == torch.int64 and len(test) == 100
    np.testing.assert_allclose(x[:, 0].numpy(), (raw / 255 - 0.1307) / 0.3081, rtol=1e-4, atol=1e-5)
    assert len(sampling.load('fmnist', tmp_path)[0]) == 300
    write_cifar(tmp_path, monkeypatch)
    train, test = sampling.load('cifar', tmp_path)
    assert train.tensors[0].shape == (100, 3, 32, 32) and len(test) == 20
    with open(tmp_path / 'cifar-10-batches-py/data_batch_1', 'rb') as f: first = pickle.load(f)
    pixel = first['data'][0].reshape(3, 32, 32)[1, 5, 7]
    assert train.tensors[0][0, 1, 5, 7].item() == pytest.approx((pixel / 255 - 0.4822) / 0.2435, rel=1e-4)

def write_cifar(root, monkeypatch):
    """Five batches of 20 images and a test batch, and torchvision told their MD5 sums."""
    import hashlib
    folder, draw, sums = root / 'cifar-10-batches-py', np.random.default_rng(0), {}
    folder.mkdir()
    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
    def batch(name): return write(name, {'data': draw.integers(256, size=(20, 3072), dtype=np.uint8), 'labels': list(range(10)) * 2})
    monkeypatch.setattr(datasets.CIFAR10, 'train_list', [batch(f'data_batch_{i}') for i in range(1, 6)])
    monkeypatch.setattr(datasets.CIFAR10, 'test_list', [batch('test_batch')])
    name, md5 = write('batches.meta', {'label_names': [str(i) for i in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, 'meta', {'filename': name, 'key': 'label_names', 'md5': md5})

@pytest.mark.parametrize('model', ['cnn', 'paper_cnn'])
def test_cifar_trains(model, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    history = fedavg.main(f'--dataset cifar --model {model} --num_users 4 --epochs 1 --gpu -1 --lr 0.01 --data_dir {tmp_path}'.split())
    assert math.isfinite(history[0]['test_loss'])

@pytest.mark.parametrize('file, damage', [('train-images-idx3-ubyte', lambda b: b[:-1]), ('train-labels-idx1-ubyte', lambda b: b''),
                                          ('t10k-images-idx3-ubyte', lambda b: b'junk' + b[4:]), ('t10k-labels-idx1-ubyte', lambda b: b + b'0')])
def test_a_damaged_file_is_named(tmp_path, capsys, file, damage):
    path = pathlib.Path(write_mnist(tmp_path)) / 'MNIST/raw' / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit) as e: fedavg.main(['--data_dir', str(tmp_path), '--gpu', '-1'])
    assert e.value.code == 2 and f'{file} is truncated or corrupt' in capsys.readouterr().err

def test_files_that_do_not_belong_together_are_refused(tmp_path, monkeypatch):
    labels = pathlib.Path(write_mnist(tmp_path)) / 'MNIST/raw/train-labels-idx1-ubyte'
    for wrong in (np.zeros(299, np.uint8), np.full(300, 10, np.uint8)):
        write_idx(labels, wrong)
        with pytest.raises(OSError, match='do not belong together'): sampling.load('mnist', tmp_path)
    write_cifar(tmp_path, monkeypatch)
    (tmp_path / 'cifar-10-batches-py/data_batch_3').write_bytes(b'junk')
    with pytest.raises(OSError, match='data_batch_3 is truncated or corrupt'): sampling.load('cifar', tmp_path)

@pytest.mark.parametrize('name', ['mnist', 'cifar'])
def test_missing_files_without_a_network_name_the_folder_and_both_ways_out(name, tmp_path, monkeypatch, capsys):
    import urllib.request
    def offline(*_, **__): raise urllib.error.URLError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    with pytest.raises(SystemExit) as e: fedavg.main(['--dataset', name, '--data_dir', str(tmp_path), '--gpu', '-1'])
    err = capsys.readouterr().err
    first = {'mnist': 'train-images-idx3-ubyte', 'cifar': 'data_batch_1'}[name]
    assert e.value.code == 2 and all(word in err for word in (str(tmp_path), first, '--data_dir', '--dataset synthetic', 'no network'))

#############################################
#          The protocol, the files          #
#############################################

def test_rounds_to_target_is_the_papers_monotone_interpolation():
    assert fedavg.rounds_to(0.97, [0.90, 0.96, 0.94, 0.98]) == pytest.approx(3.5)     # best so far 0.96 at round 3, 0.98 at 4
    assert fedavg.rounds_to(0.90, [0.50, 0.90]) == 2 and fedavg.rounds_to(0.4, [0.5]) == 1
    assert fedavg.rounds_to(0.99, [0.5, 0.9]) is None

def test_target_stops_the_run_and_is_reported(run, capsys):
    history = run('--target 0.5 --epochs 60 --local_ep 5 --frac 1')
    accuracies = [row['test_acc'] for row in history]
    assert max(accuracies[:-1], default=0) < 0.5 <= accuracies[-1]
    assert f'rounds to 50.00 %: {fedavg.rounds_to(0.5, accuracies):.1f}' in capsys.readouterr().out
    run('--target 1 --epochs 2 --lr 1e-6')
    assert 'rounds to 100.00 %: not reached in 2 rounds' in capsys.readouterr().out

def read_log(path):
    first, *lines = path.read_text().splitlines()
    return json.loads(first.removeprefix('# ')), list(csv.DictReader(lines))

def test_log_holds_the_options_and_one_row_a_round(run, tmp_path):
    history = run(f'--local_bs inf --log {tmp_path}/l.csv')
    options_, rows = read_log(tmp_path / 'l.csv')
    assert options_['local_bs'] == 'inf' and options_['num_users'] == 10
    assert ','.join(rows[0]) == ('round,train_loss,test_loss,test_acc,clients,rejected,lost,late,up_bytes,down_bytes,upload_seconds,round_time,'
                                 'epsilon,seconds')
    assert [r['round'] for r in rows] == ['1', '2', '3'] and {r['clients'] for r in rows} == {'3'}
    assert [float(r['test_acc']) for r in rows] == [row['test_acc'] for row in history]

@pytest.mark.parametrize('words', ['--unequal 1 --momentum 0.5 --speeds lognormal:1 --deadline 1 --corrupt 0.3', f'{SMALLER} --frac 0.8',
    '--personal layers --personal_layers fc2,fc3 --iid 0', '--model mlp --optimizer adamw --lr 0.001 --lr_decay 0.9', '--iid 0 --model cnn'])
def test_a_resumed_run_equals_the_uninterrupted_one(run, words, tmp_path):
    full = run(f'{words} --epochs 4 --checkpoint {tmp_path}/full')
    run(f'{words} --epochs 2 --checkpoint {tmp_path}/part --log {tmp_path}/l.csv')
    with open(tmp_path / 'l.csv', 'a') as f: f.write('3,0.1,a row cut sho')
    part = run(f'{words} --epochs 4 --checkpoint {tmp_path}/part --log {tmp_path}/l.csv --resume')
    assert same(weights(tmp_path / 'full'), weights(tmp_path / 'part'))
    strip = lambda history: [{k: v for k, v in row.items() if k != 'seconds'} for row in history]
    assert strip(full) == strip(part)
    assert [r['round'] for r in read_log(tmp_path / 'l.csv')[1]] == ['1', '2', '3', '4']

def test_a_checkpoint_is_never_half_written_nor_of_half_a_round(run, tmp_path, monkeypatch, capsys):
    run(f'--epochs 2 --checkpoint {tmp_path}/c.pt')
    good, write = weights(tmp_path / 'c.pt'), torch.save
    def full(what, path): pathlib.Path(path).write_bytes(b'half'), (_ for _ in ()).throw(OSError('no space'))
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(SystemExit): run(f'--epochs 3 --resume --checkpoint {tmp_path}/c.pt')
    assert same(weights(tmp_path / 'c.pt'), good) and 'no space' in capsys.readouterr().err
    monkeypatch.setattr(torch, 'save', write)
    monkeypatch.setattr(fedavg, 'evaluate', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit): run(f'--epochs 3 --resume --checkpoint {tmp_path}/c.pt')
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert same(weights(tmp_path / 'c.pt'), good)

def test_the_test_set_is_what_is_evaluated(run, data, tmp_path):
    history = run(f'--epochs 1 --checkpoint {tmp_path}/c.pt')
    net = models.TwoNN(784, 200, 10)
    net.load_state_dict(weights(tmp_path / 'c.pt'))
    x, y = sampling.load('mnist', data)[1].tensors
    assert history[0]['test_acc'] == (net(x).argmax(1) == y).sum().item() / 100

def test_the_flags_reach_the_steps(run, monkeypatch, capsys):
    asked = {}
    for name in ('load', 'partition', 'device_of'):
        monkeypatch.setattr(fedavg, name, lambda *words, name=name, step=getattr(fedavg, name): (asked.update({name: words}), step(*words))[1])
    run('--epochs 1 --seed 3 --iid 0 --alpha 0.5 --unequal 1 --num_users 7 --verbose')
    assert asked['load'][2] == 3 and asked['partition'][1:] == (7, 0, 0.5, 1, 3) and asked['device_of'] == (-1,)
    assert capsys.readouterr().out.count('    client ') == 2

def test_what_changes_the_run_may_not_change_when_it_is_resumed():
    may = {'epochs', 'data_dir', 'gpu', 'bs', 'target', 'log', 'checkpoint', 'save_every', 'resume', 'plot', 'verbose', 'personal', 'personal_ep', 'mix'}
    assert fedavg.FREE == may

def test_resuming_under_other_options_names_them(run, refused, tmp_path, data):
    run(f'--epochs 1 --checkpoint {tmp_path}/c.pt')
    line = refused(f'--num_users 10 --frac 0.3 --lr 0.2 --iid 0 --resume --checkpoint {tmp_path}/c.pt'.split())
    assert '--lr 0.1 (given: 0.2)' in line and '--iid 1 (given: 0)' in line and '--frac' not in line
    (tmp_path / 'junk.pt').write_bytes(b'no checkpoint')
    assert 'not a checkpoint' in refused(['--resume', '--checkpoint', f'{tmp_path}/junk.pt'])
    torch.save({'w': {}}, tmp_path / 'foreign.pt')
    assert 'not a checkpoint' in refused(['--resume', '--checkpoint', f'{tmp_path}/foreign.pt'])

def test_a_new_run_sets_the_files_of_an_earlier_one_aside(run, tmp_path):
    (tmp_path / 'l.csv').write_text('precious')
    run(f'--epochs 1 --log {tmp_path}/l.csv --save_every 5 --checkpoint {tmp_path}/c.pt')
    assert (tmp_path / 'l.csv.old').read_text() == 'precious' and len(read_log(tmp_path / 'l.csv')[1]) == 1
    run(f'--epochs 1 --log {tmp_path}/l.csv')
    assert (tmp_path / 'l.csv.old').read_text() == 'precious' and (tmp_path / 'l.csv.old1').exists()
    (tmp_path / 'other.csv').write_text('precious')
    run(f'--epochs 2 --log {tmp_path}/other.csv --checkpoint {tmp_path}/c.pt --resume')
    assert (tmp_path / 'other.csv.old').read_text() == 'precious' and len(read_log(tmp_path / 'other.csv')[1]) == 2
    assert weights(tmp_path / 'c.pt')       # the last round is saved, whatever --save_every says

def test_a_run_that_is_interrupted_and_killed_goes_on_where_it_was(data, tmp_path, capsys):
    words = (f'--data_dir {data} --num_users 10 --frac 0.2 --local_ep 5 --local_bs 2 --epochs 12 --gpu -1 '
             f'--checkpoint {tmp_path}/c.pt --log {tmp_path}/l.csv')
    def rounds(): return len(read_log(tmp_path / 'l.csv')[1]) if (tmp_path / 'l.csv').exists() else 0
    def stop(process, sig, at):
        while rounds() < at and process.poll() is None: time.sleep(0.01)
        process.send_signal(sig)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err
    code, out, err = stop(shell(words), signal.SIGINT, 2)
    assert code == 130 and 'interrupted' in out and f'checkpoint: {tmp_path}/c.pt' in out and 'Traceback' not in err
    code, _, _ = stop(shell(words + ' --resume'), signal.SIGKILL, rounds() + 2)
    assert code == -signal.SIGKILL and weights(tmp_path / 'c.pt')
    fedavg.main(f'{words} --resume'.split())
    assert capsys.readouterr().out.count('resumed from') == 1
    assert [r['round'] for r in read_log(tmp_path / 'l.csv')[1]] == [str(t) for t in range(1, 13)]
    fedavg.main(words.replace('c.pt', 'full.pt').replace('--log', '--save_every 3 --log').split())
    assert same(weights(tmp_path / 'c.pt'), weights(tmp_path / 'full.pt'))

def test_plots_missing_library_is_said_before_training(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(fedavg.importlib.util, 'find_spec', lambda name: None)
    assert 'pip install matplotlib' in refused(['--plot', f'{tmp_path}/p.png'])

def test_plot_is_drawn(run, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    from matplotlib.axes import Axes
    drawn, draw = [], Axes.plot
    monkeypatch.setattr(Axes, 'plot', lambda self, x, y, **more: (drawn.extend(y), draw(self, x, y, **more))[1])
    run(f'--plot {tmp_path}/p.png --drop 1')            # no training loss in any round
    assert all(isinstance(v, float) for v in drawn) and any(map(math.isnan, drawn))
    assert (tmp_path / 'p.png').read_bytes()[1:4] == b'PNG'

#############################################
#       The command line (p), the files     #
#############################################

@pytest.mark.parametrize('words, said', [
    ('--frac 1.5', '--frac'), ('--frac -0.1', '--frac'), ('--frac nan', '--frac'), ('--num_users 0', '--num_users'),
    ('--num_users 60001', '60000'), ('--local_ep 0', '--local_ep'), ('--local_bs 0', 'or inf'), ('--local_bs 2.5', '--local_bs'),
    ('--epochs 0', '--epochs'), ('--lr 0', '--lr'), ('--lr inf', '--lr'), ('--lr_decay 1.1', '--lr_decay'), ('--momentum -1', '--momentum'),
    ('--momentum 0.9 --optimizer adamw', 'adamw'), ('--bs 0', '--bs'), ('--target 0', '--target'), ('--target 97', '0.97 is 97 %'),
    ('--seed -1', '--seed'), ('--seed ' + '9' * 5000, '--seed'), ('--lr 1e39', '--lr'), ('--iid True', '--iid'), ('--log /dev/null', 'not a file'), ('--gpu -2', '--gpu'), ('--iid 2', '--iid'), ('--alpha 0 --iid 0', '--alpha'), ('--alpha 1', '--iid 0'),
    ('--model resnet', 'paper_cnn'), ('--dataset imagenet', 'synthetic'), ('--num_channels 3', 'mnist has 1'), ('--num_classes 7', '10'),
    ('--log /no/such/folder/l.csv', '--log'), ('--checkpoint /', '--checkpoint'), ('--save_every 0', '--save_every'), ('--resume', '--checkpoint'),
    ('--resume --checkpoint no_such_file', 'no_such_file'), ('--silo 1', 'torchrun'), ('--data_dir x{rank}', '--silo'), ('--engine loop --compile 1', '--engine'),
    ('--quantize 0', 'at most 16'), ('--quantize 17', 'at most 16'), ('--topk 0', '--topk'), ('--topk 1.1', '--topk'), ('--error_feedback 0', '--topk'),
    ('--prune 1', '--prune'), ('--prune_end 5', 'add --prune'), ('--prune 0.5 --prune_begin 9 --prune_end 9', 'comes after'), ('--bandwidth 0', '--bandwidth'),
    ('--prune 0.5 --prune_end 30 --epochs 20', '--epochs 20'), ('--separable 1', '--model cnn'),
    ('--clip 1', '--dp'), ('--epsilon 2', '--dp'), ('--delta 0.1', '--dp'), ('--dp user --noise 1', '--clip'), ('--dp user --clip 1', '--epsilon'),
    ('--dp user --clip 1 --noise 1 --epsilon 2', 'either'), ('--dp all', 'example'), ('--dp user --clip 0 --noise 1', '--clip'),
    ('--dp user --clip 1 --noise 1 --frac 0', '--frac'), ('--dp user --clip 1 --noise 1 --all_clients 1', '--all_clients'),
    ('--dp example --clip 1 --noise 1 --engine stacked', 'stacked'), ('--delta 1 --dp user --clip 1 --noise 1', '--delta'),
    ('--widths 1,0', '--widths'), ('--widths 1,2', 'at most 1'), ('--widths 1,0.5 --secagg 1', '--secagg'), ('--cut 0', '--cut'),
    ('--cut 3', 'after layer 1 to 2'), ('--cut 1 --engine stacked', '--engine stacked'), ('--cut 1 --dp user --clip 1 --noise 1', '--dp user'),
    ('--gpu 0,1', '--cut'), ('--gpu 1,1 --cut 1', 'different'), ('--teacher nowhere.pt', 'no such file'), ('--widths 0.5', 'put a 1'), ('--widths half', 'as 1,0.5'), ('--distill 0.5', '--teacher'),
    ('--temperature 2', '--teacher'), ('--personal layers', '--personal_layers'), ('--personal_layers fc2,fc3', 'fc2,fc3: goes with --personal layers'),
    ('--personal layers --personal_layers fc9', 'fc1, fc2, fc3'), ('--personal layers --personal_layers fc1,fc2,fc3', 'not all'),
    ('--personal layers --personal_layers fc3 --prune 0.5', '--prune'), ('--mix 0.5', '--personal mix'), ('--personal_ep 2', '--personal'),
    ('--speeds 1', 'lognormal:S'), ('--deadline 0', '--deadline'), ('--overselect -1', '--overselect'), ('--overselect 10', '110 of 100'),
    ('--widths 1,0.5 --all_clients 1', 'does not hold'), ('--overselect 1 --secagg 1', 'given up'), (f'--teacher {__file__} --checkpoint {__file__}', 'twice'),
    (f'--teacher {__file__} --dp user --clip 1 --noise 1', 'epsilon'), ('--deadline 0.9', 'take 1.0 or more'), ('--corrupt 2', '--corrupt'), ('--corrupt 0.1 --secagg 1', 'garbage'), ('--mu -1', '--mu'),
    ('--balance 1 --dp example --clip 1 --noise 1', '--dp example'),
    ('--secagg 1 --topk 0.1', '--topk'), ('--secagg 1 --frac 0.01', 'one client'), ('--threshold 0.5', '--secagg'), ('--range 2', '--secagg'),
    ('--secagg 1 --threshold 0', '--threshold'), ('--secagg 1 --range 1e308', '--range'), ('--dp user --noise 1 --clip 1e300', '--clip'), ('--drop 1.1', '--drop'), ('--secagg 1 --dp user --clip 1 --noise 1 --range 2', '--clip'), ('--plot p.txt', '.png'), ('--log a --checkpoint a', 'twice'), ('--fraction 1', '--fraction')])
def test_senseless_values_end_in_one_line_before_any_data_are_read(refused, monkeypatch, words, said):
    if 'deadline' not in words: monkeypatch.setattr(fedavg, 'load', lambda *_: pytest.fail('data were read'))
    assert said in refused(words.split())

def test_gpu_is_used_where_it_is_and_said_where_it_is_not(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert fedavg.device_of(3).type == 'cpu' and 'no CUDA' in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert fedavg.device_of(1) == torch.device('cuda', 1) and fedavg.device_of(-1).type == 'cpu'
    with pytest.raises(SystemExit): fedavg.device_of(2)
    assert 'has 2 GPUs' in capsys.readouterr().err

def test_every_flag_is_read_somewhere_and_in_the_readme():
    flags = vars(options.args_parser([]))
    nodes = [node for name in ('fedavg.py', 'models.py') for node in ast.walk(ast.parse((HERE / name).read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and getattr(node.value, 'id', getattr(node.value, 'attr', '')) == 'args'}
    read |= {node.args[1].value for node in nodes if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'getattr'
             and isinstance(node.args[1], ast.Constant)}
    readme = (HERE / 'README.md').read_text()
    assert not [f for f in flags if f not in read] and not [f for f in flags if f'`--{f}' not in readme]

def test_the_tables_cells_are_what_the_paper_has_and_the_program_takes(monkeypatch):
    monkeypatch.syspath_prepend(HERE / 'results')
    import reproduce
    cells = reproduce.cells()
    assert len(cells) == 2 * 5 * 4 + 2 * 9 * 2 and cells[4, 'E=10,B=50,iid=0'][1] == 881 and cells[1, '2nn,C=0.0,B=inf,iid=0'][1] == 4278
    args = options.args_parser(cells[2, 'E=20,B=inf,iid=1'][0].split())
    assert (args.model, args.frac, args.local_ep, args.local_bs, args.iid, args.target) == ('paper_cnn', 0.1, 20, math.inf, 1, 0.99)
    for words, _ in cells.values(): options.args_parser(words.split())

def test_eta_is_looked_for_where_rounds_become_fewer(monkeypatch):
    monkeypatch.syspath_prepend(HERE / 'results')
    import reproduce
    for best, ran in ((0.1, [0.1, 0.0464, 0.2154]), (0.01, [0.1, 0.0464, 0.0215, 0.01]), (1, [0.1, 0.0464, 0.2154, 0.4642, 1]), (None, None)):
        asked = []
        def run(words, lr, *_):
            asked.append(lr)
            return (f'{abs(math.log(lr / best)) + 1}' if best else ''), 0, []
        monkeypatch.setattr(reproduce, 'run', run)
        monkeypatch.setattr(reproduce, 'tried', lambda *_: {})
        monkeypatch.setattr(reproduce, 'write', lambda *_: None)
        assert reproduce.search(4, 'E=1', '--local_ep 1 --local_bs 10 --iid 1', 92, '') == best
        assert asked == ran if ran else sorted(asked) == reproduce.GRID
        asked.clear()
        assert reproduce.search(4, 'E=5', '--local_ep 5 --local_bs 10 --iid 0', 92, '') == best and asked[0] == 0.0464
        if best != 0.1: continue        # it goes on from the best one tried
        monkeypatch.setattr(reproduce, 'tried', lambda *_: {0.0464: math.inf, 0.1: 1.0})
        asked.clear()
        assert reproduce.search(4, 'E=5', '--local_ep 5 --local_bs 10 --iid 0', 92, '') == 0.1 and asked == [0.2154]

def test_a_cells_run_goes_on_where_it_was_stopped(monkeypatch, tmp_path, data):
    monkeypatch.syspath_prepend(HERE / 'results')
    import reproduce
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    words, done = '--gpu -1 --num_users 10 --frac 0.3 --target 0.999', []
    whole = reproduce.run(words, 0.1, 0, 4, data)
    def progress(args, history):
        done.append(len(history))
        if len(done) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(fedavg, 'progress', progress)
    with pytest.raises(SystemExit): reproduce.run(words, 0.1, 0, 4, data)
    assert reproduce.run(words, 0.1, 0, 4, data)[::2] == whole[::2] and done == [1, 2, 3, 4]
    assert reproduce.run(words, 1000, 0, 4, data)[0] == ''      # diverged
    assert not list(tmp_path.iterdir())

def test_a_cell_of_two_tables_is_run_once(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(HERE / 'results')
    import reproduce
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    ran = []
    def run(words, lr, seed, *_):
        ran.append((lr, seed))
        return f'{5 + abs(math.log(lr / 0.1)):.1f}', 9, [0.5, 0.99]
    monkeypatch.setattr(reproduce, 'run', run)
    for words in ('--table 1 --seeds 1', '--table 2 --seeds 2 --more=--verbose=1', '--seeds 2', '--table 1 --seeds 2'):
        monkeypatch.setattr('sys.argv', ['reproduce.py', '--cell', 'B=10,iid=0' + (',paper_cnn,C=0.1' if words.startswith('--table 1') else ',E=5'), *words.split()])
        reproduce.main()
    assert ran == [(0.0464, 7), (0.0215, 7), (0.1, 7), (0.2154, 7), (0.1, 0), (0.1, 1)]
    assert [row['table'] for row in reproduce.read('reproduce.csv')] == ['2', '2'] and len(reproduce.read('curves.csv')) == 1

def test_what_the_paper_took_and_what_it_took_here_stand_side_by_side(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(HERE / 'results')
    import reproduce
    row = lambda rounds, lr='0.0464': {'rounds': rounds, 'lr': lr}
    said = reproduce.shown
    assert said([]) == 'not run' and said([row('29.4')]) == '**29.4** (one seed), η 0.0464'
    assert said([row('29.0'), row('30.0'), row('34.0')]) == '**31.0** (29.0 to 34.0), η 0.0464'
    assert said([row('29.0'), row(''), row('34.0')]) == '1 of 3 missed (29.0 to 34.0 of the others), η 0.0464'
    assert said([row('', '')]) == '1 of 1 missed'
    monkeypatch.setattr(reproduce, 'HERE', tmp_path)
    words, paper = reproduce.cells()[2, 'E=5,B=10,iid=1']
    for seed, rounds in ((0, '16.0'), (1, '24.0')): reproduce.write('reproduce.csv', (2, 'E=5,B=10,iid=1', f'--gpu -1 {words}', 0.1, seed, rounds, 9, '', paper))
    reproduce.tables()
    lines = capsys.readouterr().out.splitlines()
    assert '| E=5, B=10 | 20 | **20.0** (16.0 to 24.0), η 0.1 | 229 | not run |' in lines
    assert '| C=0.1 | 339 | not run | 18 | **20.0** (16.0 to 24.0), η 0.1 | 1100 | not run | 206 | not run |' in lines       # the same cell
    assert sum(line.startswith(('| C=', '| E=')) for line in lines) == 28 and '| C=1.0 | - | not run | 70 | not run | - | not run | 380 | not run |' in lines

def test_a_settings_rounds_and_megabytes_are_those_of_its_log_and_are_measured_once(monkeypatch, capsys, tmp_path, data):
    monkeypatch.syspath_prepend(HERE / 'results')
    import wire
    def here(command, **_):     # in this process, without the seconds of importing torch
        fedavg.main(command[2:])
        return SimpleNamespace(stdout=capsys.readouterr().out, stderr='')
    monkeypatch.setattr(subprocess, 'run', here)
    small = '--compile 0 --num_users 10 --epochs 3 --quantize 8 --target'
    row, log = wire.measure(f'{small} 0.3', data, 1, 0)
    rounds = fedavg.rounds_to(0.3, [float(r['test_acc']) for r in log])
    assert rounds > 1 and row['rounds'] == f'{rounds:.1f}' and row['megabytes'] == f'{rounds * int(log[0]["up_bytes"]) / 1e6:.2f}'
    assert wire.measure(f'{small} 1', data, 1, 0)[0]['rounds'] == '' and len(log) == math.ceil(rounds)
    ran = []
    def measure(words, data_dir, iid, seed):
        ran.append((words, seed))
        reached = {'rounds': '', 'megabytes': ''} if (words, seed) == ('--quantize 1', 0) else {'rounds': f'{20 + 2 * seed}', 'megabytes': '20' if words else '80'}
        return dict(setting=words, iid=iid, seed=seed, **reached), [{'up_bytes': '5', 'test_acc': '0.5'}, {'up_bytes': '6', 'test_acc': '0.971'}]
    monkeypatch.setattr(wire, 'measure', measure)
    monkeypatch.setattr(wire, 'HERE', tmp_path)
    for seeds in ('0', '01'):       # the second goes on
        monkeypatch.setattr('sys.argv', ['wire.py', '--iid', '1', '--seeds', *seeds, '--only', '', '--quantize 8', '--quantize 1'])
        wire.main()
    assert ran == [(words, seed) for seed in (0, 1) for words in ('', '--quantize 8', '--quantize 1')]
    assert (tmp_path / 'wire_curves.csv').read_text() == 'setting,iid,up_bytes,accuracies\n,1,5 6,5000 9710\n--quantize 8,1,5 6,5000 9710\n'
    capsys.readouterr()
    wire.table(tmp_path / 'wire.csv')
    lines = capsys.readouterr().out.splitlines()
    assert '| `--quantize 8` | 21.0 (20.0 to 22.0) | 20.00 | 4.0 | not run |  |  |' in lines and '| `--quantize 1` | 1 of 2 missed |  |  | not run |  |  |' in lines

def test_the_figures_have_one_curve_of_what_was_run_twice_the_latest(monkeypatch, tmp_path):
    Figure, drawn = pytest.importorskip('matplotlib.figure').Figure, []
    monkeypatch.setattr(Figure, 'savefig', lambda self, *_, **__: drawn.append([line.get_ydata()[-1] for line in self.axes[0].lines]))
    monkeypatch.syspath_prepend(HERE / 'results')
    import reproduce
    import wire
    for module in (reproduce, wire): monkeypatch.setattr(module, 'HERE', tmp_path)
    for best in ('9000', '9500'):
        reproduce.write('curves.csv', (4, 'E=1,B=10,iid=1', 0.1, f'8000 {best} 8500'), reproduce.CURVE)
        wire.write(tmp_path / 'wire_curves.csv', dict(setting='', iid=1, up_bytes='5 5 5', accuracies=f'8000 {best} 8500'))
    reproduce.figure(), wire.figure()
    assert drawn == [[95, 97], [95, 97]]        # and the target

def test_the_readmes_commands_run(tmp_path, run, monkeypatch):
    commands = re.findall(r'python fedavg\.py ?([^#`\n]*)', (HERE / 'README.md').read_text())
    assert len(commands) > 5
    monkeypatch.chdir(tmp_path)
    for words in commands:
        epochs = 10 if '--prune' in words else 1
        if 'synthetic' not in words: assert len(run(f'{words} --num_users 10 --epochs {epochs}')) == epochs
    first = shell('--dataset synthetic --epochs 2', cwd=tmp_path)
    out, err = first.communicate(timeout=100)
    assert first.returncode == 0 and err == '' and 'round    2/2' in out and '60000 training' in out

def test_each_module_works_alone_in_an_empty_folder(tmp_path):
    processes = []
    for name, use in MODULES.items():
        (tmp_path / name[:-3]).mkdir()
        shutil.copy(HERE / name, tmp_path / name[:-3])
        processes.append(subprocess.Popen([sys.executable, '-c', use], cwd=tmp_path / name[:-3]))
    assert [p.wait() for p in processes] == [0] * len(MODULES)

@pytest.mark.skipif('FEDAVG_DATA' not in os.environ, reason='FEDAVG_DATA does not name a folder that holds MNIST')
@pytest.mark.parametrize('iid, best', [(1, 0.88), (0, 0.4)])
def test_real_mnist_is_learnt(iid, best):
    words = f'--epochs 3 --seed 0 --gpu -1 --iid {iid} --data_dir {os.environ["FEDAVG_DATA"]}'
    assert max(row['test_acc'] for row in fedavg.main(words.split())) > best
