"""The nets of the paper, and those of the layout this project mirrors.

TwoNN, PaperCNNMnist and PaperCNNCifar are the nets of McMahan et al. 2017, Section 3 (its "2NN", its MNIST CNN and, for
CIFAR-10, the TensorFlow tutorial's). MLP, CNNMnist and CNNCifar keep the layers and state_dict keys that the paper's
popular PyTorch code has. All take images (B, channels, height, width) and give logits (B, classes). `split` cuts one in
two, `narrowed` makes one with fewer units. This file needs torch alone.
"""
import copy
import math

import torch.nn.functional as F
from torch import nn

def build(args):
    """The net that args.model names ('2nn', 'paper_cnn', 'mlp', 'cnn') for args.num_channels (1: 28x28, 3: 32x32 images).

    Raises KeyError for another name, or number of channels.
    """
    dim_in, cnn, paper_cnn = {1: (784, CNNMnist, PaperCNNMnist), 3: (3072, CNNCifar, PaperCNNCifar)}[args.num_channels]
    if args.model in ('2nn', 'mlp'): return {'2nn': TwoNN, 'mlp': MLP}[args.model](dim_in, 200, args.num_classes)
    return {'cnn': cnn, 'paper_cnn': paper_cnn}[args.model](args)

class Net(nn.Module):
    """A row of stages, {the layer that it begins with: function of (net, x)}, each of which has what the one before gives."""
    def forward(self, x):
        for stage in self.stages.values(): x = stage(self, x)
        return x

#############################################
#              The paper's nets             #
#############################################

class TwoNN(Net):
    """The paper's "2NN": two hidden layers of 200 with ReLU; 199,210 parameters on MNIST."""
    def __init__(self, dim_in, dim_hidden, dim_out):
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_hidden)
        self.fc2 = nn.Linear(dim_hidden, dim_hidden)
        self.fc3 = nn.Linear(dim_hidden, dim_out)

    stages = {'fc1': lambda net, x: F.relu(net.fc1(x.flatten(1))),                      # (B, 784) -> (B, 200)
              'fc2': lambda net, x: F.relu(net.fc2(x)),                                 # (B, 200)
              'fc3': lambda net, x: net.fc3(x)}                                         # (B, 10)

class PaperCNNMnist(Net):
    """The paper's MNIST CNN, 1,663,370 parameters (the count of SAME padding, which the text leaves open).

    Starts from Glorot and Bengio's uniform weights (2010, equation 16), TensorFlow's default, and biases of 0: from torch's own it takes
    more rounds. Of args: num_channels, num_classes.
    """
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * 7 * 7, 512)
        self.fc2 = nn.Linear(512, args.num_classes)
        for p in self.parameters(): nn.init.xavier_uniform_(p) if p.dim() > 1 else nn.init.zeros_(p)

    stages = {'conv1': lambda net, x: F.relu(F.max_pool2d(net.conv1(x), 2)),    # (B, 1, 28, 28) -> (B, 32, 14, 14); as ReLU first
              'conv2': lambda net, x: F.relu(F.max_pool2d(net.conv2(x), 2)),            # (B, 64, 7, 7)
              'fc1': lambda net, x: F.relu(net.fc1(x.flatten(1))),                      # (B, 512)
              'fc2': lambda net, x: net.fc2(x)}                                         # (B, 10)

def central(x, side):
    """The central side x side of images (B, channels, h, w)."""
    top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
    return x[..., top:top + side, left:left + side]

class PaperCNNCifar(Net):
    """The TensorFlow tutorial's CIFAR-10 net, 1,068,298 parameters, on 24x24 images; of larger ones it sees the central 24x24.

    TensorFlow pads SAME on the right and at the bottom only: ceil_mode. Its local response normalization takes alpha per
    element (0.001 / 9), torch's takes it for the window of 9. Of args: num_channels, num_classes.
    """
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
        self.norm = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
        self.fc1 = nn.Linear(64 * 6 * 6, 384)
        self.fc2 = nn.Linear(384, 192)
        self.fc3 = nn.Linear(192, args.num_classes)

    stages = {'conv1': lambda net, x: net.norm(F.max_pool2d(F.relu(net.conv1(central(x, 24))), 3, 2, ceil_mode=True)),  # (B, 64, 12, 12)
              'conv2': lambda net, x: F.max_pool2d(net.norm(F.relu(net.conv2(x))), 3, 2, ceil_mode=True),               # (B, 64, 6, 6)
              'fc1': lambda net, x: F.relu(net.fc1(x.flatten(1))),                      # (B, 384)
              'fc2': lambda net, x: F.relu(net.fc2(x)),                                 # (B, 192)
              'fc3': lambda net, x: net.fc3(x)}                                         # (B, 10)

#############################################
#          The mirrored layout's nets       #
#############################################

class MLP(Net):
    """One hidden layer, dropout before its ReLU; MLP(784, 200, 10) has 159,010 parameters."""
    def __init__(self, dim_in, dim_hidden, dim_out):
        super().__init__()
        self.layer_input = nn.Linear(dim_in, dim_hidden)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        self.layer_hidden = nn.Linear(dim_hidden, dim_out)

    stages = {'layer_input': lambda net, x: net.relu(net.dropout(net.layer_input(x.flatten(1)))),   # (B, dim_hidden)
              'layer_hidden': lambda net, x: net.layer_hidden(x)}                                   # (B, dim_out)

def conv(args, dim_in, dim_out, side):
    """A convolution, or, if args.separable, a depthwise one and then a pointwise one, which have fewer weights (Howard et al. 2017)."""
    if not getattr(args, 'separable', 0): return nn.Conv2d(dim_in, dim_out, side)
    return nn.Sequential(nn.Conv2d(dim_in, dim_in, side, groups=dim_in), nn.Conv2d(dim_in, dim_out, 1))

class CNNMnist(Net):
    """Two 5x5 convolutions without padding and two dropouts; 21,840 parameters, 17,300 if args.separable. Of args: num_channels,
    num_classes."""
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 10, kernel_size=5)
        self.conv2 = conv(args, 10, 20, 5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, args.num_classes)

    stages = {'conv1': lambda net, x: F.relu(F.max_pool2d(net.conv1(x), 2)),                        # (B, 1, 28, 28) -> (B, 10, 12, 12)
              'conv2': lambda net, x: F.relu(F.max_pool2d(net.conv2_drop(net.conv2(x)), 2)),        # (B, 20, 4, 4)
              'fc1': lambda net, x: F.dropout(F.relu(net.fc1(x.flatten(1))), training=net.training),    # (B, 50)
              'fc2': lambda net, x: net.fc2(x)}                                                     # (B, 10)

class CNNCifar(Net):
    """LeNet-5's shape on 32x32; 62,006 parameters, 59,858 if args.separable. Of args: num_channels, num_classes."""
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = conv(args, 6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, args.num_classes)

    stages = {'conv1': lambda net, x: net.pool(F.relu(net.conv1(x))),                   # (B, 3, 32, 32) -> (B, 6, 14, 14)
              'conv2': lambda net, x: net.pool(F.relu(net.conv2(x))),                   # (B, 16, 5, 5)
              'fc1': lambda net, x: F.relu(net.fc1(x.flatten(1))),                      # (B, 120)
              'fc2': lambda net, x: F.relu(net.fc2(x)),                                 # (B, 84)
              'fc3': lambda net, x: net.fc3(x)}                                         # (B, 10)

#############################################
#          Cut in two, and narrower         #
#############################################

class Part(Net):
    """The stages of net that are named, with the net's own layers."""
    def __init__(self, net, names):
        super().__init__()
        self.stages = {name: net.stages[name] for name in names}
        for name, layer in net.named_children():
            if name in names or not list(layer.parameters()): self.add_module(name, layer)
        self.training = net.training

def split(net, L):
    """(front, back): the first L stages of net and the others, two modules that share its parameters and their names.

    The back takes what the front gives (Vepakomma et al. 2018). Raises ValueError unless both have a stage.
    """
    names = list(net.stages)
    if not 0 < L < len(names): raise ValueError(f'{type(net).__name__} can be cut after layer 1 to {len(names) - 1}')
    return Part(net, names[:L]), Part(net, names[L:])

def narrowed(net, r):
    """A copy of net with the leading r-fraction of every hidden layer's units or channels, ceil(r n) of n, and their weights.

    What the images have, and the classes, stay (HeteroFL: Diao et al. 2021, Section 3.2, without its scaler). net's layers are
    linear or convolutions, with a bias, in the order in which they come.
    """
    net = copy.deepcopy(net)
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    kept = whole = 1            # of the outputs of the layer before
    for layer in layers:
        n_out, n_in = layer.weight.shape[:2]
        n_in = n_in // whole * kept or n_in             # a linear one has several inputs for a channel; a depthwise one has 1
        kept, whole = n_out if layer is layers[-1] else math.ceil(round(r * n_out, 9)), n_out
        layer.weight = nn.Parameter(layer.weight.detach()[:kept, :n_in].clone())
        layer.bias = nn.Parameter(layer.bias.detach()[:kept].clone())
        if isinstance(layer, nn.Linear): layer.in_features, layer.out_features = n_in, kept
        else: layer.in_channels, layer.out_channels, layer.groups = (kept, kept, kept) if layer.groups > 1 else (n_in, kept, 1)
    return net
