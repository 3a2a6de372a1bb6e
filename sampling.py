"""The data, who holds which examples, and who is sampled in round t (McMahan et al. 2017, Sections
2 and 3).

A partition is a dict {client k: array of indices into the training set}, disjoint and covering
every example. How many examples a client holds (`sizes`) and which ones (`iid`, `shards`,
`dirichlet`) are chosen apart, so that any two go together. All randomness comes from `rng`. This
file needs numpy and torch, and torchvision where it reads data.

    from sampling import mnist_noniid
    from torchvision.datasets import MNIST
    users = mnist_noniid(MNIST('data'), 100)
"""
import contextlib
import functools
import gzip
import hashlib
import http.client
import importlib
import math
import os
import pathlib
import re
import shutil
import sys
import urllib.request
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

####################################### Randomness #######################################

def rng(seed, *keys):
    """The NumPy generator of (seed, *keys), keys being names and whole numbers: the same for the
    same keys, whatever ran before."""
    text = ' '.join(map(str, (seed, *keys)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), 'big'))

def seed_torch(seed, *keys):
    """Seeds torch's own generators (initialization, shuffles, dropout) from rng's keys."""
    torch.manual_seed(int(rng(seed, *keys).integers(2**63)))

######################################## The data ########################################

KINDS = {'mnist': 'MNIST', 'fmnist': 'FashionMNIST', 'cifar': 'CIFAR10'}     # torchvision's names
MEAN_STD = {'mnist': ((0.1307,), (0.3081,)), 'fmnist': ((0.2860,), (0.3530,)),
            'cifar': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))}

def holdings(args, K):
    """(training set, test set, {k: indices into the training set}, n_k (K,)) of K clients, as
    args.dataset, data_dir, iid, alpha, unequal and seed say; with iid = 0 the clients of
    shakespeare are its roles, however many. Raises what load and sizes raise."""
    if args.dataset == 'shakespeare':
        train, test, n_k = shakespeare(args.data_dir)
        if not args.iid:
            return train, test, in_order(n_k), n_k
        n_k = sizes(len(train), K)
        return train, test, iid(n_k, args.seed), n_k
    train, test = load(args.dataset, args.data_dir, args.seed)
    labels = train.tensors[1]
    n_k = sizes(len(labels), K, args.unequal, args.seed)
    return train, test, partition(labels, n_k, args.iid, args.alpha, args.seed), n_k

def shape(args):
    """(shape of an example, its channels, number of classes) of args.dataset; a user's own is
    loaded to find out. Raises ValueError if args.num_channels differs, or args.num_classes, which
    for a user's own data may be more than they have."""
    images, classes = (3, 32, 32) if args.dataset == 'cifar' else (1, 28, 28), 10
    if args.dataset == 'shakespeare':
        return (LINE,), None, len(VOCABULARY) + 1
    if ':' in args.dataset:
        train, test = user_sets(args.dataset, args.data_dir)
        images = tuple(train.tensors[0].shape[1:])
        classes = int(max(data.tensors[1].max() for data in (train, test))) + 1
        classes = max(classes, args.num_classes or 0)
    for flag, given, has in (('num_channels', args.num_channels, images[0]),
                             ('num_classes', args.num_classes, classes)):
        if given not in (None, has):
            raise ValueError(f'--{flag} {given}: {args.dataset} has {has}; leave the flag out')
    return images, images[0], classes

def load(name, data_dir, seed=0, download=True):
    """Training and test set as two TensorDatasets: images (n, channels, h, w) float32, labels (n,)
    int64; of 'shakespeare' what shakespeare() says.

    name: 'mnist', 'fmnist' or 'cifar', read through torchvision from data_dir (missing files are
    downloaded, if asked for) and standardised; 'synthetic', drawn from seed; or 'module:function',
    which is called with data_dir and returns two map-style (image, label) data sets.
    Raises OSError with one line that names the folder, the file or the function at fault.
    """
    if name == 'shakespeare':
        return shakespeare(data_dir, download)[:2]
    if name == 'synthetic':
        return synthetic(60000, seed, 'train'), synthetic(10000, seed, 'test')
    if ':' in name:
        return user_sets(name, data_dir)
    if name not in KINDS:
        raise OSError(f'{name}: there is no such data set; take mnist, fmnist, cifar, synthetic or '
                      'shakespeare, or your own as module:function')
    paths = files(name, data_dir)
    for path in paths:
        if os.path.exists(path) and not sound(path):
            raise OSError(f'{path} is truncated or corrupt; delete it and fetch it again')
    for path in paths:
        if not os.path.exists(path) and os.path.exists(f'{path}.gz'):
            unpack(f'{path}.gz')
    missing = [os.path.relpath(path, data_dir) for path in paths if not os.path.exists(path)]
    folder = os.path.abspath(data_dir)
    absent = [parent for parent in pathlib.Path(paths[0]).absolute().parents
              if not parent.exists()]
    if missing and not download:
        raise OSError(f'{folder} lacks {", ".join(missing)}')
    try:
        sets = [torchvision_set(name)(data_dir, train=train, download=True)
                for train in (True, False)]
    except Exception as e:      # torchvision raises anything from URLError to RuntimeError here
        for parent in absent:   # it has made them
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise unavailable(folder, missing, e, name) from e
    return tuple(standardised(name, data_dir, data) for data in sets)

def unavailable(folder, missing, error, name):
    """The OSError for files of the data set `name` that the folder lacks, and whose download has
    failed."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return OSError(f'--data_dir {folder}: lacks {", ".join(missing) or "readable files"}, and the '
                   f'download failed ({reason}); name the folder that holds {name}, or take '
                   '--dataset synthetic' + ' --model 2nn' * (name == 'shakespeare'))

def torchvision_set(name):
    """torchvision's class for the data set `name`. It is imported here, as it takes a second."""
    from torchvision import datasets
    return getattr(datasets, KINDS[name])

def unpack(path):
    """Unpacks a .gz file beside itself. Raises OSError if it is damaged."""
    try:
        with gzip.open(path) as packed, open(path.removesuffix('.gz'), 'wb') as f:
            shutil.copyfileobj(packed, f)
    except (EOFError, zlib.error, OSError) as e:
        with contextlib.suppress(OSError):
            os.remove(path.removesuffix('.gz'))
        raise OSError(f'{path} is truncated or corrupt ({e}); delete it and fetch it again') from e

def files(name, data_dir):
    """The paths of the files that torchvision keeps under data_dir for the data set `name`."""
    kind = torchvision_set(name)
    if name == 'cifar':
        names = (*dict(kind.train_list + kind.test_list), kind.meta['filename'])
        return [os.path.join(data_dir, kind.base_folder, file) for file in names]
    folder = os.path.join(data_dir, kind.__name__, 'raw')
    return [os.path.join(folder, file.removesuffix('.gz')) for file, _ in kind.resources]

def sound(path):
    """Whether a data file is whole: an IDX file by its header's dimensions, a CIFAR-10 batch by the
    MD5 sum that torchvision knows."""
    name = os.path.basename(path)
    if not name.endswith('-ubyte'):
        from torchvision.datasets.utils import check_integrity
        kind = torchvision_set('cifar')
        sums = {kind.meta['filename']: kind.meta['md5'], **dict(kind.train_list + kind.test_list)}
        return check_integrity(path, sums[name])
    if not os.path.isfile(path):
        return False
    with open(path, 'rb') as f:
        head = f.read(16)
    dims = 3 if 'images' in name else 1         # magic number: 0, 0, 8 for uint8, dimensions
    sides = [int.from_bytes(head[4 + 4 * i:8 + 4 * i], 'big') for i in range(dims)]
    length = 4 + 4 * dims + math.prod(sides)
    return head[:4] == bytes((0, 0, 8, dims)) and os.path.getsize(path) == length

def standardised(name, data_dir, dataset):
    """A torchvision data set's uint8 images and labels as a TensorDataset. Raises OSError if they
    do not belong together."""
    x, y = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    x = x.permute(0, 3, 1, 2) if x.dim() == 4 else x.unsqueeze(1)       # (n, channels, h, w)
    side = 32 if name == 'cifar' else 28
    matching = len(x) == len(y) > 0 and x.shape[-2:] == (side, side)
    if not matching or not 0 <= y.min() <= y.max() < 10:
        raise OSError(f'{os.path.abspath(data_dir)}: {name} there has {len(x)} images of '
                      f'{tuple(x.shape[1:])} and {len(y)} labels that do not belong together; '
                      'fetch it again')
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in MEAN_STD[name])
    return TensorDataset(x.float().div_(255).sub_(mean).div_(std).contiguous(), y.long())

@functools.lru_cache(2)
def user_sets(name, data_dir):
    """The user's own training and test set, from 'module:function', as two TensorDatasets."""
    module, _, function = name.partition(':')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        sets = getattr(importlib.import_module(module), function)(data_dir)
        train, test = (as_tensors(data) for data in sets)
    except (Exception, SystemExit) as e:        # whatever a function of the user's raises
        reason = (str(e) or 'no reason given').splitlines()[0]
        raise OSError(f'--dataset {name}: {type(e).__name__}: {reason}; it has to be a function '
                      'that can be imported from here, takes --data_dir and returns (training '
                      'set, test set), each of labels and images of one shape') from e
    if train.tensors[0].shape[1:] != test.tensors[0].shape[1:]:
        raise OSError(f'--dataset {name}: the images of the training set have another shape than '
                      'those of the test set')
    return train, test

def as_tensors(dataset):
    """Any map-style (image, label) data set as a TensorDataset. Raises ValueError if it is empty,
    an image is no tensor of finite numbers, or a label is not a whole number from 0 on."""
    if not len(dataset):
        raise ValueError('a data set is empty')
    x, y = zip(*(dataset[i] for i in range(len(dataset))))
    x, y = torch.stack([torch.as_tensor(v) for v in x]), torch.as_tensor(np.asarray(y))
    if x.dim() < 2 or not x.isfinite().all():
        raise ValueError('images are tensors of finite numbers, with one dimension or more')
    if y.dim() != 1 or (y < 0).any() or (y != y.long()).any():
        raise ValueError('labels are whole numbers from 0 on')
    return TensorDataset(x.float(), y.long())

################################### Shakespeare's plays ###################################

PLAYS_AT = ('https://raw.githubusercontent.com/martin-gorner/tensorflow-rnn-shakespeare/'
            '25946cd6486e8a8f96d84edb200a8b8b6e961c27/shakespeare/')
# {play: the first 16 hexadecimal digits of its file's SHA-256}
PLAYS = {'1kinghenryiv': '7590d173c0be7dba', '1kinghenryvi': '715e55cc52c1150b',
         '2kinghenryiv': '4a9f52f2db3ed3f0', '2kinghenryvi': 'b282843daec114f4',
         '3kinghenryvi': '6156dfad1cd8844c', 'allswellthatendswell': '3bad3562a52b3439',
         'antonyandcleopatra': '4cecd44a3320f7d6', 'asyoulikeit': 'eaa3526fe53859f3',
         'comedyoferrors': 'd53fcfe394885515', 'coriolanus': '13d7e0259fcd46cd',
         'cymbeline': 'b5bb1a49d38e1b62', 'hamlet': '1846810b98f3dce4',
         'juliuscaesar': 'd4b1254e22888a27', 'kinghenryv': '62cbcdfd774cdbc3',
         'kinghenryviii': '63fc4a4ec60c4c72', 'kingjohn': '251870ca2777912e',
         'kinglear': '674a2725884307c9', 'kingrichardii': '7af43884757911af',
         'kingrichardiii': '0b5ef70294ed26ff', 'loveslabourslost': 'b7521b8ae6d6cff3',
         'macbeth': '339afa674ac54e50', 'measureforemeasure': '1449c06143bdf48e',
         'merchantofvenice': '54b95ab530e81bfc', 'merrywivesofwindsor': '85dfbea19962e8d2',
         'midsummersnightsdream': '684b22072f158a79', 'muchadoaboutnothing': 'fad832e284ccabb6',
         'othello': 'e1590d00e121e535', 'periclesprinceoftyre': 'f03561e0fb339fd3',
         'romeoandjuliet': '1cd830b4a8154da6', 'tamingoftheshrew': '87f9d1f22bb05027',
         'tempest': '1f20301e552d43aa', 'timonofathens': 'a01c9ebbf5d31936',
         'titusandronicus': '5135117e84fa127c', 'troilusandcressida': 'fdf3a04f0a92ec3c',
         'twelfthnight': '68a44a35e82462d4', 'twogentlemenofverona': '53f40375e3889116',
         'winterstale': '9a1c8f6f73264b2b'}
# Characters by their numbers, from 1; 0 is any other.
VOCABULARY = "\n !$&',-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LINE = 64           # characters of the longest line

def shakespeare(data_dir, download=True):
    """(training set, test set, n_k (K,)) of the plays in data_dir/shakespeare: a client for each
    role of each play that has two lines or more, whose last 20 % of lines, rounded up, are for
    testing (Section 3). The training lines of client 0 come first, then those of client 1; the
    test lines are sorted by length.

    An example is a line: x its characters, (n, 64) int64, -1 after its end; y the next ones, the
    end of the line last, -100 after that. Raises OSError for missing, damaged or other files.
    """
    train, test, n_k = [], [], []
    for text in plays(data_dir, download):
        roles = {}
        for role, line in speeches(text):
            roles.setdefault(role, []).append(line)
        for lines in roles.values():
            n = len(lines) - math.ceil(len(lines) / 5)
            if n:
                train += lines[:n]
                test += lines[n:]
                n_k.append(n)
    return numbered(train), numbered(sorted(test, key=len)), np.array(n_k)

def plays(data_dir, download=True):
    """The plays' texts; missing files are downloaded, if asked for."""
    folder, texts = os.path.abspath(data_dir), []
    paths = {name: os.path.join(folder, 'shakespeare', f'{name}.txt') for name in PLAYS}
    missing = [name for name, path in paths.items() if not os.path.exists(path)]
    if missing and not download:
        raise OSError(f'{folder} lacks {play_files(missing)}')
    for name, path in paths.items():
        if name in missing:
            fetch(name, path, missing[missing.index(name):])
        text = pathlib.Path(path).read_bytes()
        if hashlib.sha256(text).hexdigest()[:16] != PLAYS[name]:
            raise OSError(f'{path} is truncated, corrupt or another file; delete it and fetch it '
                          'again')
        texts.append(text.decode('ascii'))
    return texts

def play_files(names):
    """The files of these plays, in a few words."""
    more = f' and {len(names) - 1} more play{"s" * (len(names) > 2)}' * (len(names) > 1)
    return f'shakespeare/{names[0]}.txt{more}'

def fetch(name, path, missing):
    """Downloads a play, the first of those that are missing. Raises OSError."""
    folder = os.path.dirname(path)
    try:
        with urllib.request.urlopen(f'{PLAYS_AT}{name}.txt', timeout=60) as answer:
            text = answer.read()
    except (OSError, http.client.HTTPException) as e:
        raise unavailable(os.path.dirname(folder), [play_files(missing)], e, 'shakespeare') from e
    if hashlib.sha256(text).hexdigest()[:16] != PLAYS[name]:
        raise OSError(f'{PLAYS_AT}{name}.txt has changed; put the file of the commit in its '
                      f'address at {path}')
    os.makedirs(folder, exist_ok=True)
    pathlib.Path(f'{path}.tmp').write_bytes(text)
    os.replace(f'{path}.tmp', path)

def speeches(text):
    """Yields (role, line) for each line of a play. "SPEAKER<tab>line" begins a speech and
    "<tab>line" goes on with it; what stands before the first act, headings and stage directions,
    in brackets, are not spoken. A name may fill two rows, the first without a tab."""
    start = re.search(r'^(ACT|\t(PROLOGUE|INDUCTION))\b', text, re.MULTILINE).start()
    text = re.sub(r'\[([^]\n]|\n(?!\n))*\]?|[]|]', ' ', text[start:])     # some lack their ]
    role, half = None, ''
    for row in text.split('\n'):
        name, _, line = (' '.join(part.split()) for part in row.partition('\t'))
        if re.match('(ACT|SCENE) ', name):
            role, name = None, ''
        elif re.fullmatch(r'(PROLOGUE|INDUCTION|EPILOGUE)\.?', line):
            role = line
        elif '\t' in row:
            role = f'{half} {name}'.strip(" :'") if name else role
            title = not name and re.fullmatch("[A-Z0-9 ',]{3,}", line)     # it is on each page
            if role and line and not title:
                yield role, line
        half = '' if '\t' in row else name

def numbered(lines):
    """Lines as a TensorDataset of their characters and of the next ones."""
    number = np.zeros(256, np.int64)
    number[[ord(c) for c in VOCABULARY]] = range(1, len(VOCABULARY) + 1)
    number[0] = -1                              # padding
    text = ''.join(f'{line}\n'.ljust(LINE + 1, '\0') for line in lines)
    numbers = number[np.frombuffer(text.encode('ascii'), np.uint8)].reshape(-1, LINE + 1)
    x, y = torch.from_numpy(numbers).split(LINE, 1)[0], torch.from_numpy(numbers[:, 1:])
    return TensorDataset(x.masked_fill(y < 0, -1), y.masked_fill(y < 0, -100))

#################################### Synthetic digits ####################################

# Pen strokes through points "xy" on a grid 5 wide and 7 high, y downwards.
GLYPHS = ('10 30 41 45 36 16 05 01 10', '02 20 26', '01 10 30 41 42 06 46',
          '01 10 30 41 42 33 13, 33 44 45 36 16 05', '30 04 44, 30 36',
          '40 00 02 32 43 45 36 16 05', '30 12 04 05 16 36 45 44 33 13 04', '00 40 16',
          '10 30 41 42 33 13 02 01 10, 13 33 44 45 36 16 05 04 13',
          '42 33 13 02 01 10 30 41 42 34 16')
REACH = 1.5         # of the distance fields, in digits' heights

def segments(glyph):
    """A digit's pen strokes, (segments, 2 ends, 2); it is 1 high, with its middle at (0, 0)."""
    strokes = [stroke.split() for stroke in glyph.split(', ')]
    pairs = [pair for points in strokes for pair in zip(points, points[1:])]
    return torch.tensor([[[int(p[0]) - 2, int(p[1]) - 3] for p in pair] for pair in pairs]) / 6

def distance_fields(side=48):
    """How far each point of [-REACH, REACH]^2 is from each digit's pen strokes, (10, 1, side,
    side)."""
    axis = torch.linspace(-REACH, REACH, side)
    at = torch.stack(torch.meshgrid(axis, axis, indexing='xy'), -1)[:, :, None]  # side, side, 1, 2
    fields = []
    for glyph in GLYPHS:
        ends = segments(glyph)
        a, along = ends[:, 0], ends[:, 1] - ends[:, 0]
        nearest = (((at - a) * along).sum(-1) / (along * along).sum(-1)).clamp(0, 1)
        fields.append((at - a - nearest[..., None] * along).norm(dim=-1).amin(-1))
    return torch.stack(fields)[:, None]

def affine(turn, shear, stretch, shift):
    """Where a picture's points come from, (n, 2, 3) for affine_grid: turn (radians) and shear
    (n,), stretch and shift (n, 2)."""
    c, s = turn.cos(), turn.sin()
    theta = torch.stack([stretch[:, :1] * torch.stack([c, shear * c - s, 0 * c], 1),
                         stretch[:, 1:] * torch.stack([s, shear * s + c, 0 * c], 1)], 1)
    theta[:, :, 2] = shift
    return theta

def synthetic(n, seed, name):
    """n digits drawn with a pen of random width, turned, sheared, stretched, shifted, bent and
    covered with noise, as a TensorDataset of (n, 1, 28, 28) and (n,)."""
    draw = torch.Generator().manual_seed(int(rng(seed, 'synthetic', name).integers(2**63)))
    fields = distance_fields()
    y = torch.randint(10, (n,), generator=draw)
    x = torch.cat([drawn(fields[y[at]], draw) for at in torch.arange(n).split(4000)])
    return TensorDataset(x.sub_(0.15).div_(0.35), y)

def drawn(fields, draw):
    """Images (b, 1, 28, 28) of digits with these distance fields, (b, 1, side, side)."""
    b = len(fields)
    def normal(*shape):
        return torch.randn(*shape, generator=draw)
    turn, shear, stretch = 0.2 * normal(b), 0.2 * normal(b), torch.exp(0.12 * normal(b, 2)) / 0.75
    bend, phase = 0.04 * normal(b, 2, 1, 1), 3 * normal(b, 2, 1, 1)
    theta = affine(turn, shear, stretch / 2, 0.08 * normal(b, 2))
    grid = F.affine_grid(theta, (b, 1, 28, 28), align_corners=True)             # (b, 28, 28, 2)
    wave = bend * torch.sin(5 * grid.permute(0, 3, 1, 2).flip(1) + phase)
    grid = (grid + wave.permute(0, 2, 3, 1)) / REACH
    d = F.grid_sample(fields, grid, align_corners=True, padding_mode='border')  # (b, 1, 28, 28)
    pen, ink = 0.06 + 0.02 * normal(b, 1, 1, 1), 0.85 + 0.15 * normal(b, 1, 1, 1)
    lines = ink * ((pen.clamp(min=0.02) - d) / 0.06 + 0.5).clamp_(0, 1)
    return lines + 0.1 * normal(b, 1, 28, 28)

################################## Who holds which examples ##################################

def sizes(n, K, unequal=False, seed=0):
    """n_k, (K,) int64 that add up to n, none 0: as equal as can be, or in proportion to log-normal
    factors (sigma 1). Raises ValueError if K is not in [1, n]."""
    if not 1 <= K <= n:
        raise ValueError(f'num_users {K}: {n} training examples can be dealt to 1 to {n} clients')
    factor = rng(seed, 'sizes').lognormal(size=K) if unequal else np.ones(K)
    share = (n - K) * factor / factor.sum()             # beyond the one example that each has
    n_k = 1 + np.floor(share).astype(np.int64)
    short = n - n_k.sum()
    n_k[np.argsort(np.floor(share) - share, kind='stable')[:short]] += 1
    return n_k

def iid(n_k, seed=0):
    """Shuffled, then dealt out: {k: n_k[k] indices} (Section 3, "IID")."""
    order = rng(seed, 'partition').permutation(n_k.sum())
    return dict(enumerate(np.split(order, n_k.cumsum()[:-1])))

def in_order(n_k):
    """The examples in their own order: {k: n_k[k] indices}."""
    return dict(enumerate(np.split(np.arange(n_k.sum()), n_k.cumsum()[:-1])))

def shards(labels, n_k, seed=0):
    """Sorted by label, cut into 2K shards, two for each client (Section 3, "Non-IID"): {k: n_k[k]
    indices}.

    A client's two shards are the halves of its n_k, so that every example is in one of them for
    any K, and sizes may be unequal.
    """
    if np.ndim(labels) != 1:
        raise ValueError('shards are sorted by label: each example has to have one label')
    draw = rng(seed, 'partition')
    order = draw.permutation(len(labels))
    order = order[np.argsort(labels[order], kind='stable')]     # by label, in random order within
    halves = np.stack([(n_k + 1) // 2, n_k // 2], 1).ravel()    # (2K,)
    lie = draw.permutation(2 * len(n_k))            # the order in which shards lie along the labels
    cut = dict(zip(lie, np.split(order, halves[lie].cumsum()[:-1])))
    return {k: np.concatenate([cut[2 * k], cut[2 * k + 1]]) for k in range(len(n_k))}

def dirichlet(labels, n_k, alpha, seed=0):
    """Each client's label shares drawn from Dirichlet(alpha) (Hsu et al. 2019, arXiv 1909.06335,
    Section 3): {k: n_k[k] indices}.

    When a label is exhausted, the client draws from its other labels in proportion; when those are
    too, from whatever remains.
    """
    draw = rng(seed, 'partition')
    order = draw.permutation(len(labels))
    pools = [order[labels[order] == label] for label in np.unique(labels)]
    remaining, users = np.array([len(pool) for pool in pools]), {}
    for k in draw.permutation(len(n_k)):
        share = np.nan_to_num(draw.dirichlet(np.full(len(pools), alpha)))
        take = filled(n_k[k], share, remaining, draw)
        users[int(k)] = np.concatenate([pool[end - t:end]
                                        for pool, end, t in zip(pools, remaining, take)])
        remaining = remaining - take
    return dict(sorted(users.items()))

def filled(n, share, remaining, draw):
    """How many of each label's remaining examples a client with n examples and these label shares
    takes."""
    take = np.zeros_like(remaining)
    while (need := n - take.sum()) > 0:             # each turn fills the client or empties a label
        p = share * (remaining > take)
        p = p if p.sum() > 0 else (remaining - take).astype(float)
        take += np.minimum(draw.multinomial(need, p / p.sum()), remaining - take)
    return take

def partition(labels, n_k, iid_=True, alpha=None, seed=0):
    """{k: n_k[k] indices} over the examples of `labels` (n,), n_k as of `sizes`: IID, else two
    label shards per client, else Dirichlet(alpha)."""
    labels = np.asarray(labels)
    if iid_:
        return iid(n_k, seed)
    return dirichlet(labels, n_k, alpha, seed) if alpha else shards(labels, n_k, seed)

def labels_of(dataset):
    """The labels (n,) of any map-style (image, label) data set, from its .targets if it has any.
    Raises ValueError for an example with several labels."""
    targets = getattr(dataset, 'targets', None)
    if targets is None:
        labels = [torch.as_tensor(dataset[i][1]).flatten() for i in range(len(dataset))]
        if any(len(v) != 1 for v in labels):
            raise ValueError('each example has to have one label')
        targets = torch.cat(labels)
    return torch.as_tensor(targets).cpu().numpy()

def mnist_iid(dataset, num_users, seed=0):
    """{user: indices}: an equal share of the shuffled data set for each of num_users; for any data
    set."""
    return iid(sizes(len(dataset), num_users), seed)

def mnist_noniid(dataset, num_users, seed=0):
    """{user: indices}: two label-sorted shards for each of num_users; for any (image, label) data
    set."""
    return shards(labels_of(dataset), sizes(len(dataset), num_users), seed)

def cifar_iid(dataset, num_users, seed=0):
    """{user: indices}: as mnist_iid; CIFAR-10 has a name of its own in the mirrored layout."""
    return mnist_iid(dataset, num_users, seed)

################################# Who is sampled in round t #################################

def select(K, C, draw, extra=0.0):
    """S_t: m = max(round(C K), 1) of the K clients without replacement, in ascending order
    (Algorithm 1); with extra, ceil(m (1 + extra)) of them. draw: a NumPy generator."""
    m = max(round(C * K), 1)
    return np.sort(draw.choice(K, math.ceil(round(m * (1 + extra), 9)), replace=False))
