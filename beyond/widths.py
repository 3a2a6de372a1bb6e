"""Widths: weak clients train narrower nets, or a net with fewer weights.

    python fedavg.py --widths 1,0.5,0.25 --iid 0

HeteroFL (Diao et al. 2021, arXiv 2010.01264, Algorithm 1, without its scaler): in Algorithm 1,
client k trains the leading part of every hidden layer, and each value of w is averaged over the
clients that hold it. --separable makes the second convolution of --model cnn depthwise separable
(Howard et al. 2017, arXiv 1704.04861).
"""
import copy
import functools
import math

import torch
from torch import nn

from beyond import Room
from beyond.flat import flat, unflat
from options import fail, number, several, typed

def flags(add):
    """--widths, --separable."""
    add('widths', None, several(number(float, 0, 1, above=True)), 'fractions of the hidden units '
        'that clients have, as 1,0.5,0.25; client k has number k mod n of them, counted from 0; '
        'one is 1')
    add('separable', 0, bool,
        '1: the second convolution of --model cnn is depthwise, then pointwise')

CLASHES = (('widths', 'secagg', 'which adds up values that all clients have'),
           ('widths', 'dp user', 'whose noise is for sums over all clients'),
           ('widths', 'model lstm', 'which has no narrower form'),
           ('widths', 'cut', 'which gives the hidden layers to the server'),
           ('widths', 'personal', 'whose report is of whole models'))

def check(args):
    """Some client trains the whole net."""
    if args.widths and max(args.widths) < 1:
        fail(f'--widths {typed(args.widths)}: no client would train the whole net; put a 1 among '
             'them')
    if args.separable and args.model != 'cnn':
        fail(f'--separable 1: {args.model} has no such form; take --model cnn')

class Widths(Room):
    """Client k trains the net that is args.widths[k mod n] as wide."""
    def __init__(self, args):
        super().__init__(args)
        for layer in self.net.modules():
            own = list(layer.parameters(recurse=False))
            if own and (not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.bias is None):
                fail(f'--widths {typed(args.widths)}: a layer of {args.model}, '
                     f'{type(layer).__name__}, cannot be narrowed; all have to be linear or '
                     'convolutions, with a bias', everyone=True)

    def prepare(self):
        super().prepare()
        self.nets()         # whatever the engine, nets that do not work are found here

    def nets(self):
        return self.narrower

    @functools.cached_property
    def narrower(self):
        """A net for each width, once the data are read; exits with one line if one of them does
        not work."""
        nets = [narrowed(self.net, width) for width in self.args.widths]
        x = self.test_set.tensors[0][:2]
        try:
            parts = all(self.is_part(net, x) for net in nets)
            reason = '' if parts else 'its output is not that of the units it shares with the whole'
        except Exception as e:      # whatever layers of other sizes make of a net of the user's
            reason = str(e) or type(e).__name__
        if reason:
            fail(f'--widths {typed(self.args.widths)}: a narrower {self.args.model} does not work '
                 f'({reason}); its layers have to follow one another, in the order in which they '
                 'are made', everyone=True)
        return nets

    @torch.no_grad()
    def is_part(self, net, x):
        """Whether net gives for x what the whole net gives once all that net lacks is 0."""
        whole, w = copy.deepcopy(self.net).eval(), net.state_dict()
        for v in whole.parameters():
            v.zero_()
        for name, part in leading(whole.state_dict(), w).items():
            part.copy_(w[name])
        expected = whole(x)
        difference = copy.deepcopy(net).eval()(x) - expected
        return difference.norm() <= 0.01 * expected.norm()      # a GPU may compute in TF32

    @functools.cached_property
    def held(self):
        """For each width, which values of flat(w) its clients hold: (d,) bool."""
        masks = []
        for net in self.nets():
            mask = {name: torch.zeros_like(v) for name, v in self.net.state_dict().items()}
            for part in leading(mask, net.state_dict()).values():
                part.fill_(1)
            masks.append(flat(mask).bool())
        return masks

    def kind(self, k):
        return k % len(self.args.widths)

    def crosses(self, k, r):
        return super().crosses(k, r) & self.held[self.kind(k)]

    def train(self, w, S_t, r):
        """One width after the other."""
        whole = self.net
        try:
            for i, self.net in enumerate(self.nets()):
                clients = {k: E for k, E in S_t.items() if self.kind(k) == i}
                for u in super().train(leading(w, self.net.state_dict()), clients, r):
                    w_k = copy.deepcopy(w)
                    for name, part in leading(w_k, u.w).items():
                        part.copy_(u.w[name])
                    yield u._replace(w=w_k)
        finally:
            self.net = whole

    def average(self, updates, w, r):
        """Each value is averaged over the clients that hold it; if there are none, it stays."""
        v = flat(w).double()
        total, m_t = torch.zeros_like(v), torch.zeros_like(v)
        for u in updates:
            if u.n:
                at = self.held[self.kind(u.k)]
                total[at] += u.n * flat(u.w)[at].double()
                m_t[at] += u.n
        self.all_sum([total, m_t])
        return unflat(torch.where(m_t > 0, total / m_t, v).float(), w)

def leading(w, like):
    """The leading parts of the tensors of w, {name: tensor}, in the shapes of like's."""
    return {name: v[tuple(map(slice, like[name].shape))] for name, v in w.items()}

def narrowed(net, r):
    """A copy of net with the leading r-fraction of every hidden layer's units or channels, ceil(r
    n) of n, and their weights (HeteroFL: Diao et al. 2021, Section 3.2, without its scaler).

    What the images have, and the classes, stay. net's layers are linear or convolutions, with a
    bias, in the order in which they come.
    """
    net = copy.deepcopy(net)
    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    kept = whole = 1            # of the outputs of the layer before
    for layer in layers:
        n_out, n_in = layer.weight.shape[:2]
        # A linear layer may have several inputs for a channel; a depthwise convolution has 1.
        n_in = n_in // whole * kept or n_in
        kept, whole = n_out if layer is layers[-1] else math.ceil(round(r * n_out, 9)), n_out
        layer.weight = nn.Parameter(layer.weight.detach()[:kept, :n_in].clone())
        layer.bias = nn.Parameter(layer.bias.detach()[:kept].clone())
        if isinstance(layer, nn.Linear):
            layer.in_features, layer.out_features = n_in, kept
        elif layer.groups > 1:
            layer.in_channels = layer.out_channels = layer.groups = kept
        else:
            layer.in_channels, layer.out_channels = n_in, kept
    return net
