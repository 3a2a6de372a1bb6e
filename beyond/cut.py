"""Cut: clients train the first layers of the net, and the server the others.

    python fedavg.py --cut 1

SplitFed (Thapa et al. 2022, arXiv 2004.12088; split learning: Vepakomma et al. 2018, arXiv
1812.00564): in each batch of ClientUpdate, the client sends the activations of its layers and the
labels up, and their gradient comes down; both are counted. As in the paper's variant SplitFedV1,
the server has a copy of the back half for each client; here the copies are averaged once a round,
like the front halves, so that the weights are those of the uncut net. With --gpu 0,1 the halves
lie on two GPUs.
"""
import os

import torch

from beyond import Room
from beyond.flat import flat, unflat
from compress import decode, encode
from models import Net
from options import fail, number, typed

def flags(add):
    """--cut."""
    add('cut', None, number(int, 1), 'L: clients train the first L layers and the server the '
        'others, on what the clients send it; on two GPUs with --gpu 0,1')

CLASHES = (('cut', 'dp user', "whose noise the server's half would lack"),
           ('cut', 'dp example', 'which does not hide what clients send at each step'),
           ('cut', 'secagg', 'which does not hide what clients send at each step'),
           ('cut', 'silo', 'whose server does not train'),
           ('cut', 'model lstm', 'which has no stages to cut it between'),
           ('cut', 'compile', 'as the two halves wait for each other'),
           ('cut', 'engine stacked', 'as the two halves wait for each other'),
           ('cut', 'personal layers', 'as the server has the last ones'))

def check(args):
    """Two devices are for two halves, in one process."""
    if isinstance(args.gpu, tuple) and not args.cut:
        fail(f'--gpu {typed(args.gpu)}: two devices are for the two halves of a net; add --cut L, '
             'or name one')
    if isinstance(args.gpu, tuple) and 'TORCHELASTIC_RUN_ID' in os.environ:
        fail(f'--gpu {typed(args.gpu)}: under torchrun a process has one device; name one, and the '
             'others take those after it')

class Cut(Room):
    """The front crosses the wire; the back stays at the server."""
    gathers = True

    def __init__(self, args):
        super().__init__(args)
        try:
            front, _ = split(self.net, args.cut)
        except ValueError as e:
            fail(f'--cut {args.cut}: {e}', everyone=True)
        names = set(front.state_dict())
        self.front = flat({name: torch.full_like(v, name in names)
                           for name, v in self.net.state_dict().items()}).bool()        # (d,)
        self.back_device = args.device
        if isinstance(args.gpu, tuple) and args.device.type == 'cuda':
            self.back_device = torch.device('cuda', args.gpu[1])

    def crosses(self, k, r):
        return super().crosses(k, r) & self.front

    def client(self, k, r):
        client = super().client(k, r)
        client.back_device = self.back_device
        client.cross = lambda v, up: crossed(v, r.tally, 'up_bytes' if up else 'down_bytes')
        return client

    def keep(self, u, x, payload, r):
        return super().keep(u, x, payload, r) | {'back': flat(u.w)[~self.front]}

    def receive(self, updates, w, r):
        """The server has its half of each client's net."""
        for u in super().receive(updates, w, r):
            v = flat(u.w)
            v[~self.front] = u.kept['back']
            yield u._replace(w=unflat(v, w))

def crossed(v, tally, name):
    """What the other side receives of the tensor v; its bytes are counted under the name."""
    payload = encode(v.flatten().float().cpu())
    tally[name] += len(payload)
    try:
        return decode(payload, v.numel()).view(v.shape)
    except ValueError:          # not finite; the client's update will be refused
        return v

class CutClient:
    """Trains the two halves of the net in turn. args: also cut (L)."""
    back_device = None

    @staticmethod
    def cross(v, up):
        """What the other side receives of the tensor v, going up to the server or down."""
        return v

    def model(self, net):
        net = super().model(net)
        self.front, self.back = split(net, self.args.cut)
        self.back.to(self.back_device or self.args.device)
        return net

    def gradient(self, net, x, y):
        """As LocalUpdate's, with activations and labels going up, and a gradient down."""
        a = self.front(x)
        labels = y.view(len(y), -1).to(a.dtype)
        sent = torch.cat([a.detach().flatten(1), labels], 1)        # (B, activations + labels)
        sent = self.cross(sent, True).to(next(self.back.parameters()).device)
        n = a[0].numel()
        received = sent[:, :n].view(a.shape).requires_grad_()
        loss = self.loss(self.back(received), sent[:, n:].view(y.shape).to(y.dtype))
        loss.backward()
        a.backward(self.cross(received.grad, False).to(a.device))
        return loss.detach().to(a.device)

class Part(Net):
    """The stages of net that are named, with the net's own layers."""
    def __init__(self, net, names):
        super().__init__()
        self.stages = {name: net.stages[name] for name in names}
        for name, layer in net.named_children():
            if name in names or not list(layer.parameters()):
                self.add_module(name, layer)
        self.training = net.training

def split(net, L):
    """(front, back): the first L stages of net and the others, two modules that share its
    parameters and their names; the back takes what the front returns.

    Raises ValueError unless both have a stage with something to train.
    """
    names = list(getattr(net, 'stages', ()))
    if not names:
        raise ValueError(f'{type(net).__name__} has no stages to cut it between (models.Net)')
    if not 0 < L < len(names):
        raise ValueError(f'{type(net).__name__} can be cut after layer 1 to {len(names) - 1}')
    inside = [name for name, layer in net.named_children()
              if name not in names and list(layer.parameters())]
    if inside:
        raise ValueError(f'{type(net).__name__} cannot be cut: {inside[0]} begins no stage')
    inside = [name for name, _ in net.named_parameters(recurse=False)]
    if inside:
        raise ValueError(f'{type(net).__name__} cannot be cut: {inside[0]} is in no layer')
    halves = Part(net, names[:L]), Part(net, names[L:])
    if not all(any(p.requires_grad for p in half.parameters()) for half in halves):
        raise ValueError(f'{type(net).__name__} cannot be cut there: one half is frozen')
    return halves
