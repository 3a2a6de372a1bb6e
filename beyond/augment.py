"""Augmentation: more examples from those that there are.

    python fedavg.py --iid 0 --unequal 1 --balance 1 --augment 1

In ClientUpdate, --augment 1 turns, shears, zooms and shifts the images of each batch at random;
CIFAR-10's are mirrored too, and those for paper_cnn changed as in the paper (McMahan et al. 2017,
Section 3). Before Algorithm 1, --balance 1 gives small clients augmented copies of the examples of
their rare labels (after Duan et al. 2019, arXiv 1907.01132); n_k, the weight in the average, stays,
as copies add no information.
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from beyond import Room
from options import fail
from sampling import MEAN_STD, affine, rng, seed_torch

def flags(add):
    """--augment, --balance."""
    add('augment', 0, bool, "1: images turned, sheared, zoomed and shifted at random in training; "
        "CIFAR's mirrored too, and paper_cnn's as in the paper")
    add('balance', 0, bool, '1: small clients and their rare labels get augmented copies; n_k, '
        'their weight in the average, stays, as copies say nothing new')

CLASHES = (('balance', 'dp example', 'as a copy shows an example twice'),
           ('balance', 'dp user', 'as what one client holds changes how much others train'),
           ('balance', 'dataset shakespeare', 'whose lines have no single label'),
           ('augment', 'dataset shakespeare', 'which has no images'))

def as_in_the_paper(args):
    """Whether images are those of the TensorFlow tutorial, the paper's for CIFAR-10."""
    return args.augment and args.dataset == 'cifar' and args.model == 'paper_cnn'

def shown_to(args):
    """What happens to images that a net of these args is evaluated on."""
    return functools.partial(tutorial, train=False) if as_in_the_paper(args) else lambda x: x

def need_images(flag, x):
    """Exits with one line if x, (n, ...), are no images."""
    if x.dim() != 4:
        fail(f'--{flag} 1: turns images, (channels, height, width), and these examples have shape '
             f'{tuple(x.shape[1:])}; leave the flag out', everyone=True)

class Augmented(Room):
    """The test set as the clients' nets expect it."""
    def prepare(self):
        super().prepare()
        x, y = self.test_set.tensors
        need_images('augment', x)
        self.test_set = TensorDataset(shown_to(self.args)(x), y)

class AugmentedClient:
    """args: also dataset, model and augment."""
    stacks = True

    def transform(self, x):
        x = super().transform(x)
        if as_in_the_paper(self.args):
            return tutorial(x)
        return augmented(x, flip=self.args.dataset == 'cifar')

class Balanced(Room):
    """Gives clients copies of examples of their rare labels."""
    def prepare(self):
        super().prepare()
        x, y = self.train_set.tensors
        need_images('balance', x)
        draw = rng(self.args.seed, 'balance')
        more, n = lacking(self.parts, y.cpu(), self.n_k.mean(), draw), len(y)
        originals = torch.from_numpy(np.concatenate(list(more.values()))).to(y.device)
        ends = n + np.cumsum([len(idxs) for idxs in more.values()])
        self.parts = {k: np.append(self.parts[k], np.arange(end - len(idxs), end))
                      for (k, idxs), end in zip(more.items(), ends)}
        print(f'--balance 1: {len(originals)} copies')
        seed_torch(self.args.seed, 'copies')
        copies = [augmented(images) for images in x[originals].split(4000)]
        y = torch.cat([y, y[originals]])
        self.train_set = TensorDataset(torch.cat([x, *copies]), y)
        self.costs = self.counts(self.parts)    # examples and copies, (K,)

    def cost(self, k):
        return int(self.costs[k])

def augmented(x, flip=False):
    """Images (n, c, h, w), each turned, sheared, zoomed and shifted, at random by torch's own
    generator; half of them mirrored, if flip."""
    if not len(x):
        return x
    u = 2 * torch.rand(6, len(x), device=x.device) - 1
    stretch = torch.exp(0.1 * u[2:4].mT)
    if flip:
        mirror = torch.randint(2, (len(x),), device=x.device) * 2. - 1
        stretch = stretch * torch.stack([mirror, torch.ones_like(u[0])], 1)
    theta = affine(0.2 * u[0], 0.2 * u[1], stretch, 0.15 * u[4:6].mT)   # 0.15: 2 pixels of 28
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode='border', align_corners=False)

def tutorial(x, train=True):
    """CIFAR-10's images (n, 3, 32, 32), standardised by channel, as the TensorFlow tutorial shows
    them to a net (McMahan et al. 2017, Section 3): (n, 3, 24, 24), standardised each by itself; in
    training a random crop, mirrored, with another contrast. (Standardising takes away another
    brightness.)"""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in MEAN_STD['cifar'])
    x = cropped(x * std + mean, train)
    if train:
        level = x.mean((2, 3), keepdim=True)
        x = (x - level) * (0.2 + 1.6 * torch.rand(len(x), 1, 1, 1, device=x.device)) + level
    x = x - x.mean((1, 2, 3), keepdim=True)
    deviation = x.square().mean((1, 2, 3), keepdim=True).sqrt()
    return x / deviation.clamp(min=(3 * 24 * 24) ** -0.5 / 255)         # of pixels from 0 to 255

def cropped(x, train):
    """24x24 crops of images (n, 3, 32, 32): random and mirrored by half in training, else
    central."""
    n, device = len(x), x.device
    if train:
        corner = torch.randint(9, (2, n, 1), device=device)
    else:
        corner = torch.full((2, n, 1), 4, device=device)
    rows, columns = corner + torch.arange(24, device=device)            # (n, 24) each
    if train:
        mirrored = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    images = torch.arange(n, device=device)[:, None, None]
    return x[images, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)

def lacking(parts, labels, mean, draw):
    """{k: indices, with repetitions, of examples that client k gets copies of}: so many that each
    of its labels has max(n_k, mean) / (its labels) examples, if it has fewer (after Duan et al.
    2019). mean: that of n_k over all clients; draw: a NumPy generator."""
    labels, more = np.asarray(labels), {}
    for k, idxs in parts.items():
        held, counts = np.unique(labels[idxs], return_counts=True)
        goal = int(max(len(idxs), mean) / len(held))
        more[k] = np.concatenate([draw.choice(idxs[labels[idxs] == label], max(goal - count, 0))
                                  for label, count in zip(held, counts)])
    return more
