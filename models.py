"""The nets of the paper, and those of the layout that this project mirrors.

TwoNN, PaperCNNMnist, PaperCNNCifar and CharLSTM are the nets of McMahan et al. 2017, Section 3: its
"2NN", its MNIST CNN, for CIFAR-10 the TensorFlow tutorial's, and its net for Shakespeare. MLP,
CNNMnist and CNNCifar have the layers and state_dict keys of the paper's popular PyTorch code. All
but CharLSTM take images (B, channels, height, width) and return logits (B, classes). This file
needs torch alone.

    net = MLP(784, 200, 10)
"""
import copy
import importlib
import math
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

def build(args):
    """The net that args.model names ('2nn', 'paper_cnn', 'mlp', 'cnn', 'lstm', or 'module:Class',
    which is called with args) for args.num_classes and examples of args.shape, or, if it has none,
    images of 28x28 or 32x32 pixels by args.num_channels (1 or 3).

    Raises KeyError for another name or number of channels, ValueError for a net that does not take
    images of this shape, or a class that cannot be loaded.
    """
    if ':' in args.model:
        return imported(args)
    if args.model == 'lstm':
        return CharLSTM(args)
    shape = shape_of(args)
    if args.model in ('2nn', 'mlp'):
        net = {'2nn': TwoNN, 'mlp': MLP}[args.model]
        return net(math.prod(shape), 200, args.num_classes)
    nets = {'cnn': (CNNMnist, CNNCifar), 'paper_cnn': (PaperCNNMnist, PaperCNNCifar)}[args.model]
    if tuple(shape) not in ((1, 28, 28), (3, 32, 32)):
        raise ValueError(f'--model {args.model}: takes images of 1x28x28 or 3x32x32, these are '
                         f'{"x".join(map(str, shape))}; take 2nn, or your own as module:Class')
    return nets[shape[0] == 3](args)

def shape_of(args):
    """args.shape, or that of images of 28x28 or 32x32 pixels by args.num_channels."""
    return getattr(args, 'shape', None) or {1: (1, 28, 28), 3: (3, 32, 32)}[args.num_channels]

def imported(args):
    """A net of the user's own class, which gives logits for two blank examples."""
    (module, _, name), shape = args.model.partition(':'), shape_of(args)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    text = getattr(args, 'dataset', None) == 'shakespeare'
    try:
        net = getattr(importlib.import_module(module), name)(args)
        tried = isinstance(net, nn.Module) and copy.deepcopy(net).eval()
        blank = torch.zeros(2, *shape, dtype=torch.int64 if text else torch.float32)
        if text:
            blank[0, 1:] = blank[1, 3:] = -1        # lines of one character and of three
            blank[1, 0] = args.num_classes - 1
        logits = tried and tried(blank)
    except (Exception, SystemExit) as e:        # whatever a class of the user's raises
        reason = (str(e) or 'no reason given').splitlines()[0]
        raise ValueError(f'--model {args.model}: {type(e).__name__}: {reason}; it has to be a '
                         'class that can be imported from here, takes the flags and gives an '
                         f'nn.Module for examples of shape {tuple(shape)}'
                         + ', -1 after the end of a line' * text) from e
    if not tried or not any(p.requires_grad for p in net.parameters()):
        raise ValueError(f'--model {args.model}: gives a {type(net).__name__}, not an nn.Module '
                         'with parameters to train')
    wanted = (2, args.num_classes, *(shape if text else ()))
    tensor = torch.is_tensor(logits)
    if not tensor or logits.shape != wanted:
        given = tuple(logits.shape) if tensor else f'a {type(logits).__name__}'
        raise ValueError(f'--model {args.model}: gives {given} for two examples, not a tensor of '
                         f'shape {wanted}: a logit for each class')
    return net

class Net(nn.Module):
    """A row of stages, {the layer that it begins with: function of (net, x)}, each of which takes
    what the one before returns."""
    def forward(self, x):
        for stage in self.stages.values():
            x = stage(self, x)
        return x

##################################### The paper's nets #####################################

class TwoNN(Net):
    """The paper's "2NN": two hidden layers of 200 with ReLU; 199,210 parameters on MNIST."""
    def __init__(self, dim_in, dim_hidden, dim_out):
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_hidden)
        self.fc2 = nn.Linear(dim_hidden, dim_hidden)
        self.fc3 = nn.Linear(dim_hidden, dim_out)

    stages = {
        'fc1': lambda net, x: F.relu(net.fc1(x.flatten(1))),            # (B, 784) -> (B, 200)
        'fc2': lambda net, x: F.relu(net.fc2(x)),                       # (B, 200)
        'fc3': lambda net, x: net.fc3(x)}                               # (B, 10)

class PaperCNNMnist(Net):
    """The paper's MNIST CNN; 1,663,370 parameters, the count of SAME padding, which the text does
    not state. Of args: num_channels, num_classes.

    It starts from the uniform weights of Glorot and Bengio (2010, Equation 16), TensorFlow's
    default, and biases of 0; with PyTorch's defaults it needs more rounds.
    """
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * 7 * 7, 512)
        self.fc2 = nn.Linear(512, args.num_classes)
        for p in self.parameters():
            nn.init.xavier_uniform_(p) if p.dim() > 1 else nn.init.zeros_(p)

    stages = {                                  # (B, 1, 28, 28); pooling before ReLU is the same
        'conv1': lambda net, x: F.relu(F.max_pool2d(net.conv1(x), 2)),  # (B, 32, 14, 14)
        'conv2': lambda net, x: F.relu(F.max_pool2d(net.conv2(x), 2)),  # (B, 64, 7, 7)
        'fc1': lambda net, x: F.relu(net.fc1(x.flatten(1))),            # (B, 512)
        'fc2': lambda net, x: net.fc2(x)}                               # (B, 10)

def central(x, side):
    """The central side x side of images (B, channels, h, w)."""
    top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
    return x[..., top:top + side, left:left + side]

def pool(x):
    """TensorFlow's max-pooling 3/2, which pads on the right and at the bottom only."""
    return F.max_pool2d(x, 3, 2, ceil_mode=True)

class PaperCNNCifar(Net):
    """The TensorFlow tutorial's CIFAR-10 net; 1,068,298 parameters. It takes 24x24 images; of
    larger ones it sees the central 24x24. Of args: num_channels, num_classes.

    TensorFlow's local response normalization takes alpha per element (0.001 / 9), torch's for the
    window of 9.
    """
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
        self.norm = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
        self.fc1 = nn.Linear(64 * 6 * 6, 384)
        self.fc2 = nn.Linear(384, 192)
        self.fc3 = nn.Linear(192, args.num_classes)

    stages = {
        'conv1': lambda net, x: net.norm(pool(F.relu(net.conv1(central(x, 24))))),
        'conv2': lambda net, x: pool(net.norm(F.relu(net.conv2(x)))),   # (B, 64, 12, 12) -> 6, 6
        'fc1': lambda net, x: F.relu(net.fc1(x.flatten(1))),            # (B, 384)
        'fc2': lambda net, x: F.relu(net.fc2(x)),                       # (B, 192)
        'fc3': lambda net, x: net.fc3(x)}                               # (B, 10)

class CharLSTM(nn.Module):
    """The paper's Shakespeare net: an embedding of 8, two LSTM layers of 256, and, for each
    character, the logits of the next. Of args: num_classes.

    x (B, T): numbers of characters, -1 after the end of a line. It gives (B, num_classes, T).

    818,595 parameters for 75 classes. The paper's 866,578 fit 258 classes (256 bytes and two more,
    say) with one bias for each gate, where torch has two, and peepholes (3 x 256 a layer), which
    torch lacks.
    """
    def __init__(self, args):
        super().__init__()
        self.embedding = nn.Embedding(args.num_classes, 8)
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.fc = nn.Linear(256, args.num_classes)

    def forward(self, x):
        longest = int((x >= 0).sum(1).max())            # after that there is no line
        embedded = self.embedding(x[:, :longest].clamp(min=0))              # (B, longest, 8)
        logits = self.fc(self.lstm(embedded)[0])                            # (B, longest, V)
        return F.pad(logits.transpose(1, 2), (0, x.shape[1] - longest))     # (B, V, T)

################################ The mirrored layout's nets ################################

class MLP(Net):
    """One hidden layer, dropout before its ReLU; MLP(784, 200, 10) has 159,010 parameters."""
    def __init__(self, dim_in, dim_hidden, dim_out):
        super().__init__()
        self.layer_input = nn.Linear(dim_in, dim_hidden)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        self.layer_hidden = nn.Linear(dim_hidden, dim_out)

    stages = {
        'layer_input': lambda net, x: net.relu(net.dropout(net.layer_input(x.flatten(1)))),
        'layer_hidden': lambda net, x: net.layer_hidden(x)}             # (B, dim_out)

def conv(args, dim_in, dim_out, side):
    """A convolution, or, if args.separable, a depthwise one and then a pointwise one, which have
    fewer weights (Howard et al. 2017, arXiv 1704.04861)."""
    if not getattr(args, 'separable', 0):
        return nn.Conv2d(dim_in, dim_out, side)
    depthwise = nn.Conv2d(dim_in, dim_in, side, groups=dim_in)
    return nn.Sequential(depthwise, nn.Conv2d(dim_in, dim_out, 1))

def dropped(net, x):
    """Dropout of x by half, if net trains."""
    return F.dropout(x, training=net.training)

class CNNMnist(Net):
    """Two 5x5 convolutions without padding and two dropouts; 21,840 parameters, 17,300 if
    args.separable. Of args: num_channels, num_classes."""
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 10, kernel_size=5)
        self.conv2 = conv(args, 10, 20, 5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, args.num_classes)

    stages = {                                                          # (B, 1, 28, 28)
        'conv1': lambda net, x: F.relu(F.max_pool2d(net.conv1(x), 2)),  # (B, 10, 12, 12)
        'conv2': lambda net, x: F.relu(F.max_pool2d(net.conv2_drop(net.conv2(x)), 2)),  # 20, 4, 4
        'fc1': lambda net, x: dropped(net, F.relu(net.fc1(x.flatten(1)))),      # (B, 50)
        'fc2': lambda net, x: net.fc2(x)}                               # (B, 10)

class CNNCifar(Net):
    """LeNet-5's shape on 32x32; 62,006 parameters, 59,858 if args.separable. Of args:
    num_channels, num_classes."""
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = conv(args, 6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, args.num_classes)

    stages = {                                                          # (B, 3, 32, 32)
        'conv1': lambda net, x: net.pool(F.relu(net.conv1(x))),         # (B, 6, 14, 14)
        'conv2': lambda net, x: net.pool(F.relu(net.conv2(x))),         # (B, 16, 5, 5)
        'fc1': lambda net, x: F.relu(net.fc1(x.flatten(1))),            # (B, 120)
        'fc2': lambda net, x: F.relu(net.fc2(x)),                       # (B, 84)
        'fc3': lambda net, x: net.fc3(x)}                               # (B, 10)
