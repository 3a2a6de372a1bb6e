"""Engines: stacks train as the loop does, through the same hooks, or leave it to the loop."""
import inspect
import itertools
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import beyond
import fedavg
import models
import options
import sampling
from beyond.augment import AugmentedClient
from beyond.engines import Stacked, fingerprint, memory, unstackable
from beyond.local import AdamW, Proximal
from beyond.stacks import CompiledStack, Stack
from test_fedavg import (HERE, client_args, data, final, image_toy, near, refused,      # noqa: F401
                         run)

class Made(fedavg.Server):
    """A server of given data, which has not read any."""
    def __init__(self, args, net, dataset, parts, Client):
        self.args, self.net, self.train_set, self.parts = args, net, dataset, parts
        self.n_k, self.K = np.array([len(idxs) for idxs in parts.values()]), len(parts)
        self.Client = Client

def both(net, dataset, parts, rooms=(), epochs=None, **more):
    """What the loop and stacks of four make of all clients, each as {k: Update}."""
    args = options.args_parser(['--gpu', '-1', '--lr_decay', '0.9'], beyond.rooms())
    vars(args).update(dict(device=torch.device('cpu'), local_bs=10) | more)
    Client = type('Client', (*rooms, fedavg.LocalUpdate), {'stacks': True})
    loop = Made(args, net, dataset, parts, Client)
    Stacked = type('S', (beyond.engines.Stacked, beyond.Room, Made), {})
    stacked = Stacked.__new__(Stacked)
    Made.__init__(stacked, args, net, dataset, parts, Client)
    stacked.reason, r = None, fedavg.Round(2)
    stacked.stack_of = {net: Stack(net, stacked.client(next(iter(parts)), r), 4, 10)}
    S_t, w = epochs or dict.fromkeys(parts, args.local_ep), net.state_dict()
    return [{u.k: u for u in server.train(w, S_t, r)} for server in (loop, stacked)]

MORE = [{}, {'momentum': 0.9, 'lr': 0.02}, {'rooms': (AdamW,), 'lr': 0.001},
        {'local_bs': math.inf}, {'local_ep': 3}, {'rooms': (Proximal,), 'mu': 0.5, 'local_ep': 2}]
SPLITS = [dict(iid_=1), dict(iid_=0), dict(iid_=1, unequal=1),
          dict(iid_=0, alpha=0.5, unequal=1)]

def dealt(labels, K, unequal=0, **split):
    return sampling.partition(labels, sampling.sizes(len(labels), K, unequal), **split)

@pytest.mark.parametrize('name, split, more', [
    *(('2nn', *case) for case in itertools.product(SPLITS, MORE)),
    *((name, SPLITS[i % 4], more) for name in ('paper_cnn', 'cifar')
      for i, more in enumerate(MORE))])
def test_stacked_clients_equal_the_loops(name, split, more):
    dataset, net = image_toy(name, 70 if name == '2nn' else 30)
    parts = dealt(dataset.tensors[1], 7 if name == '2nn' else 3, **split)
    loop, stacked = both(net, dataset, parts, **{'local_bs': 4, 'lr': 0.05} | more)
    assert loop.keys() == stacked.keys()
    # AdamW's first steps are plus or minus lr, however small a gradient is that rounding changes.
    within = 1e-4 if AdamW in more.get('rooms', ()) else 1e-5
    for k, u in loop.items():
        assert u.loss == pytest.approx(stacked[k].loss, rel=1e-5) and u.n == stacked[k].n
        assert u.w.keys() == stacked[k].w.keys() and near(u.w, stacked[k].w, within)

def test_a_client_that_is_done_is_frozen_while_others_go_on():
    dataset, net = image_toy('2nn')
    more = dict(momentum=0.9, lr=0.02)
    alone, _ = both(net, dataset, {0: np.arange(3)}, **more)
    _, beside = both(net, dataset, {0: np.arange(3), 1: np.arange(3, 70)}, **more)
    torch.testing.assert_close(alone[0].w['fc1.weight'], beside[0].w['fc1.weight'])

def test_clients_do_the_steps_that_fit_in_both_engines():
    dataset, net = image_toy('2nn')
    parts, epochs = dealt(dataset.tensors[1], 4, 1), {0: 1.0, 1: 1.7, 2: 3, 3: 2.2}
    loop, stacked = both(net, dataset, parts, epochs=epochs, local_bs=4, lr=0.05)
    for k, u in loop.items():
        assert u.loss == pytest.approx(stacked[k].loss, rel=1e-5) and near(u.w, stacked[k].w)
    client = fedavg.LocalUpdate(client_args(), dataset, range(70))
    steps = [len(client.batches(n, E, B)) for n, E, B in (
        (25, 1.5, 10), (25, 3, math.inf), (3, 2, 10), (30, 1.0, 10))]
    assert steps == [4, 3, 2, 3]

def test_a_stack_is_never_larger_than_its_size(monkeypatch):
    dataset, net = image_toy('2nn')
    sizes, step = [], Stack.step
    def watched(self, x, y, weight):
        sizes.append(len(weight))
        return step(self, x, y, weight)
    monkeypatch.setattr(Stack, 'step', watched)
    both(net, dataset, dealt(dataset.tensors[1], 10))
    assert sizes == [4, 4, 2]
    sizes.clear()       # clients that are done leave: 3, 2 and 1 batches of 10
    both(net, dataset, {0: np.arange(10), 1: np.arange(30), 2: np.arange(20)})
    assert sizes == [3, 2, 1]

def test_a_stack_on_a_gpu_is_as_large_as_a_quarter_of_its_memory(monkeypatch):
    net, x = models.TwoNN(784, 200, 10), torch.zeros(5, 1, 28, 28)
    need = 20 * 199210 + 600 * (16 * 410 + 4 * 784)         # B = 600; layers of 200, 200 and 10
    assert memory(net, x[:1], 600) == need
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (0, 4 * 30 * need + 4))
    stacked = SimpleNamespace(size=1, K=100, nets=lambda: [net], train_set=TensorDataset(x))
    for C, compiled, size in ((1.0, 0, 25), (1.0, 1, 25), (0.3, 0, 30), (0.01, 0, 1)):
        stacked.args = SimpleNamespace(compile=compiled, frac=C, device=torch.device('cuda', 0))
        assert Stacked.stack_size(stacked, net, 600) == size

def test_a_stack_on_a_cpu_has_ten_clients_or_compiled_1_MiB_of_weights():
    stacked = SimpleNamespace(size=1, K=100, nets=lambda: [None])
    for sizes, compiled, size in (
            ((784, 200, 10), 0, 10), ((784, 200, 10), 1, 1),        # 0.8 MB of weights
            ((100, 200, 10), 1, 4), ((9, 9, 9), 1, 10), ((784, 2000, 10), 1, 1)):
        stacked.args = SimpleNamespace(compile=compiled, frac=0.1, device=torch.device('cpu'))
        assert Stacked.stack_size(stacked, models.TwoNN(*sizes), 10) == size

def test_a_stacks_weights_lie_in_memory_as_their_gradients_do():
    dataset, net = image_toy('2nn', 30)
    args = SimpleNamespace(local_ep=1, local_bs=10, lr=0.1, momentum=0, device='cpu')
    stack = Stack(net, fedavg.LocalUpdate(args, dataset, [0]), 3, 10)
    stack.begin(net, [net.state_dict()] * 3, 0.1)
    x, y = (v.unflatten(0, (3, 10)) for v in dataset.tensors)
    gradients, _ = stack.gradients(x, y, torch.full((3, 10), 0.1))
    assert [g.stride() for g in gradients] == [v.stride() for v in stack.w]

def test_stacked_clients_have_dropout_of_their_own(monkeypatch):
    dataset, net = image_toy('mlp', 30)
    monkeypatch.setattr(torch, 'randperm', torch.arange)
    _, stacked = both(net, dataset, {k: np.arange(30) for k in range(3)}, lr=1e-30)
    assert len({round(u.loss, 4) for u in stacked.values()}) == 3

########################### One place for local training ###########################

class Halved:
    """Half of the gradient."""
    stacks = True

    def adjust(self, parameters, start):
        super().adjust(parameters, start)
        for p in parameters:
            p.grad = p.grad / 2

class Unsaid:
    """The same, but does not say that it takes stacks."""
    def adjust(self, parameters, start):
        super().adjust(parameters, start)
        for p in parameters:
            p.grad = p.grad / 2

class OwnTrain(fedavg.LocalUpdate):
    """Trains twice."""
    def train(self, net, lr=None, epochs=None):
        w, _ = super().train(net, lr, epochs)
        again = type(net)(784, 200, 10)
        again.load_state_dict(w)
        return super().train(again, lr, epochs)

def test_a_hook_of_ones_own_works_in_both_engines(run, capsys):     # noqa: F811
    loop, stacked, plain, half = (final_of(run, words, *classes) for words, *classes in (
        ('--engine loop', Halved), ('--engine stacked', Halved), ('',), ('--lr 0.05',)))
    assert near(loop, stacked) and near(loop, half) and not near(plain, half, 1e-3)

def final_of(run, words, *classes):     # noqa: F811
    """The weights that a run with these classes ends with."""
    seen = []
    class Watched:
        def end(self, w, row, r):
            super().end(w, row, r)
            seen.append(w)
    run(words, Watched, *classes)
    return seen[-1]

@pytest.mark.parametrize('Own', [Unsaid, OwnTrain])
def test_clients_that_do_not_say_that_they_stack_train_one_by_one(
        run, capsys, Own):      # noqa: F811
    w = final_of(run, '--epochs 1', Own)
    out = capsys.readouterr().out
    assert f'one after the other, as {Own.__name__} does not say' in out
    assert near(w, final_of(run, '--epochs 1 --engine loop', Own))
    assert not near(w, final_of(run, '--epochs 1'), 1e-4)
    with pytest.raises(SystemExit):
        run('--engine stacked', Own)
    assert capsys.readouterr().err.count('cannot train stacked') == 1

@pytest.mark.parametrize('name', ['train', 'gradient', 'model', '__init__', 'adjust'])
def test_an_edit_of_localupdate_is_never_without_effect(
        run, monkeypatch, capsys, name):        # noqa: F811
    called, method = [], getattr(fedavg.LocalUpdate, name)
    def edited(self, *words):
        called.append(name)
        return method(self, *words)
    monkeypatch.setattr(fedavg.LocalUpdate, name, edited)
    run('--epochs 1')
    assert len(called) >= 3 and 'has been edited' in capsys.readouterr().out

def test_an_edit_of_the_file_is_never_without_effect(tmp_path, data):       # noqa: F811
    for name in ('fedavg', 'models', 'sampling', 'compress', 'options'):
        shutil.copy(HERE / f'{name}.py', tmp_path)
    shutil.copytree(HERE / 'beyond', tmp_path / 'beyond', ignore=shutil.ignore_patterns('test_*'))
    path = tmp_path / 'fedavg.py'
    line = '                self.adjust(parameters, start)\n'
    assert path.read_text().count(line) == 1
    path.write_text(path.read_text().replace(line, line + '                print("a step")\n'))
    command = (f'fedavg.py --data_dir {data} --num_users 10 --frac 0.2 --epochs 1 --gpu -1 '
               '--processes 1')
    done = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.count('a step') == 6, done.stderr

def test_a_comment_is_no_edit_and_batchnorm_is_left_to_the_loop():
    assert unstackable(fedavg.LocalUpdate, fedavg.Server, nn.Linear(2, 2)) is None
    assert len(fingerprint(fedavg.LocalUpdate.train)) == 16
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert 'running statistics' in unstackable(fedavg.LocalUpdate, fedavg.Server, norm)
    recurrent = nn.ModuleDict({'memory': nn.GRU(4, 4)})
    assert unstackable(fedavg.LocalUpdate, fedavg.Server, recurrent) == (
        'vmap does not take memory, a GRU')

class Freezes:
    stacks = True
    def model(self, net):
        net = super().model(net)
        net.fc1.requires_grad_(False)
        return net

class Groups:
    stacks = True
    def optimizer(self, parameters, lr):
        return torch.optim.SGD([{'params': parameters[:1]}, {'params': parameters[1:]}], lr)

@pytest.mark.parametrize('Own', (Freezes, Groups))
def test_hooks_that_a_stack_would_miss_are_left_to_the_loop(Own, run, capsys):     # noqa: F811
    run('--epochs 1', Own)
    assert f'one after the other, as the {"model" if Own is Freezes else "optimizer"} of Own' in (
        capsys.readouterr().out.replace(Own.__name__, 'Own'))
    with pytest.raises(SystemExit):
        run('--epochs 1 --engine stacked', Own)
    assert 'take --engine loop' in capsys.readouterr().err

class Noisy(nn.Module):
    """A net whose dropout is no layer."""
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(784, 10)

    def forward(self, x):
        return self.fc(F.dropout(x.flatten(1)))

def test_what_is_random_is_compiled_without_a_graph(monkeypatch, capsys):
    compiled, (dataset, plain) = [], image_toy('2nn', 30)
    monkeypatch.setattr(torch, 'compile', lambda step, mode: compiled.append(mode) or step)
    def mode(net, device='cuda', rooms=()):
        args = client_args(dataset='mnist', augment=1)
        client = type('Client', (*rooms, fedavg.LocalUpdate), {})(args, dataset, range(30))
        stack = CompiledStack(net, client, 2, 10)
        args.device = torch.device(device)      # as if: the tensors stay where they are
        stack.compile(*dataset.tensors)
        assert ('without a CUDA graph' in capsys.readouterr().out) == (
            device == 'cuda' and compiled[-1] == 'default')
        return compiled[-1]
    assert mode(plain) == 'reduce-overhead' and mode(plain, 'cpu') == 'default'
    assert mode(plain, rooms=[AugmentedClient]) == mode(Noisy()) == 'default'
    assert mode(image_toy('mlp')[1]) == 'default'

class Spare(nn.Module):
    """A net with a layer that it does not use, or with one under two names."""
    def __init__(self, tied):
        super().__init__()
        self.first, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.spare = self.first
    def forward(self, x):
        return self.first(x.flatten(1))

def test_a_layer_that_is_not_used_stays_as_it_is():
    dataset = TensorDataset(torch.randn(20, 4), torch.arange(20) % 4)
    loop, stacked = both(Spare(False), dataset, {0: np.arange(10), 1: np.arange(10, 20)}, lr=0.5,
                         momentum=0.5)
    for k in loop:
        assert near(loop[k].w, stacked[k].w)
    assert 'two names' in unstackable(fedavg.LocalUpdate, fedavg.Server, Spare(True))

def test_an_edit_of_the_indentation_alone_is_an_edit(monkeypatch):
    before, source = fingerprint(fedavg.Server.train), inspect.getsource(fedavg.Server.train)
    moved = source.replace('            yield', '        yield')
    monkeypatch.setattr(inspect, 'getsource', lambda function: moved)
    assert moved != source and fingerprint(fedavg.Server.train) not in (before, 'unknown')

def test_what_python_adds_to_a_class_is_no_hook(monkeypatch):
    monkeypatch.setattr(fedavg.LocalUpdate, '__firstlineno__', 1, raising=False)    # of 3.13
    class Plain(fedavg.LocalUpdate):
        __firstlineno__ = 2
    assert unstackable(Plain, fedavg.Server, nn.Linear(2, 2)) is None

def test_an_edit_of_the_servers_training_is_never_without_effect(
        run, monkeypatch, capsys):      # noqa: F811
    called, train = [], fedavg.Server.train
    def edited(self, w, S_t, r):
        called.append(r.t)
        return train(self, w, S_t, r)
    monkeypatch.setattr(fedavg.Server, 'train', edited)
    run('--epochs 1')
    assert called == [1] and 'Server.train has been edited' in capsys.readouterr().out

def test_a_loss_without_a_value_for_each_example_is_refused(run, capsys):       # noqa: F811
    class Mean:
        stacks = True
        def loss(self, logits, y, reduction='mean'):
            return F.cross_entropy(logits, y)
    with pytest.raises(SystemExit):
        run('', Mean)
    assert 'Mean gives a loss of shape () with' in capsys.readouterr().err

def test_auto_stacks_where_it_is_faster():
    args = options.args_parser([], beyond.rooms())
    for device, model, B, stacks in (('cpu', '2nn', 10, True), ('cpu', 'paper_cnn', 10, False),
                                     ('cpu', 'cnn', 50, False), ('cuda', 'paper_cnn', 10, True)):
        args.device, args.model, args.local_bs = torch.device(device), model, B
        assert bool(beyond.engines.wanted(args)) == stacks
    args.dataset = 'shakespeare'
    assert not beyond.engines.wanted(args)

####################################### Compiled #######################################

@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler')
def test_the_compiled_step_equals_the_plain_one(run, capsys):       # noqa: F811
    words = ('--frac 0.7 --unequal 1 --momentum 0.5 --lr_decay 0.9 --lr 0.02 --local_bs 40 '
             '--prune 0.5 --mu 0.1')
    assert near(final(run, words), final(run, f'{words} --compile 1'))
    assert capsys.readouterr().out.count('--compile 1: compiled in') == 1

def test_a_machine_without_a_compiler_gets_one_line(refused, monkeypatch):      # noqa: F811
    def broken(*_):
        raise RuntimeError('no C++ compiler\nand a long story')
    monkeypatch.setattr(torch, 'compile', lambda step, **_: broken)
    line = refused(['--num_users', '10', '--compile', '1'])
    assert 'does not work here (no C++ compiler)' in line
