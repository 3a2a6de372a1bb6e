"""Augmentation: images change as they should, and copies take time but do not weigh.

    python -m pytest -q beyond/test_augment.py
"""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import beyond
import fedavg
import sampling
from beyond.augment import (Augmented, AugmentedClient, Balanced, augmented, lacking, shown_to,
                            tutorial)
from test_fedavg import client_args, data, final, refused, run, same     # noqa: F401

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in sampling.MEAN_STD['cifar'])

def test_images_are_turned_sheared_zoomed_and_shifted():
    no, one, none = torch.zeros(1), torch.ones(1, 2), torch.zeros(1, 2)
    x = torch.arange(25.0).view(1, 1, 5, 5)
    def seen(*theta):
        grid = F.affine_grid(sampling.affine(*theta), x.shape, align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)
    torch.testing.assert_close(seen(no, no, one, none), x)
    quarter = torch.tensor([math.pi / 2])
    torch.testing.assert_close(seen(quarter, no, one, none), x.rot90(1, (2, 3)))
    right = torch.tensor([[0.4, 0.0]])          # 2 is the width
    torch.testing.assert_close(seen(no, no, one, right)[..., :4], x[..., 1:])
    torch.manual_seed(0)
    x = sampling.synthetic(64, 0, 'train').tensors[0]
    changed = augmented(x)
    assert changed.shape == x.shape and (changed != x).flatten(1).any(1).all()
    assert abs(changed.mean() - x.mean()) < 0.1

def test_half_of_cifars_images_are_mirrored():
    torch.manual_seed(0)
    left = torch.zeros(400, 3, 32, 32)
    left[..., :16] = 1
    mirrored = augmented(left, flip=True)[..., :4].mean((1, 2, 3)) < 0.5
    assert 150 < mirrored.sum() < 250
    assert not (augmented(left)[..., :4].mean((1, 2, 3)) < 0.5).any()
    assert augmented(left[:0]).shape == (0, 3, 32, 32)

def test_cifars_test_images_are_the_tutorials():
    raw = torch.rand(40, 3, 32, 32)
    one = raw[0, :, 4:28, 4:28]
    expected = (one - one.mean()) / one.std(correction=0)
    torch.testing.assert_close(tutorial((raw - MEAN) / STD, False)[0], expected,
                               rtol=1e-4, atol=1e-4)
    # A contrast of one grey level is stretched, none at all is not.
    dim = (0.5 + 0.004 * raw[:2] - MEAN) / STD
    assert tutorial(dim, False).std((1, 2, 3), correction=0).min() > 0.9
    assert tutorial(torch.zeros(1, 3, 32, 32), False).isfinite().all()

def test_cifars_training_images_are_the_tutorials():
    torch.manual_seed(0)
    row, column = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing='ij')
    raw = torch.stack([row, column, column]).expand(400, 3, 32, 32) / 32
    changed = tutorial((raw - MEAN) / STD)
    torch.testing.assert_close(changed.mean((1, 2, 3)), torch.zeros(400), rtol=0, atol=1e-5)
    step = changed[..., 0, 1] - changed[..., 0, 0]      # the columns': its sign says if mirrored
    assert 150 < (step[:, 1] < 0).sum() < 250
    assert (changed[:, 0, 1, 0] > changed[:, 0, 0, 0]).all()            # never upside down
    channels = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1)
    changed = tutorial((raw + channels - MEAN) / STD)
    # The contrast within a channel, beside that between two: 0.2 to 1.8. The crops alone would
    # make less than a factor of 2.
    level = changed.mean((2, 3))
    contrast = changed.std((2, 3))[:, 0] / (level[:, 2] - level[:, 0])
    assert contrast.max() > 5 * contrast.min()
    dot = torch.zeros(400, 3, 32, 32)
    dot[..., 16, 16] = 1
    at = tutorial(dot)[:, 0].flatten(1).argmax(1)       # all crops, and mirrored ones
    assert {*(at // 24).tolist()} == {*range(8, 17)} and {*(at % 24).tolist()} == {*range(7, 17)}
    assert tutorial(raw[:0]).shape == (0, 3, 24, 24)

class Holding:
    """A server with these sets."""
    def __init__(self, args, test_set):
        self.args, self.test_set = args, test_set

    def prepare(self):
        """All is there."""

@pytest.mark.parametrize('model, side', [('paper_cnn', 24), ('cnn', 32)])
def test_only_the_papers_cifar_net_sees_the_tutorials_images(model, side):
    args = client_args(dataset='cifar', model=model, augment=1)
    data = TensorDataset(torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))   # noqa: F811
    server = type('Server', (Augmented, beyond.Room, Holding), {})(args, data)
    server.prepare()
    x, _ = server.test_set.tensors
    assert x.shape[-1] == side and torch.equal(x, data.tensors[0]) == (side == 32)
    assert torch.equal(shown_to(args)(data.tensors[0]), x)
    client = type('Client', (AugmentedClient, fedavg.LocalUpdate), {})(args, data, range(4))
    changed = client.transform(data.tensors[0])
    assert changed.shape[-1] == side and not torch.equal(changed, x)

LABELS = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 0])
PARTS = {0: np.array([0, 1, 2, 3]), 1: np.array([4, 5, 6, 7, 8, 9]), 2: np.array([10])}

class Dealt:
    """A server with three clients."""
    def __init__(self):
        self.args, self.K, self.parts = SimpleNamespace(seed=0), 3, PARTS
        torch.manual_seed(3)
        self.train_set = TensorDataset(torch.rand(11, 1, 28, 28), torch.from_numpy(LABELS))
        self.n_k = np.array([4, 7, 1])      # their mean is 4

    def prepare(self):
        """All is there."""

def test_small_clients_get_copies_of_their_rare_labels():
    more = lacking(PARTS, LABELS, 4.0, sampling.rng(0))
    # 2 of each label; 3; 4.
    assert [more[k].tolist() for k in range(3)] == [[3], [9, 9], [10, 10, 10]]
    made = type('Server', (Balanced, beyond.Room, Dealt), {})
    server, again = made(), made()
    x, before = server.train_set.tensors[0].clone(), torch.rand(3)
    server.prepare()
    torch.manual_seed(5)        # whatever was drawn before, the copies are the same
    again.prepare()
    bigger, y = server.train_set.tensors
    assert torch.equal(again.train_set.tensors[0], bigger) and len(before) == 3
    parts = server.parts
    assert {k: len(v) for k, v in parts.items()} == {0: 5, 1: 8, 2: 4} and len(bigger) == 17
    assert [server.cost(k) for k in range(3)] == [5, 8, 4]
    assert server.n_k.tolist() == [4, 7, 1]
    assert y[parts[0]].tolist() == [0, 0, 0, 1, 1] and y[parts[2]].tolist() == [0] * 4
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(17))
    assert torch.equal(bigger[:11], x) and not torch.equal(bigger[11], x[3])

def test_copies_do_not_weigh_in_the_average_but_take_time(run):     # noqa: F811
    weighed = {}
    class Watched:
        """Notes the weights of the updates, and how long they took."""
        def average(self, updates, w, r):
            self.seen = list(updates)
            weighed.update({u.k: u.n for u in self.seen})
            costs = [self.cost(k) for k in range(10)]
            assert self.duration.tolist() == (np.array(costs) / np.median(costs)).tolist()
            assert min(costs) > 15 > min(self.n_k)
            return super().average(iter(self.seen), w, r)
    run('--balance 1 --augment 1 --unequal 1 --frac 1 --epochs 1', Watched)
    assert [weighed[k] for k in range(10)] == sampling.sizes(300, 10, True, 1).tolist()

def test_augmentation_reaches_the_step(run):        # noqa: F811
    for engine in ('loop', 'stacked'):
        plain, changed = (final(run, f'--augment {augment} --epochs 1 --engine {engine}')
                          for augment in (0, 1))
        assert not same(plain, changed)

def vectors(data_dir):
    """A data set of vectors."""
    return ([(torch.ones(5), 0)] * 20,) * 2

@pytest.mark.parametrize('flag', ('--augment', '--balance'))
def test_only_images_are_turned(flag, refused):
    words = '--dataset beyond.test_augment:vectors --num_classes 2 --num_users 2'.split()
    assert f'{flag} 1: turns images' in refused([*words, flag, '1'])

def test_copies_are_refused_where_an_example_may_be_shown_once(refused):        # noqa: F811
    words = '--balance 1 --dp example --clip 1 --noise 1'
    assert '--dp example' in refused(words.split())
