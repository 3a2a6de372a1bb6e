"""Algorithm 1 as an executable specification: numbers worked by hand, torch itself as the oracle,
the program as a user runs it. beyond/ is not needed; its rooms have tests of their own.

    python -m pytest -q                                         # offline, on small digits
    FEDAVG_DATA=/folder/that/holds/MNIST python -m pytest -q    # on the real MNIST too
"""
import ast
import copy
import csv
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import pathlib
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
import urllib.request
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
BEYOND = importlib.util.find_spec('beyond') is not None
torch.set_num_threads(1)        # two threads are no faster for nets as small as these
os.environ['OMP_NUM_THREADS'] = '1'     # nor in the processes that the tests start

######################################### Helpers #########################################
def write_idx(path, array):
    """A uint8 array as an IDX file, the format of MNIST's own files."""
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f'>{array.ndim}i', *array.shape)
    path.write_bytes(head + array.tobytes())

def write_mnist(root, kind='MNIST', train=300, test=100):
    """A small data set of drawn digits under root, in the files that torchvision reads."""
    raw = root / kind / 'raw'
    raw.mkdir(parents=True)
    for name, n in (('train', train), ('t10k', test)):
        x, y = sampling.synthetic(n, 0, name).tensors
        images = ((x[:, 0] + 1) * 60).clamp(0, 255).byte().numpy()
        write_idx(raw / f'{name}-images-idx3-ubyte', images)
        write_idx(raw / f'{name}-labels-idx1-ubyte', y.byte().numpy())
    return str(root)

def write_cifar(root, monkeypatch):
    """Five batches of 20 images and a test batch, and torchvision told their MD5 sums."""
    folder, draw = root / 'cifar-10-batches-py', np.random.default_rng(0)
    folder.mkdir()
    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
    def batch(name):
        images = draw.integers(256, size=(20, 3072), dtype=np.uint8)
        return write(name, {'data': images, 'labels': list(range(10)) * 2})
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, 'train_list', [batch(f'data_batch_{i}') for i in range(1, 6)])
    monkeypatch.setattr(kind, 'test_list', [batch('test_batch')])
    name, md5 = write('batches.meta', {'label_names': [str(i) for i in range(10)]})
    monkeypatch.setattr(kind, 'meta', {'filename': name, 'key': 'label_names', 'md5': md5})

PLAY = """
	HAMLET

GHOST	a ghost, of the cast.
	PROLOGUE
	Two lines
	are mine.
ACT I
	HAMLET
SCENE I	A room
	with a chair.
GHOST	Mark me! [Aside
	to nobody]
DON
PEDRO	One [Sings]  two,
	|  three.
	HAMLET
SINGLE	A role of one line.
KING
PEDRO	I speak
	as well.
	[Exeunt without an end

GHOST	List, list!
	[He lists] O, list!
DON
PEDRO:	Four.
"""

def write_plays(root, monkeypatch):
    """PLAY and a play of six more roles, and the program told of them."""
    drawn, draw = ['ACT I'], np.random.default_rng(0)
    for i in range(60):
        words = ' '.join(draw.choice(['to', 'be', 'or', 'not'], draw.integers(1, 12)))
        drawn.append(f'ROLE {"ABCDEF"[i % 6]}\t{words}')
    (root / 'shakespeare').mkdir()
    for name, text in (('hamlet', PLAY), ('othello', '\n'.join(drawn))):
        (root / f'shakespeare/{name}.txt').write_text(text)
    monkeypatch.setattr(sampling, 'PLAYS', {
        name: hashlib.sha256((root / f'shakespeare/{name}.txt').read_bytes()).hexdigest()[:16]
        for name in ('hamlet', 'othello')})
    monkeypatch.setattr(options, 'ROLES', 10)
    return str(root)

@pytest.fixture(scope='session')
def data(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp('data'))

@pytest.fixture
def run(data):
    """main() on 300 small digits and 10 clients, in this process; with classes of one's own."""
    small = '--num_users 10 --frac 0.3 --local_ep 1 --epochs 3 --gpu -1'.split()
    small += ['--processes', '1'] * BEYOND      # so that this one sees all of it
    return lambda words='', *classes: fedavg.main(
        ['--data_dir', data, *small, *words.split()], *classes)

@pytest.fixture
def refused(data, capsys):
    """The one line on stderr with which main() refuses the flags in words."""
    def line(words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            fedavg.main(['--data_dir', data, '--gpu', '-1', *words])
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count('\n') == 1, err
        return err
    return line

def shell(words, **more):
    """The program as a process of its own, as a user starts it."""
    command = [sys.executable, str(HERE / 'fedavg.py'), *words.split()]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **more)

def client_args(**more):
    defaults = dict(local_ep=1, local_bs=10, lr=0.1, momentum=0.0, device='cpu')
    return SimpleNamespace(**defaults | more)

def toy(n=12, dim=5, seed=0):
    """n examples with dim features in 3 classes, and a linear net for them."""
    torch.manual_seed(seed)
    return TensorDataset(torch.randn(n, dim), torch.randint(3, (n,))), nn.Linear(dim, 3)

def image_toy(name, n=70):
    """n random images of the net's size in 10 classes, and the net."""
    torch.manual_seed(0)
    channels, side = (3, 32) if name == 'cifar' else (1, 28)
    args = SimpleNamespace(num_channels=channels, num_classes=10)
    args.model = 'cnn' if name == 'cifar' else name
    net, x = models.build(args), torch.randn(n, channels, side, side)
    return TensorDataset(x, torch.randint(10, (n,))), net

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def near(a, b, within=1e-5):
    """Whether each tensor of b is as near to a's as `within` times its norm."""
    return all((a[name] - b[name]).norm() <= within * a[name].norm() for name in a)

def weights(path):
    return torch.load(path, weights_only=True)['w']

def read_log(path):
    """(the options, the rows) of a log."""
    first, *lines = path.read_text().splitlines()
    return json.loads(first.removeprefix('# ')), list(csv.DictReader(lines))

def watched():
    """(a class for main(), the list of w_1, w_2, ... that it fills)."""
    seen = []
    class Watched:
        def end(self, w, row, r):
            super().end(w, row, r)
            seen.append(copy.deepcopy(w))
    return Watched, seen

def final(run, words):
    """The weights that a run ends with."""
    Watched, seen = watched()
    return run(words, Watched) and seen[-1]

################################# The average (a, g, l) #################################
def test_weighted_mean_equals_a_hand_calculation():
    w = [{'v': torch.tensor(v)} for v in ([1.0, 10.0], [4.0, -2.0], [0.0, 6.0])]
    # (1*1 + 2*4 + 5*0) / 8 and (1*10 + 2*-2 + 5*6) / 8: m_t is the sum over these three
    expected = torch.tensor([9 / 8, 36 / 8])
    assert torch.equal(fedavg.FedAvg(w, [1, 2, 5])['v'], expected)
    updates = [fedavg.Update(k, w_k, n, 0.0) for k, (w_k, n) in enumerate(zip(w, [1, 2, 5]))]
    assert torch.equal(fedavg.FedAvg(iter(updates))['v'], expected)
    assert torch.equal(fedavg.FedAvg(w)['v'], torch.tensor([5 / 3, 14 / 3]))

def test_average_refuses_what_has_no_mean():
    one = {'v': torch.ones(2)}
    assert fedavg.FedAvg([]) is None and fedavg.FedAvg([one], [0]) is None
    whole = {'v': torch.ones(2, dtype=torch.int64)}
    for w, n in (([one, {'u': torch.ones(2)}], [1, 1]), ([one, {'v': torch.ones(1)}], [1, 1]),
                 ([one], [1, 2]), ([one], [math.nan]), ([one] * 2, [2, -1]), ([whole], [1])):
        with pytest.raises(ValueError):
            fedavg.FedAvg(w, n)
    for w in ([np.ones(2)] * 2, [{'v': np.ones(2)}] * 2):
        with pytest.raises(TypeError, match='state_dicts or Updates'):
            fedavg.FedAvg(w)

def test_the_loss_that_train_returns_is_never_a_weight():
    dataset, net = toy()
    results = [fedavg.LocalUpdate(client_args(), dataset, range(12)).train(net)] * 2
    for words in ((results,), (results, [1, 2]), ([results[0][0], results[0]],)):
        with pytest.raises(TypeError, match='not a tuple'):
            fedavg.FedAvg(*words)

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
    for v in one.values():
        v.zero_()
    assert w['v'].sum() == 2 and w['i'].sum() == 2
    dataset, net = toy()
    before = copy.deepcopy(net.state_dict())
    w_k, _ = fedavg.LocalUpdate(client_args(), dataset, range(12)).train(net)
    assert same(net.state_dict(), before) and not same(w_k, before)

############################### ClientUpdate (b, c, h, i, n) ###############################
@pytest.mark.parametrize('sizes', [(3, 3, 3, 3), (1, 2, 4, 5)])
def test_one_epoch_of_full_batches_is_one_central_gradient_step(sizes):
    dataset, net = toy()
    args = client_args(local_bs=math.inf, lr=0.7)
    w = [fedavg.LocalUpdate(args, dataset, idxs.tolist()).train(net)[0]
         for idxs in torch.arange(12).split(sizes)]
    w = fedavg.FedAvg(w, sizes)
    x, y = dataset.tensors
    F.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(w['weight'], net.weight - 0.7 * net.weight.grad)
    torch.testing.assert_close(w['bias'], net.bias - 0.7 * net.bias.grad)

@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_one_client_is_plain_sgd(momentum):
    dataset, net = toy()
    args = client_args(local_ep=2, local_bs=5, momentum=momentum)
    torch.manual_seed(3)
    w_k, loss = fedavg.LocalUpdate(args, dataset, range(12)).train(net)
    torch.manual_seed(3)
    shuffles, velocity, losses = [torch.randperm(12) for _ in range(2)], [0, 0], []
    for batch in (b for shuffle in shuffles for b in shuffle.split(5)):
        x, y = dataset[batch]
        l = F.cross_entropy(net(x), y)
        losses.append(l.item() * len(y))
        gradients = torch.autograd.grad(l, list(net.parameters()))
        for i, (p, g) in enumerate(zip(net.parameters(), gradients)):
            velocity[i] = momentum * velocity[i] + g
            p.data -= 0.1 * velocity[i]
    assert same(fedavg.FedAvg([w_k], [12]), w_k)
    torch.testing.assert_close(w_k['weight'], net.weight.data)
    assert loss == pytest.approx(sum(losses) / 24)

@pytest.mark.parametrize('n, B, batches', [
    (7, 3, [3, 3, 1]), (2, 10, [2]), (4, math.inf, [4]), (6, 3, [3, 3])])
def test_the_last_smaller_batch_is_used(n, B, batches):
    dataset, net = toy(n)
    seen = []
    net.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    fedavg.LocalUpdate(client_args(local_ep=2, local_bs=B), dataset, range(n)).train(net)
    assert seen == batches * 2

def test_each_epoch_sees_every_example_once_in_another_order():
    dataset = TensorDataset(torch.arange(20.).view(20, 1), torch.zeros(20, dtype=torch.int64))
    net, seen = nn.Linear(1, 2), []
    net.register_forward_pre_hook(lambda _, x: seen.extend(x[0].flatten().tolist()))
    fedavg.LocalUpdate(client_args(local_ep=2, local_bs=6), dataset, range(5, 20)).train(net)
    assert sorted(seen[:15]) == sorted(seen[15:]) == list(range(5, 20)) and seen[:15] != seen[15:]

def test_a_client_starts_each_round_with_a_fresh_optimizer():
    dataset, net = toy()
    client = fedavg.LocalUpdate(client_args(local_bs=4, momentum=0.9), dataset, range(12))
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(client.train(net)[0])
    assert same(*results)

def test_training_has_dropout_whatever_the_nets_mode():
    dataset = toy(dim=20)[0]
    a, b = (nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 3)) for _ in range(2))
    b.load_state_dict(a.state_dict())
    args = client_args(lr=1e-30, local_ep=5)
    _, loss = fedavg.LocalUpdate(args, dataset, range(12)).train(a.eval())
    evaluated, _ = fedavg.evaluate(b, *dataset.tensors, 5)
    assert loss != pytest.approx(evaluated, rel=1e-3) and not a.training

def test_the_decay_of_lr_reaches_the_step(run):
    still, moved = (final(run, f'--local_bs inf --epochs 2 --lr_decay {decay}')['fc3.bias']
                    for decay in (1e-30, 1.0))
    first = final(run, '--local_bs inf --epochs 1')['fc3.bias']
    assert torch.equal(still, first) and not torch.equal(moved, first)
    dataset, net = toy()
    client = fedavg.LocalUpdate(client_args(), dataset, range(12))
    assert same(client.train(net, lr=0.0)[0], net.state_dict())

def test_any_image_label_data_set_trains_and_is_read_once(data):
    class Counting(datasets.MNIST):
        reads = 0
        def __getitem__(self, i):
            self.reads += 1
            return super().__getitem__(i)
    Counting.__name__ = 'MNIST'
    dataset = Counting(data, transform=lambda image: torch.from_numpy(
        np.array(image)).float().view(1, 28, 28) / 255)
    users, net = sampling.mnist_iid(dataset, 10), models.TwoNN(784, 20, 10)
    for _ in range(2):
        _, loss = fedavg.LocalUpdate(client_args(), dataset, users[0]).train(net)
    assert dataset.reads == 4 * 30 and math.isfinite(loss)      # 4: is its transform random?
    other = fedavg.LocalUpdate(client_args(), dataset, users[1])
    assert other.y.tolist() == [int(dataset.targets[i]) for i in users[1]]
    plain = [(torch.ones(5), 1), (torch.zeros(5), 0)]
    assert fedavg.LocalUpdate(client_args(), plain, {0, 1}).train(nn.Linear(5, 3))[1] > 0
    half = TensorDataset(torch.ones(2, 5), torch.tensor([0.5, 1]))
    for source, idxs in ((plain, []), (plain, [True, False]), (plain, [0.5]), (half, [0]),
                         ([half[0]], [0])):
        with pytest.raises(ValueError, match='whole numbers'):
            fedavg.LocalUpdate(client_args(), source, idxs)
    with pytest.raises(ValueError, match='at least 1'):
        fedavg.LocalUpdate(client_args(local_bs=0), plain, [0]).train(nn.Linear(5, 3))

def test_a_random_transform_is_drawn_anew_for_each_batch():
    class Flipped(list):
        def __getitem__(self, i):
            return torch.full((1,), i + 100.0 * torch.randint(2, ()).item()), i % 2
    net, seen = nn.Linear(1, 2), []
    net.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten().sort().values))
    dataset = Flipped(range(20))
    fedavg.LocalUpdate(client_args(local_ep=2, local_bs=20, lr=1e-9), dataset, range(20)).train(net)
    assert (seen[0] % 100).sort().values.tolist() == list(range(20)) and not seen[0].equal(seen[1])

def test_m_is_rounded_and_at_least_one():
    def m(K, C):
        return len(sampling.select(K, C, sampling.rng(0)))
    cases = (100, 0.29), (100, 0), (100, 1), (7, 0.1), (10, 0.35)
    assert [m(*case) for case in cases] == [29, 1, 100, 1, 4]
    S_t = sampling.select(50, 0.5, sampling.rng(0))
    assert len(set(S_t)) == 25 and 0 <= S_t.min() and S_t.max() < 50

def test_main_is_algorithm_1(run, data):
    w = final(run, '--unequal 1 --epochs 1 --lr_decay 0.5 --local_ep 2')
    args = options.args_parser(['--local_ep', '2'])
    args.device = torch.device('cpu')
    train, _ = sampling.load('mnist', data)
    n_k = sampling.sizes(300, 10, True, 1)
    parts = sampling.partition(train.tensors[1], n_k, seed=1)
    sampling.seed_torch(1, 'init')
    net, updates = models.build(args), []
    S_t = sampling.select(10, 0.3, sampling.rng(1, 'select', 1))
    for k in S_t:
        sampling.seed_torch(1, 'train', 1, k)
        updates.append(fedavg.LocalUpdate(args, train, parts[k]).train(net)[0])
    assert near(fedavg.FedAvg(updates, n_k[S_t]), w)

#################################### Partitions (d, e) ####################################
SPLITS = [dict(iid_=1), dict(iid_=0), dict(iid_=0, alpha=1e-300), dict(iid_=0, alpha=0.1),
          dict(iid_=0, alpha=1e300)]

def dealt(labels, K, unequal=0, seed=0, **split):
    """A partition of the examples of labels over K clients."""
    n_k = sampling.sizes(len(labels), K, unequal, seed)
    return sampling.partition(labels, n_k, **split, seed=seed)

@pytest.mark.parametrize('unequal', [0, 1])
@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('K', [1, 7, 50, 100, 137, 599, 1000])
def test_partitions_are_disjoint_and_cover_every_example(K, split, unequal):
    labels = np.random.default_rng(0).integers(10, size=1000)
    parts = dealt(labels, K, unequal, **split)
    assert list(parts) == list(range(K)) and min(map(len, parts.values())) >= 1
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1000))
    least, *_, most = sorted(map(len, [*parts.values(), parts[0]]))
    if unequal and 1 < K < 500:
        assert most > 2 * least
    assert unequal or most - least <= 1

def test_more_clients_than_examples_is_an_error(refused):
    for K in (0, 1001):
        with pytest.raises(ValueError, match='1 to 1000'):
            sampling.sizes(1000, K)
    assert 'num_users 301: 300 training examples' in refused(['--num_users', '301'])

@pytest.mark.parametrize('unequal', [0, 1])
@pytest.mark.parametrize('K', [7, 100, 137])
def test_a_client_has_at_most_two_label_sorted_shards(K, unequal):
    labels = np.random.default_rng(1).permutation(1000)     # all different: shards are runs
    for idxs in dealt(labels, K, unequal, iid_=0).values():
        assert (np.diff(np.sort(labels[idxs])) > 1).sum() <= 1

def test_the_papers_partitions_of_mnist():
    class Labels:
        targets = torch.arange(60000) // 6000
        def __len__(self):
            return 60000
    mnist = Labels()
    for function in (sampling.mnist_iid, sampling.mnist_noniid, sampling.cifar_iid):
        users = function(mnist, 100)
        assert {len(idxs) for idxs in users.values()} == {600}
        assert len(np.unique(np.concatenate(list(users.values())))) == 60000
    held = [len(set((i // 6000).tolist())) for i in sampling.mnist_noniid(mnist, 100).values()]
    assert max(held) == 2 and min(held) == 1        # 300 divides 6000: no shard has two labels
    assert sampling.labels_of([(None, 3), (None, torch.tensor([5]))]).tolist() == [3, 5]

def test_dirichlet_goes_from_one_label_a_client_to_all_alike():
    labels = np.arange(10000) % 10
    def commonest(alpha):       # mean share of a client's commonest label
        parts = dealt(labels, 50, iid_=0, alpha=alpha)
        return np.mean([np.bincount(labels[i]).max() / len(i) for i in parts.values()])
    shares = [commonest(alpha) for alpha in (0.01, 1, 1000)]
    assert shares[0] > 0.85 and 0.2 < shares[1] < 0.5 and shares[2] < 0.17

################################ Nets and evaluation (f, j) ################################
def test_the_papers_cnn_starts_from_glorots_initialization():
    w = models.PaperCNNMnist(SimpleNamespace(num_channels=1, num_classes=10)).state_dict()
    fans = {'conv1': 25 + 32 * 25, 'conv2': 32 * 25 + 64 * 25, 'fc1': 3136 + 512, 'fc2': 522}
    for name, fan in fans.items():
        v, bound = w[f'{name}.weight'], math.sqrt(6 / fan)
        assert 0.95 * bound < v.abs().max() <= bound and not w[f'{name}.bias'].any()
        assert abs(v.std() / bound - 3**-0.5) < 0.05

@pytest.mark.parametrize('name, channels, count', [
    ('2nn', 1, 199210), ('paper_cnn', 1, 1663370), ('paper_cnn', 3, 1068298), ('mlp', 1, 159010),
    ('cnn', 1, 21840), ('cnn', 3, 62006), ('separable', 1, 17300), ('separable', 3, 59858)])
def test_parameter_counts(name, channels, count):
    model = 'cnn' if name == 'separable' else name
    args = SimpleNamespace(model=model, separable=name == 'separable', num_channels=channels,
                           num_classes=10)
    net, side = models.build(args), 28 if channels == 1 else 32
    assert sum(p.numel() for p in net.parameters()) == count
    assert net(torch.randn(2, channels, side, side)).shape == (2, 10)

def test_a_text_net_of_ones_own_is_tried_on_short_lines_and_all_characters(monkeypatch):
    args = SimpleNamespace(model='models:Own', dataset='shakespeare', shape=(64,), num_classes=75)
    class Few(models.CharLSTM):
        def __init__(self, args):
            super().__init__(args)
            self.embedding = nn.Embedding(74, 8)
    class Unpadded(models.CharLSTM):
        def forward(self, x):
            return self.fc(self.lstm(self.embedding(x))[0]).transpose(1, 2)
    monkeypatch.setattr(models, 'Own', models.CharLSTM, raising=False)
    assert models.build(args)
    class Pair(models.CharLSTM):
        def forward(self, x):
            return super().forward(x), x
    monkeypatch.setattr(models, 'Own', Pair)
    with pytest.raises(ValueError, match='gives a tuple for two examples'):
        models.build(args)
    for wrong in (Few, Unpadded):
        monkeypatch.setattr(models, 'Own', wrong)
        with pytest.raises(ValueError, match='models:Own: IndexError: index out of range'):
            models.build(args)

def test_the_lstm_predicts_each_next_character_whatever_the_padding():
    net = models.build(SimpleNamespace(model='lstm', num_classes=75))
    assert sum(p.numel() for p in net.parameters()) == 818595
    x = torch.tensor([[5, 6, 7, 8], [9, 1, -1, -1]])
    y = torch.tensor([[6, 7, 8, 1], [1, 2, -100, -100]])
    logits = net(x)
    assert logits.shape == (2, 75, 4)
    short = net(x[1:, :2])
    torch.testing.assert_close(logits[1:, :, :2], short)
    wide = [F.pad(x, (0, 9), value=-1), F.pad(y, (0, 9), value=-100)]
    assert torch.equal(net(wide[0])[..., :4], logits)
    every = torch.cat([logits[0].T, short[0].T])                        # (6, 75)
    loss, right = F.cross_entropy(every, y[y >= 0]), every.argmax(1) == y[y >= 0]
    for bs in (1, 2):
        assert fedavg.evaluate(net, *wide, bs) == pytest.approx(
            (loss.item(), right.double().mean().item()), rel=1e-5)
    y[0] = every[:4].argmax(1)
    assert fedavg.evaluate(net, x, y, 2)[1] >= 4 / 6

def test_a_process_without_test_examples_adds_nothing():
    class Flat(nn.Module):
        def forward(self, x):
            return x.view(len(x), -1)           # not of no example
    def others(tensors):
        tensors[0] += torch.tensor([3.0, 1, 2])
    x, y = torch.zeros(0, 4, 1), torch.zeros(0, dtype=torch.int64)
    assert fedavg.evaluate(Flat(), x, y, 2, others) == (1.5, 0.5)

def test_a_net_that_is_not_known_is_refused():
    for more in (dict(model='resnet', num_channels=1), dict(model='2nn', num_channels=2)):
        with pytest.raises(KeyError):
            models.build(SimpleNamespace(num_classes=10, **more))

class Own(nn.Module):
    """A net for images of 28x28."""
    def __init__(self, args):
        super().__init__()
        self.layer = nn.Linear(784, args.num_classes)

    def forward(self, x):
        return self.layer(x.flatten(1))

def test_a_class_of_ones_own_is_tried_on_images_of_the_default_shape():
    args = SimpleNamespace(model='test_fedavg:Own', num_channels=1, num_classes=7)
    assert models.build(args).layer.out_features == 7

def test_the_papers_nets_are_their_layers_in_order():
    net, x = models.TwoNN(784, 200, 10), torch.randn(3, 1, 28, 28)
    layers = nn.Flatten(), net.fc1, nn.ReLU(), net.fc2, nn.ReLU(), net.fc3
    assert torch.equal(net(x), nn.Sequential(*layers)(x))
    net = models.PaperCNNMnist(SimpleNamespace(num_channels=1, num_classes=10))
    pool = nn.MaxPool2d(2)
    layers = (net.conv1, nn.ReLU(), pool, net.conv2, nn.ReLU(), pool, nn.Flatten(), net.fc1,
              nn.ReLU(), net.fc2)
    assert torch.equal(net(x), nn.Sequential(*layers)(x))
    net = models.PaperCNNCifar(SimpleNamespace(num_channels=3, num_classes=10))
    x = torch.randn(3, 3, 24, 24)
    same_padding = nn.ConstantPad2d((0, 1, 0, 1), -math.inf)        # TensorFlow's, from 24 to 12
    pool = nn.Sequential(same_padding, nn.MaxPool2d(3, 2))
    layers = (net.conv1, nn.ReLU(), pool, net.norm, net.conv2, nn.ReLU(), net.norm, pool,
              nn.Flatten(), net.fc1, nn.ReLU(), net.fc2, nn.ReLU(), net.fc3)
    torch.testing.assert_close(net(x), nn.Sequential(*layers)(x))

def test_state_dict_keys_of_the_mirrored_layout():
    keys = lambda *layers: [f'{name}.{kind}' for name in layers for kind in ('weight', 'bias')]
    args = SimpleNamespace(num_channels=1, num_classes=10)
    assert list(models.MLP(784, 200, 10).state_dict()) == keys('layer_input', 'layer_hidden')
    assert list(models.CNNMnist(args).state_dict()) == keys('conv1', 'conv2', 'fc1', 'fc2')
    args.num_channels = 3
    assert list(models.CNNCifar(args).state_dict()) == keys('conv1', 'conv2', 'fc1', 'fc2', 'fc3')

def test_dropout_is_where_the_layout_has_it():
    net = models.CNNMnist(SimpleNamespace(num_channels=1, num_classes=10))
    x = torch.randn(3, 1, 28, 28)
    assert not torch.equal(net.train()(x), net(x)) and torch.equal(net.eval()(x), net(x))
    net.conv2_drop = nn.Identity()
    assert not torch.equal(net.train()(x), net(x))          # fc1's
    mlp, seen = models.MLP(784, 50, 10), []
    mlp.relu.register_forward_pre_hook(lambda _, h: seen.append(h[0]))
    mlp.train()(x)
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7        # half of the relu's inputs

def test_the_cifar_net_sees_the_central_crop_and_tensorflows_normalization():
    net = models.PaperCNNCifar(SimpleNamespace(num_channels=3, num_classes=10))
    x, v = torch.randn(2, 3, 32, 32), torch.randn(1, 64, 1, 1)
    assert torch.equal(net(x), net(x[..., 4:28, 4:28]))
    by_hand = v[0, 30] / (1 + 0.001 / 9 * (v[0, 26:35] ** 2).sum()) ** 0.75     # channel 30
    torch.testing.assert_close(net.norm(v)[0, 30], by_hand)

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
    assert loss == pytest.approx(F.cross_entropy(logits, y).item())
    assert accuracy == (logits.argmax(1) == y).sum().item() / 25

def test_the_test_set_is_what_is_evaluated(run, data):
    Watched, seen = watched()
    history = run('--epochs 1', Watched)
    net, (x, y) = models.TwoNN(784, 200, 10), sampling.load('mnist', data)[1].tensors
    net.load_state_dict(seen[0])
    assert history[0]['test_acc'] == (net(x).argmax(1) == y).sum().item() / 100
    class Half:
        evaluate = staticmethod(lambda *_: (0.25, 0.5))
    assert [run('--epochs 1', Half)[0][name] for name in ('test_loss', 'test_acc')] == [0.25, 0.5]

##################################### Randomness (k) #####################################
def test_same_seed_same_bits_other_seed_other_bits(run):
    a, b, c = (final(run, f'--model mlp --unequal 1 {words}')
               for words in ('--seed 4', '--seed 4 --bs 7 --verbose', '--seed 5'))
    assert same(a, b) and not same(a, c)

def test_the_seed_reaches_partition_selection_initialization_and_shuffling(run):
    labels = np.arange(100) % 10
    for split in SPLITS[:2] + SPLITS[3:4]:
        a, b, c = (np.concatenate(list(dealt(labels, 10, seed=seed, **split).values()))
                   for seed in (1, 1, 2))
        assert (a == b).all() and (a != c).any()
    lengths = [sampling.sizes(100, 10, True, seed).tolist() for seed in (1, 1, 2)]
    assert lengths[0] == lengths[1] != lengths[2]
    draws = {tuple(sampling.select(100, 0.1, sampling.rng(seed, 'select', t)))
             for seed in (1, 2) for t in (1, 2)}
    assert len(draws) == 4
    first, second = (final(run, f'--epochs 1 --lr 1e-30 --seed {seed}') for seed in (1, 2))
    assert not same(first, second)
    shuffles = []
    for keys in ((1, 'train', 1, 0), (1, 'train', 1, 0), (2, 'train', 1, 0), (1, 'train', 2, 0),
                 (1, 'train', 1, 1)):
        sampling.seed_torch(*keys)
        shuffles.append(tuple(torch.randperm(20).tolist()))
    assert shuffles[0] == shuffles[1] and len(set(shuffles)) == 4

def test_synthetic_digits_are_the_same_for_the_same_seed():
    a, b, c = (sampling.synthetic(200, seed, 'train').tensors for seed in (1, 1, 2))
    assert not torch.equal(sampling.synthetic(200, 1, 'test').tensors[0], a[0])
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])
    assert a[0].shape == (200, 1, 28, 28) and set(a[1].tolist()) == set(range(10))

######################################## The data ########################################
def test_small_files_of_each_format_load_standardised(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    write_mnist(tmp_path, 'FashionMNIST')
    raw = np.fromfile(tmp_path / 'MNIST/raw/train-images-idx3-ubyte', np.uint8)[16:]
    train, test = sampling.load('mnist', tmp_path)
    x, y = train.tensors
    assert x.shape == (300, 1, 28, 28) and x.dtype == torch.float32
    assert y.dtype == torch.int64 and len(test) == 100
    by_hand = (raw.reshape(300, 28, 28) / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(x[:, 0].numpy(), by_hand, rtol=1e-4, atol=1e-5)
    assert len(sampling.load('fmnist', tmp_path)[0]) == 300
    write_cifar(tmp_path, monkeypatch)
    train, test = sampling.load('cifar', tmp_path)
    assert train.tensors[0].shape == (100, 3, 32, 32) and len(test) == 20
    with open(tmp_path / 'cifar-10-batches-py/data_batch_1', 'rb') as f:
        pixel = pickle.load(f)['data'][0].reshape(3, 32, 32)[1, 5, 7]
    by_hand = (pixel / 255 - 0.4822) / 0.2435
    assert train.tensors[0][0, 1, 5, 7].item() == pytest.approx(by_hand, rel=1e-4)
    for model in ('cnn', 'paper_cnn'):
        words = f'--dataset cifar --model {model} --num_users 4 --epochs 1 --gpu -1 --lr 0.01'
        history = fedavg.main([*words.split(), '--data_dir', str(tmp_path)])
        assert math.isfinite(history[0]['test_loss'])

def test_a_client_of_shakespeare_is_a_role_whose_last_lines_are_for_testing(tmp_path, monkeypatch):
    train, test, n_k = sampling.shakespeare(write_plays(tmp_path, monkeypatch))
    assert n_k.tolist() == [1, 2, 2, 1] + [8] * 6
    def lines(dataset):
        return [[''.join(f'?{sampling.VOCABULARY}'[c] for c in v[v >= 0]) for v in example]
                for example in dataset]
    assert lines(train)[:6] == [['Two lines', 'wo lines\n'], ['Mark me!', 'ark me!\n'],
                                ['List, list!', 'ist, list!\n'], ['One two,', 'ne two,\n'],
                                ['three.', 'hree.\n'], ['I speak', ' speak\n']]
    assert len(test) == 4 + 6 * 2 and all(line in lines(test) for line in (
        ['are mine.', 're mine.\n'], ['O, list!', ', list!\n'], ['Four.', 'our.\n']))
    x, y = train.tensors
    for deal in (lambda: sampling.mnist_noniid(train, 10), lambda: sampling.shards(y, n_k),
                 lambda: sampling.labels_of([(None, [1, 2]), (None, [3])])):
        with pytest.raises(ValueError, match='each example has to have one label'):
            deal()
    assert x.shape == y.shape == (54, 64) and x[0, 9:].eq(-1).all() and y[0, 9:].eq(-100).all()

@pytest.mark.skipif(not os.path.isdir(f'{os.environ.get("FEDAVG_DATA")}/shakespeare'),
                    reason='needs the plays')
def test_the_plays_are_what_the_flags_say():
    train, test, n_k = sampling.shakespeare(os.environ['FEDAVG_DATA'])
    classes = len(sampling.VOCABULARY) + 1
    assert (len(train), None, classes) == options.DATASETS['shakespeare'] and len(test) == 22006
    assert len(n_k) == options.ROLES and n_k.sum() == len(train)
    x = torch.cat([train.tensors[0], test.tensors[0]])
    assert (x != 0).all() and (x[:, -1] >= 0).any()         # all known; none is cut

def test_eta_is_good_for_the_data_unless_it_is_given():
    text = '--dataset shakespeare --model lstm'.split()
    etas = [options.args_parser(argv).lr for argv in ([], text, [*text, '--lr', '1'])]
    assert etas == [0.1, 1.47, 1]

@pytest.mark.parametrize('iid', [0, 1])
def test_the_lines_of_shakespeare_train(tmp_path, monkeypatch, iid):
    words = f'--dataset shakespeare --model lstm --iid {iid} --local_bs 5 --frac 1 --gpu -1'
    folder = write_plays(tmp_path, monkeypatch)
    history = fedavg.main([*words.split(), '--epochs', '6', '--data_dir', folder])
    losses = [row['test_loss'] for row in history]
    assert losses[-1] < 0.8 * losses[0] and history[-1]['clients'] == 10
    train, _, parts, n_k = sampling.holdings(
        SimpleNamespace(dataset='shakespeare', data_dir=folder, iid=iid, seed=1), 10)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(54))
    assert iid or parts[1].tolist() == [1, 2]
    assert [len(parts[k]) for k in range(10)] == n_k.tolist()
    assert (n_k.max() - n_k.min() <= 1) == iid

def test_plays_that_are_damaged_or_missing_are_named_and_fetched_files_checked(
        tmp_path, monkeypatch, refused):
    folder = write_plays(tmp_path, monkeypatch)
    words = ['--dataset', 'shakespeare', '--model', 'lstm', '--data_dir', folder]
    path = tmp_path / 'shakespeare/othello.txt'
    assert sampling.play_files(['lear', 'hamlet']) == 'shakespeare/lear.txt and 1 more play'
    whole = path.read_bytes()
    for damaged in (whole[:-1], b'', b'ACT I\n'):
        path.write_bytes(damaged)
        assert 'othello.txt is truncated' in refused(words)
    path.unlink()
    with pytest.raises(OSError, match='mnst: there is no such data set'):
        sampling.load('mnst', folder)
    with pytest.raises(OSError, match='lacks shakespeare/othello.txt'):
        sampling.load('shakespeare', folder, download=False)
    monkeypatch.setattr(urllib.request, 'urlopen', lambda *_, **__: io.BytesIO(b'<html>'))
    assert 'othello.txt has changed' in refused(words) and not path.exists()
    monkeypatch.setattr(urllib.request, 'urlopen', lambda *_, **__: io.BytesIO(whole))
    assert len(sampling.load('shakespeare', folder)[0]) == 54 and path.read_bytes() == whole

@pytest.mark.parametrize('file, damage', [
    ('train-images-idx3-ubyte', lambda b: b[:-1]), ('train-labels-idx1-ubyte', lambda b: b''),
    ('t10k-images-idx3-ubyte', lambda b: b'junk' + b[4:]),
    ('t10k-labels-idx1-ubyte', lambda b: b + b'0')])
def test_a_damaged_file_is_named(tmp_path, refused, file, damage):
    path = pathlib.Path(write_mnist(tmp_path)) / 'MNIST/raw' / file
    path.write_bytes(damage(path.read_bytes()))
    assert f'{file} is truncated or corrupt' in refused(['--data_dir', str(tmp_path)])

def test_why_a_file_cannot_be_unpacked_is_said(tmp_path):
    with gzip.open(tmp_path / 'file.gz', 'wb') as f:
        f.write(b'content')
    (tmp_path / 'file').mkdir()
    with pytest.raises(OSError, match='file.gz.*directory'):
        sampling.unpack(str(tmp_path / 'file.gz'))

def test_files_that_do_not_belong_together_are_refused(tmp_path, monkeypatch):
    labels = pathlib.Path(write_mnist(tmp_path)) / 'MNIST/raw/train-labels-idx1-ubyte'
    for wrong in (np.zeros(299, np.uint8), np.full(300, 10, np.uint8)):
        write_idx(labels, wrong)
        with pytest.raises(OSError, match='do not belong together'):
            sampling.load('mnist', tmp_path)
    write_cifar(tmp_path, monkeypatch)
    (tmp_path / 'cifar-10-batches-py/data_batch_3').write_bytes(b'junk')
    with pytest.raises(OSError, match='data_batch_3 is truncated or corrupt'):
        sampling.load('cifar', tmp_path)

@pytest.mark.parametrize('name, first', [
    ('mnist', 'train-images-idx3-ubyte'), ('cifar', 'data_batch_1'),
    ('shakespeare --model lstm', '1kinghenryiv.txt')])
def test_missing_files_without_a_network_name_the_folder_and_both_ways_out(
        name, first, tmp_path, monkeypatch, refused):
    def offline(*_, **__):
        raise urllib.error.URLError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    line = refused(['--dataset', *name.split(), '--data_dir', f'{tmp_path}/no/such'])
    assert all(word in line for word in (
        str(tmp_path), first, '--data_dir', '--dataset synthetic', 'no network'))
    assert not list(tmp_path.iterdir())

####################################### The protocol #######################################
def test_rounds_to_target_is_the_papers_monotone_interpolation():
    # Best so far: 0.96 in round 3, 0.98 in round 4.
    assert fedavg.rounds_to(0.97, [0.90, 0.96, 0.94, 0.98]) == pytest.approx(3.5)
    assert fedavg.rounds_to(0.90, [0.50, 0.90]) == 2 and fedavg.rounds_to(0.4, [0.5]) == 1
    assert fedavg.rounds_to(0.99, [0.5, 0.9]) is None and fedavg.rounds_to(0.9, []) is None

def test_target_stops_the_run_and_is_reported(run, capsys):
    history = run('--target 0.5 --epochs 60 --local_ep 5 --frac 1')
    accuracies = [row['test_acc'] for row in history]
    assert max(accuracies[:-1], default=0) < 0.5 <= accuracies[-1]
    rounds = fedavg.rounds_to(0.5, accuracies)
    assert f'rounds to 50.00 %: {rounds:.1f}' in capsys.readouterr().out
    run('--target 1 --epochs 2 --lr 1e-6')
    assert 'rounds to 100.00 %: not reached by round 2' in capsys.readouterr().out

def test_the_flags_reach_the_steps(run, monkeypatch, capsys):
    seen, holdings = [], sampling.holdings
    def watched_holdings(args, K):
        seen.append((args.seed, args.iid, args.alpha, args.unequal, K))
        return holdings(args, K)
    monkeypatch.setattr(sampling, 'holdings', watched_holdings)
    run('--epochs 1 --seed 3 --iid 0 --alpha 0.5 --unequal 1 --num_users 7 --verbose')
    assert seen == [(3, 0, 0.5, 1, 7)]
    assert capsys.readouterr().out.count('   n_k ') == 2

def test_ctrl_c_ends_the_run_after_a_whole_round(run, capsys):
    class Interrupted:
        def measure(self, w, r):
            if r.t == 2:
                raise KeyboardInterrupt
            return super().measure(w, r)
    with pytest.raises(SystemExit) as e:
        run('', Interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert e.value.code == 130 and 'interrupted after round 1' in capsys.readouterr().out

################################ Bytes (compress.py) ################################
def test_a_payload_is_its_header_its_values_and_a_checksum():
    v = torch.tensor([0.0, 3.0, 1.0, 2.0, 3.0])
    head = b'FAvg' + bytes([2, 0]) + struct.pack('<IIff', 5, 5, 0.0, 1.0)
    body = head + bytes([0b10_01_11_00, 0b11])          # two bits each, lowest first: 0 3 1 2, 3
    assert compress.encode(v, quantize=2) == body + struct.pack('<I', zlib.crc32(body))
    sparse = compress.encode(v * torch.tensor([1, -1, 1, 1, 1.1]), topk=0.4)
    assert sparse[5:14] == bytes([1]) + struct.pack('<II', 5, 2)
    assert sparse[22:23] == bytes([0b10010])            # a bitmap of 5
    torch.testing.assert_close(compress.decode(sparse, 5), torch.tensor([0, -3.0, 0, 0, 3.3]))

##################################### The command line (p) #####################################
REFUSED = """
--frac 1.5: --frac; --frac -0.1: --frac; --frac nan: --frac; --num_users 0: --num_users;
--num_users 60001: 60000; --local_ep 0: --local_ep; --local_bs 0: or inf; --local_bs 2.5: or inf;
--epochs 0: --epochs; --lr 0: --lr; --lr inf: --lr; --lr 1e39: --lr; --lr_decay 1.1: --lr_decay;
--momentum -1: --momentum; --bs 0: --bs; --target 0: --target; --target 97: 0.97 is 97 %;
--seed -1: --seed; --iid True: --iid; --iid 2: --iid; --gpu -2: --gpu; --alpha 0 --iid 0: --alpha;
--alpha 1: --iid 0; --model resnet: paper_cnn; --dataset imagenet: synthetic;
--num_channels 3: mnist has 1; --num_classes 7: 10; --fracs 1: did you mean --frac?;
--rounds 5: did you mean --epochs?; --num_clients 5: did you mean --num_users?;
--model lstm: 2nn; --dataset shakespeare: lstm; --dataset shakespeare --model lstm --alpha 1: 1242;
--dataset shakespeare --model lstm --num_users 100: 1242; --unequal 1 --dataset shakespeare --model
lstm: --unequal; --data-dir x: did you mean --data_dir?;
--learning_rate 1: did you mean --lr?; --non_iid: did you mean --iid 0?; extra: this is not a flag;
--xyzzy 1: --help"""

@pytest.mark.parametrize('case', [*REFUSED.split(';'), f'--seed {"9" * 5000}: --seed'])
def test_senseless_values_end_in_one_line_before_any_data_are_read(refused, monkeypatch, case):
    words, said = case.strip().rsplit(': ', 1)
    monkeypatch.setattr(sampling, 'holdings', lambda *_: pytest.fail('data were read'))
    assert said in refused(words.split())

def test_gpu_is_used_where_it_is(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert options.device(3).type == 'cpu'
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert options.device(1) == torch.device('cuda', 1) and options.device(-1).type == 'cpu'
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert options.device((0, 1)) == torch.device('cuda', 1)
    for gpu in 1, (0, 2):
        with pytest.raises(SystemExit):
            options.device(gpu)
        assert 'has 2 GPUs' in capsys.readouterr().err

def test_every_flag_is_read_somewhere_and_in_a_readme():
    rooms = importlib.import_module('beyond').rooms() if BEYOND else ()
    flags = vars(options.args_parser([], rooms))
    texts = [path.read_text() for path in [*HERE.glob('*.py'), *HERE.glob('beyond/*.py')]
             if not path.name.startswith(('test_', 'options'))]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {node.args[1].value for node in nodes if isinstance(node, ast.Call)
             and getattr(node.func, 'id', '') == 'getattr' and len(node.args) > 1
             and isinstance(node.args[1], ast.Constant)}
    assert set(flags) <= read
    readmes = ''.join(path.read_text() for path in HERE.glob('**/README.md'))
    assert not [flag for flag in flags if f'--{flag}' not in readmes]

MODULES = {
    'options.py': 'import options; assert options.args_parser([]).num_users == 100',
    'sampling.py': 'import sampling; assert len(sampling.mnist_iid(range(50), 7)[6]) == 7',
    'models.py': 'import models; models.MLP(784, 200, 10)',
    'compress.py': 'import compress, torch as t; '
                   'compress.decode(compress.encode(t.ones(3), 8, 0.5), 3)',
    'fedavg.py': '''
import torch, types, fedavg
args = types.SimpleNamespace(local_ep=1, local_bs=2, lr=0.1, momentum=0.0, device='cpu')
dataset, net = [(torch.ones(3), 1), (torch.zeros(3), 0)], torch.nn.Linear(3, 2)
w = [fedavg.LocalUpdate(args, dataset, [k]).train(net)[0] for k in (0, 1)]
assert fedavg.FedAvg(w, [1, 2])['weight'].shape == (2, 3)'''}

@pytest.fixture(scope='session', autouse=True)
def started(tmp_path_factory):
    """The program, and each file alone in its folder; they run beside the other tests."""
    processes = [shell('--dataset synthetic --epochs 2 --num_users 1000')]
    for name, use in MODULES.items():
        folder = tmp_path_factory.mktemp(name[:-3])
        shutil.copy(HERE / name, folder)
        processes.append(subprocess.Popen([sys.executable, '-c', use], cwd=folder))
    return processes

def test_each_file_works_alone_in_an_empty_folder(started):
    assert [process.wait() for process in started[1:]] == [0] * len(MODULES)

def test_the_program_runs_as_a_user_starts_it(started):
    out, err = started[0].communicate(timeout=100)
    assert started[0].returncode == 0 and err == '' and 'best test accuracy' in out

@pytest.mark.skipif('FEDAVG_DATA' not in os.environ, reason='FEDAVG_DATA names no folder')
@pytest.mark.parametrize('iid, best', [(1, 0.88), (0, 0.4)])
def test_real_mnist_is_learnt(iid, best):
    words = f'--epochs 3 --seed 0 --gpu -1 --iid {iid} --data_dir {os.environ["FEDAVG_DATA"]}'
    assert max(row['test_acc'] for row in fedavg.main(words.split())) > best
