"""The data, who holds which examples, and who is asked in round t (McMahan et al. 2017, Sections 2 and 3).

A partition is a dict {client k: array of indices into the training set}, disjoint and covering every example. How many
examples a client holds (`sizes`) and which ones (`iid`, `shards`, `dirichlet`) are chosen apart, so that any two go
together. All randomness comes from `rng`. This file needs numpy, torch and torchvision.

    from sampling import mnist_noniid
    from torchvision.datasets import MNIST
    users = mnist_noniid(MNIST('data'), 100)
"""
import hashlib
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

#############################################
#                Randomness                 #
#############################################

def rng(seed, *keys):
    """The NumPy generator of (seed, *keys), keys being names and whole numbers: the same for the same, whatever ran before."""
    text = ' '.join(map(str, (seed, *keys)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), 'big'))

#############################################
#                 The data                  #
#############################################

KINDS = {'mnist': datasets.MNIST, 'fmnist': datasets.FashionMNIST, 'cifar': datasets.CIFAR10}
MEAN_STD = {'mnist': ((0.1307,), (0.3081,)), 'fmnist': ((0.2860,), (0.3530,)),
            'cifar': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))}

def load(name, data_dir, seed=0, download=True):
    """Training and test set as two TensorDatasets: images (n, channels, h, w) standardised float32, labels (n,) int64.

    name: 'mnist', 'fmnist', 'cifar', read through torchvision from data_dir (downloaded if missing there, and asked for), or
    'synthetic', drawn from seed. Raises OSError with one line that names the folder or the file at fault.
    """
    if name == 'synthetic': return synthetic(60000, seed, 'train'), synthetic(10000, seed, 'test')
    for path in files(name, data_dir):
        if os.path.exists(path) and not sound(path): raise OSError(f'{path} is truncated or corrupt; delete it and fetch it anew')
    missing = [path for path in files(name, data_dir) if not os.path.exists(path)]
    if missing and not download: raise OSError(f'{os.path.abspath(data_dir)} lacks {", ".join(os.path.relpath(p, data_dir) for p in missing)}')
    try:
        sets = [KINDS[name](data_dir, train=train, download=True) for train in (True, False)]
    except Exception as e:      # torchvision raises anything from URLError to RuntimeError here
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
        lacks = ', '.join(os.path.relpath(path, data_dir) for path in missing) or 'readable files'
        raise OSError(f'{os.path.abspath(data_dir)} lacks {lacks}, and the download failed ({reason}); name the folder that holds '
                      f'{name} with --data_dir, or take --dataset synthetic') from e
    return tuple(standardised(name, data_dir, s) for s in sets)

def files(name, data_dir):
    """The paths of the files that torchvision keeps under data_dir for the data set `name`."""
    kind = KINDS[name]
    if name == 'cifar':
        return [os.path.join(data_dir, kind.base_folder, f) for f in (*dict(kind.train_list + kind.test_list), kind.meta['filename'])]
    return [os.path.join(data_dir, kind.__name__, 'raw', f.removesuffix('.gz')) for f, _ in kind.resources]

def sound(path):
    """Whether a data file is whole: an IDX file by its header's dimensions, a CIFAR batch by the MD5 sum torchvision knows."""
    name = os.path.basename(path)
    if not name.endswith('-ubyte'):
        cifar = datasets.CIFAR10
        return check_integrity(path, {cifar.meta['filename']: cifar.meta['md5'], **dict(cifar.train_list + cifar.test_list)}[name])
    if not os.path.isfile(path): return False
    with open(path, 'rb') as f: head = f.read(16)
    dims = 3 if 'images' in name else 1                         # magic number: 0, 0, 8 for uint8, number of dimensions
    shape = [int.from_bytes(head[4 + 4 * i:8 + 4 * i], 'big') for i in range(dims)]
    return head[:4] == bytes((0, 0, 8, dims)) and os.path.getsize(path) == 4 + 4 * dims + math.prod(shape)

def standardised(name, data_dir, dataset):
    """A torchvision data set's uint8 images and labels as a TensorDataset. Raises OSError if they do not belong together."""
    x, y = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    x = x.permute(0, 3, 1, 2) if x.dim() == 4 else x.unsqueeze(1)               # (n, channels, h, w)
    if len(x) != len(y) or not len(x) or x.shape[-2:] != ((32, 32) if name == 'cifar' else (28, 28)) or not 0 <= y.min() <= y.max() < 10:
        raise OSError(f'{os.path.abspath(data_dir)}: {name} there holds {len(x)} images of {tuple(x.shape[1:])} and {len(y)} labels '
                      'that do not belong together; fetch it anew')
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in MEAN_STD[name])
    return TensorDataset(x.float().div_(255).sub_(mean).div_(std).contiguous(), y.long())

#############################################
#              Synthetic digits             #
#############################################

# Pen strokes through points "xy" on a grid 5 wide and 7 high, y downwards.
GLYPHS = ('10 30 41 45 36 16 05 01 10', '02 20 26', '01 10 30 41 42 06 46', '01 10 30 41 42 33 13, 33 44 45 36 16 05', '30 04 44, 30 36',
          '40 00 02 32 43 45 36 16 05', '30 12 04 05 16 36 45 44 33 13 04', '00 40 16',
          '10 30 41 42 33 13 02 01 10, 13 33 44 45 36 16 05 04 13', '42 33 13 02 01 10 30 41 42 34 16')

REACH = 1.5         # of the distance fields, in digits' heights

def distance_fields(side=48):
    """How far each point of [-REACH, REACH]^2 is from each digit's pen strokes, (10, 1, side, side); a digit is 1 high."""
    axis = torch.linspace(-REACH, REACH, side)
    at = torch.stack(torch.meshgrid(axis, axis, indexing='xy'), -1)[:, :, None]             # (side, side, 1, 2)
    fields = []
    for glyph in GLYPHS:
        ends = torch.tensor([[[int(p[0]) - 2, int(p[1]) - 3] for p in pair] for stroke in glyph.split(', ')
                             for pair in zip(stroke.split(), stroke.split()[1:])]) / 6      # (segments, 2 ends, 2)
        a, along = ends[:, 0], ends[:, 1] - ends[:, 0]
        where = (((at - a) * along).sum(-1) / (along * along).sum(-1)).clamp(0, 1)          # nearest point's share of the segment
        fields.append((at - a - where[..., None] * along).norm(dim=-1).amin(-1))
    return torch.stack(fields)[:, None]

def affine(turn, shear, stretch, shift):
    """Where a picture's points come from, (n, 2, 3) for affine_grid: turn (radians) and shear (n,), stretch and shift (n, 2)."""
    c, s = turn.cos(), turn.sin()
    theta = torch.stack([stretch[:, :1] * torch.stack([c, shear * c - s, 0 * c], 1),
                         stretch[:, 1:] * torch.stack([s, shear * s + c, 0 * c], 1)], 1)
    theta[:, :, 2] = shift
    return theta

def synthetic(n, seed, name):
    """n digits drawn with a pen of random width, turned, sheared, stretched, shifted, bent and covered with noise."""
    draw = torch.Generator().manual_seed(int(rng(seed, 'synthetic', name).integers(2**63)))
    fields = distance_fields()
    y = torch.randint(10, (n,), generator=draw)
    x = torch.empty(n, 1, 28, 28)
    def normal(*shape): return torch.randn(*shape, generator=draw)
    for at in torch.arange(n).split(4000):
        b = len(at)
        turn, shear, stretch = 0.2 * normal(b), 0.2 * normal(b), torch.exp(0.12 * normal(b, 2)) / 0.75
        bend, phase = 0.04 * normal(b, 2, 1, 1), 3 * normal(b, 2, 1, 1)
        theta = affine(turn, shear, stretch / 2, 0.08 * normal(b, 2))
        grid = F.affine_grid(theta, (b, 1, 28, 28), align_corners=True)                             # (b, 28, 28, 2)
        grid = grid + (bend * torch.sin(5 * grid.permute(0, 3, 1, 2).flip(1) + phase)).permute(0, 2, 3, 1)
        d = F.grid_sample(fields[y[at]], grid / REACH, align_corners=True, padding_mode='border')   # (b, 1, 28, 28)
        pen, ink = 0.06 + 0.02 * normal(b, 1, 1, 1), 0.85 + 0.15 * normal(b, 1, 1, 1)
        x[at] = ink * ((pen.clamp(min=0.02) - d) / 0.06 + 0.5).clamp_(0, 1) + 0.1 * normal(b, 1, 28, 28)
    return TensorDataset(x.sub_(0.15).div_(0.35), y)

#############################################
#              More examples                #
#############################################

def augmented(x, flip=False):
    """Images (n, c, h, w), each turned, sheared, zoomed and shifted, at random by torch's own generator; half mirrored, if flip."""
    if not len(x): return x
    u = 2 * torch.rand(6, len(x), device=x.device) - 1
    stretch = torch.exp(0.1 * u[2:4].mT)
    if flip: stretch = stretch * torch.stack([torch.randint(2, (len(x),), device=x.device) * 2. - 1, torch.ones_like(u[0])], 1)
    grid = F.affine_grid(affine(0.2 * u[0], 0.2 * u[1], stretch, 0.15 * u[4:6].mT), x.shape, align_corners=False)   # 0.15: 2 pixels of 28
    return F.grid_sample(x, grid, padding_mode='border', align_corners=False)

def tutorial(x, train=True):
    """CIFAR-10's images (n, 3, 32, 32), standardised by channel, as the TensorFlow tutorial shows them to a net (McMahan et al. 2017,
    Section 3): (n, 3, 24, 24), standardised each by itself; in training a random crop, mirrored, with another contrast. (Another brightness
    would be taken away by the standardisation.)"""
    n, (mean, std) = len(x), (torch.tensor(v, device=x.device).view(3, 1, 1) for v in MEAN_STD['cifar'])
    x = x * std + mean
    corner = torch.randint(9, (2, n, 1), device=x.device) if train else torch.full((2, n, 1), 4, device=x.device)
    rows, columns = corner + torch.arange(24, device=x.device)                                  # (n, 24) each
    if train: columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)
    x = x[torch.arange(n, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)   # (n, 3, 24, 24)
    if train:
        level = x.mean((2, 3), keepdim=True)
        x = (x - level) * (0.2 + 1.6 * torch.rand(n, 1, 1, 1, device=x.device)) + level
    x = x - x.mean((1, 2, 3), keepdim=True)
    return x / x.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=(3 * 24 * 24) ** -0.5 / 255)      # of pixels from 0 to 255

def lacking(parts, labels, mean, draw):
    """{k: indices, with repetitions, of examples that client k is to have copies of}: so many that each of the labels it holds has
    max(n_k, mean) / (its labels) examples, if it has fewer (after Duan et al. 2019). mean: that of n_k over all clients."""
    labels, more = np.asarray(labels), {}
    for k, idxs in parts.items():
        of, count = np.unique(labels[idxs], return_counts=True)
        goal = int(max(len(idxs), mean) / len(of))
        more[k] = np.concatenate([draw.choice(idxs[labels[idxs] == label], max(goal - c, 0)) for label, c in zip(of, count)])
    return more

#############################################
#         Who holds which examples          #
#############################################

def sizes(n, K, unequal=False, seed=0):
    """n_k, (K,) int64 that add up to n, none 0: as equal as can be, or in proportion to log-normal factors (sigma 1).

    Raises ValueError if K is not in [1, n].
    """
    if not 1 <= K <= n: raise ValueError(f'--num_users {K}: {n} training examples can be shared by 1 to {n} clients')
    factor = rng(seed, 'sizes').lognormal(size=K) if unequal else np.ones(K)
    share = (n - K) * factor / factor.sum()                     # beyond the one example that each has
    n_k = 1 + np.floor(share).astype(np.int64)
    short = n - n_k.sum()
    n_k[np.argsort(np.floor(share) - share, kind='stable')[:short]] += 1
    return n_k

def iid(n_k, seed=0):
    """Shuffled, then dealt out: {k: n_k[k] indices} (Section 3, "IID")."""
    order = rng(seed, 'partition').permutation(n_k.sum())
    return dict(enumerate(np.split(order, n_k.cumsum()[:-1])))

def shards(labels, n_k, seed=0):
    """Sorted by label, cut into 2K shards, two for each client (Section 3, "Non-IID"): {k: n_k[k] indices}.

    A client's two shards are the halves of its n_k, so nothing is lost or repeated for any K, and sizes may be unequal.
    """
    draw = rng(seed, 'partition')
    order = draw.permutation(len(labels))
    order = order[np.argsort(labels[order], kind='stable')]     # by label, in random order within one
    halves = np.stack([(n_k + 1) // 2, n_k // 2], 1).ravel()    # (2K,)
    lie = draw.permutation(2 * len(n_k))                        # the order in which the shards lie along the labels
    cut = dict(zip(lie, np.split(order, halves[lie].cumsum()[:-1])))
    return {k: np.concatenate([cut[2 * k], cut[2 * k + 1]]) for k in range(len(n_k))}

def dirichlet(labels, n_k, alpha, seed=0):
    """Each client's label shares drawn from Dirichlet(alpha) (Hsu et al. 2019, Section 3): {k: n_k[k] indices}.

    A label that has run out is made up for by the client's others in proportion, and by what is left once those are gone.
    """
    draw = rng(seed, 'partition')
    order = draw.permutation(len(labels))
    pools = [order[labels[order] == label] for label in np.unique(labels)]
    left, users = np.array([len(p) for p in pools]), {}
    for k in draw.permutation(len(n_k)):
        share, take = np.nan_to_num(draw.dirichlet(np.full(len(pools), alpha))), np.zeros_like(left)
        while (need := n_k[k] - take.sum()) > 0:                # each turn fills the client or empties a label
            p = share * (left > take)
            p = p if p.sum() > 0 else (left - take).astype(float)
            take += np.minimum(draw.multinomial(need, p / p.sum()), left - take)
        users[int(k)] = np.concatenate([pool[l - t:l] for pool, l, t in zip(pools, left, take)])
        left = left - take
    return dict(sorted(users.items()))

def partition(labels, K, iid_=True, alpha=None, unequal=False, seed=0):
    """{k: indices} over the examples of `labels` (n,): IID, else two label shards per client, else Dirichlet(alpha)."""
    labels, n_k = np.asarray(labels), sizes(len(labels), K, unequal, seed)
    if iid_: return iid(n_k, seed)
    return dirichlet(labels, n_k, alpha, seed) if alpha else shards(labels, n_k, seed)

def labels_of(dataset):
    """The labels (n,) of any map-style (image, label) data set; read from .targets where it has them."""
    targets = getattr(dataset, 'targets', None)
    return torch.as_tensor([int(dataset[i][1]) for i in range(len(dataset))] if targets is None else targets).numpy()

def mnist_iid(dataset, num_users, seed=0):
    """{user: indices}: an equal share of the shuffled data set for each of num_users; for any data set."""
    return iid(sizes(len(dataset), num_users), seed)

def mnist_noniid(dataset, num_users, seed=0):
    """{user: indices}: two label-sorted shards for each of num_users; for any (image, label) data set."""
    return shards(labels_of(dataset), sizes(len(dataset), num_users), seed)

def cifar_iid(dataset, num_users, seed=0):
    """{user: indices}: as mnist_iid; CIFAR-10 has a name of its own in the layout this project mirrors."""
    return mnist_iid(dataset, num_users, seed)

#############################################
#         Who is asked in round t           #
#############################################

def select(K, C, draw, extra=0.0):
    """S_t: m = max(round(C K), 1) of the K clients without replacement, in ascending order (Algorithm 1); ceil(m (1 + extra)) of them."""
    m = max(round(C * K), 1)
    return np.sort(draw.choice(K, math.ceil(round(m * (1 + extra), 9)), replace=False))

def poisson(K, C, draw):
    """S_t with each of the K clients in it with probability C, maybe nobody: what DP-FedAvg's accountant takes for granted."""
    return np.flatnonzero(draw.random(K) < C)

def lose(S_t, p, draw):
    """{client: stage} of those of S_t that are lost, each with probability p: 0 before it has shared its keys, 1 before it has sent its
    update, 2 after (the first and the last make a difference to secure aggregation alone)."""
    return {k: int(stage) for k, u, stage in zip(S_t, draw.random(len(S_t)), draw.integers(3, size=len(S_t))) if u < p}

def durations(n_k, sigma, seed=0):
    """How long a full round takes each client, (K,), in units of the median one's: n_k over a speed that is log-normal with sigma."""
    seconds = np.asarray(n_k) / rng(seed, 'speeds').lognormal(sigma=sigma, size=len(n_k))
    return seconds / np.median(seconds)

def in_time(S_t, seconds, E, m, deadline, draw):
    """({k: its local epochs} of the clients of S_t that count, and the time that the round takes).

    seconds: what E epochs take each client, in any unit, as is the deadline, at which a client stops (dynamic local work); one that
    has not done an epoch by then is late. Of the others the first m count (redundant computation), of equals those that draw, a NumPy
    generator, puts first. The server waits for m, or until the deadline.
    """
    epochs = {k: E * min(1, deadline / seconds[k]) for k in S_t}
    end = {k: float(min(seconds[k], deadline)) for k in S_t if epochs[k] >= 1}
    first = sorted(draw.permutation(list(end)).tolist(), key=end.get)[:m]
    waited = [] if len(first) == m or deadline == math.inf else [deadline]
    return {k: epochs[k] for k in S_t if k in first}, max([end[k] for k in first] + waited, default=0)

def corrupted(S_t, p, draw):
    """{client: kind} of those of S_t, each with probability p, whose update will be damaged; kinds 0 to 3 in turn, from a random one."""
    hit = [k for k, u in zip(S_t, draw.random(len(S_t))) if u < p]
    return dict(zip(hit, (draw.integers(4) + np.arange(len(hit))) % 4))
