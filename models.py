"""The nets of the paper, and those of the layout this project mirrors.

TwoNN, PaperCNNMnist and PaperCNNCifar are the nets of McMahan et al. 2017, Section 3 (its "2NN", its MNIST CNN and, for
CIFAR-10, the TensorFlow tutorial's). MLP, CNNMnist and CNNCifar keep the layers and state_dict keys that the paper's
popular PyTorch code has. All take images (B, channels, height, width) and give logits (B, classes). This file needs
torch alone.
"""
import torch.nn.functional as F
from torch import nn

def build(args):
    """The net that args.model names ('2nn', 'paper_cnn', 'mlp', 'cnn') for args.num_channels (1: 28x28, 3: 32x32 images)."""
    dim_in, color = {1: (784, False), 3: (3072, True)}[args.num_channels]
    if args.model == '2nn': return TwoNN(dim_in, 200, args.num_classes)
    if args.model == 'mlp': return MLP(dim_in, 200, args.num_classes)
    if args.model == 'cnn': return (CNNCifar if color else CNNMnist)(args)
    return (PaperCNNCifar if color else PaperCNNMnist)(args)

#############################################
#              The paper's nets             #
#############################################

class TwoNN(nn.Module):
    """The paper's "2NN": two hidden layers of 200 with ReLU; 199,210 parameters on MNIST."""
    def __init__(self, dim_in, dim_hidden, dim_out):
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_hidden)
        self.fc2 = nn.Linear(dim_hidden, dim_hidden)
        self.fc3 = nn.Linear(dim_hidden, dim_out)

    def forward(self, x):
        x = F.relu(self.fc1(x.flatten(1)))                      # (B, 784) -> (B, 200)
        x = F.relu(self.fc2(x))                                 # (B, 200)
        return self.fc3(x)                                      # (B, 10)

class PaperCNNMnist(nn.Module):
    """The paper's MNIST CNN, 1,663,370 parameters (the count of SAME padding, which the text leaves open)."""
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * 7 * 7, 512)
        self.fc2 = nn.Linear(512, args.num_classes)

    def forward(self, x):                                       # (B, 1, 28, 28)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))              # (B, 32, 14, 14); the same as ReLU first, with less work
        x = F.relu(F.max_pool2d(self.conv2(x), 2))              # (B, 64, 7, 7)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))         # (B, 10)

class PaperCNNCifar(nn.Module):
    """The TensorFlow tutorial's CIFAR-10 net, 1,068,298 parameters, on 24x24 images; of larger ones it sees the central 24x24.

    TensorFlow pads SAME on the right and at the bottom only: ceil_mode. Its local response normalization takes alpha per
    element (0.001 / 9), torch's takes it for the window of 9.
    """
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
        self.norm = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
        self.fc1 = nn.Linear(64 * 6 * 6, 384)
        self.fc2 = nn.Linear(384, 192)
        self.fc3 = nn.Linear(192, args.num_classes)

    def forward(self, x):
        top, left = (x.shape[-2] - 24) // 2, (x.shape[-1] - 24) // 2
        x = x[..., top:top + 24, left:left + 24]                                    # (B, 3, 24, 24)
        x = self.norm(F.max_pool2d(F.relu(self.conv1(x)), 3, 2, ceil_mode=True))    # (B, 64, 12, 12)
        x = F.max_pool2d(self.norm(F.relu(self.conv2(x))), 3, 2, ceil_mode=True)    # (B, 64, 6, 6)
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))                        # (B, 192)
        return self.fc3(x)                                                          # (B, 10)

#############################################
#          The mirrored layout's nets       #
#############################################

class MLP(nn.Module):
    """One hidden layer, dropout before its ReLU; MLP(784, 200, 10) has 159,010 parameters."""
    def __init__(self, dim_in, dim_hidden, dim_out):
        super().__init__()
        self.layer_input = nn.Linear(dim_in, dim_hidden)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        self.layer_hidden = nn.Linear(dim_hidden, dim_out)

    def forward(self, x):
        x = self.relu(self.dropout(self.layer_input(x.flatten(1))))     # (B, dim_hidden)
        return self.layer_hidden(x)                                     # (B, dim_out)

def conv(args, dim_in, dim_out, side):
    """A convolution, or, if args.separable, a depthwise one and then a pointwise one, which have fewer weights (Howard et al. 2017)."""
    if not getattr(args, 'separable', 0): return nn.Conv2d(dim_in, dim_out, side)
    return nn.Sequential(nn.Conv2d(dim_in, dim_in, side, groups=dim_in), nn.Conv2d(dim_in, dim_out, 1))

class CNNMnist(nn.Module):
    """Two 5x5 convolutions without padding and two dropouts; 21,840 parameters, 17,300 if args.separable. Of args: num_channels,
    num_classes."""
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 10, kernel_size=5)
        self.conv2 = conv(args, 10, 20, 5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, args.num_classes)

    def forward(self, x):                                               # (B, 1, 28, 28)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))                      # (B, 10, 12, 12)
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))     # (B, 20, 4, 4)
        x = F.relu(self.fc1(x.flatten(1)))                              # (B, 50)
        return self.fc2(F.dropout(x, training=self.training))           # (B, 10)

class CNNCifar(nn.Module):
    """LeNet-5's shape on 32x32; 62,006 parameters, 59,858 if args.separable. Of args: num_channels, num_classes."""
    def __init__(self, args):
        super().__init__()
        self.conv1 = nn.Conv2d(args.num_channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = conv(args, 6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, args.num_classes)

    def forward(self, x):                                               # (B, 3, 32, 32)
        x = self.pool(F.relu(self.conv1(x)))                            # (B, 6, 14, 14)
        x = self.pool(F.relu(self.conv2(x)))                            # (B, 16, 5, 5)
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))            # (B, 84)
        return self.fc3(x)                                              # (B, 10)
