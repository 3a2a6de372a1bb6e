"""Pruning: the weights of smallest magnitude become and stay zero, and are not sent.

    python fedavg.py --prune 0.9 --prune_end 10

Zhu and Gupta 2017 (arXiv 1710.01878), Section 3: the pruned fraction of the matrices and filters
grows along a cubic. In Algorithm 1, the server sends w without what is pruned, and the mask to the
clients that do not hold the present one; a client keeps pruned weights at zero.

Fields of a round: mask, (d,) bool, and holders, the clients that hold it.
"""
import torch

from beyond import Room
from beyond.flat import flat, shaped, unflat
from compress import decode, encode, prune, sparsity
from options import fail, number, requires

def flags(add):
    """--prune, --prune_begin, --prune_end."""
    add('prune', None, number(float, 0, 0.9999, above=True),
        'fraction of the weights pruned by magnitude in the end; biases stay')
    add('prune_begin', None, number(int, 0),
        'with --prune: the last round without pruning; 0 if not given')
    add('prune_end', None, number(int, 1), 'with --prune: the first round with all of it, after '
        'a cubic; 30 or --epochs, whichever is less, if not given')

def check(args):
    """The schedule lies within the run."""
    requires(args, '--prune', ('prune_begin', 'prune_end'), args.prune)
    begin, end = schedule(args)
    if args.prune and not begin < end <= args.epochs:
        fail(f'--prune_begin {begin}, --prune_end {end}: the end comes after the beginning and by '
             f'the last round, --epochs {args.epochs}')

def schedule(args):
    """(the last round without pruning, the first with all of it)."""
    return args.prune_begin or 0, args.prune_end or min(30, args.epochs)

class Pruned(Room):
    """Prunes w before it is sent."""
    gathers = True

    def __init__(self, args):
        super().__init__(args)
        d = len(flat(self.net.state_dict()))
        self.mask, self.holders = torch.ones(d, dtype=torch.bool), set()
        self.begin, self.full = schedule(args)

    def crosses(self, k, r):
        return super().crosses(k, r) & vars(r).get('mask', True)

    def send(self, w, S_t, r):
        held = {k: self.crosses(k, r) for k in S_t}             # but for the mask
        if self.silo and self.rank:
            r.mask, r.holders = self.receive_mask(held), set()
        else:
            s = sparsity(r.t, self.args.prune, self.begin, self.full)
            mask = unpruned(w, matrices(self.net), s)
            self.send_mask(mask, held, r)
            r.mask = mask
        return super().send(unflat(flat(w) * r.mask, w), S_t, r)

    def send_mask(self, mask, held, r):
        """Sends the mask to those of S_t that do not hold it."""
        holders = self.holders if torch.equal(mask, self.mask) else set()
        for k, at in held.items():
            known = k in holders or mask.all()
            self.post(k, b'' if known else encode(mask[at].float(), quantize=1), r)   # 0, 1: exact
        r.holders = holders | set(held)

    def receive_mask(self, held):
        """The mask that rank 0 has sent this silo, if it asks it in this round."""
        payload = self.fetch() if self.rank in held else b''
        if not payload:
            return self.mask
        at = held[self.rank]
        return self.mask.masked_scatter(at, decode(payload, int(at.sum())).bool())

    def client(self, k, r):
        client = super().client(k, r)
        client.mask = shaped(vars(r).get('mask', self.mask).float(), self.w)
        return client

    def reached(self, first=1):
        """Accuracies count from --prune_end on: the model is not as sparse before."""
        return super().reached(max(first, self.full))

    def end(self, w, row, r):
        super().end(w, row, r)
        self.mask, self.holders = r.mask, r.holders

    def finish(self, code):
        self.mask = self.from_rank_0(self.mask)
        return super().finish(code)

    def state(self):
        return super().state() | {'Pruned': {'mask': self.mask, 'holders': sorted(self.holders),
                                             'full': self.full}}

    def load(self, state):
        super().load(state)
        if state:
            mask = state['Pruned']['mask']
            if mask.shape != self.mask.shape or (mask.dtype, mask.layout) != (
                    torch.bool, torch.strided):
                raise ValueError('a mask of another kind')
            self.mask = mask
            self.holders = set() if self.silo else set(state['Pruned']['holders'])
            self.full = state['Pruned']['full']     # --epochs may be another now
            if not all(type(k) is int for k in (self.full, *self.holders)):
                raise ValueError('a round or a client that is not a whole number')

class PrunedClient:
    """Sets pruned weights to zero after each step. mask: {name: tensor of 0 and 1}."""
    stacks = True

    def model(self, net):
        net = super().model(net)
        # A narrower net has the leading part of each tensor.
        self.masks = [self.mask[name][tuple(map(slice, p.shape))].to(p.device)
                      for name, p in net.named_parameters()]
        return net

    def project(self, parameters):
        super().project(parameters)
        for p, mask in zip(parameters, self.masks):
            p.mul_(mask.to(p.device))       # the back half's may be another

def matrices(net):
    """The names of net's matrices and filters: its parameters, but for biases."""
    parameters = net.named_parameters(remove_duplicate=False)
    return {name for name, p in parameters if p.dim() >= 2}

def unpruned(w, names, s):
    """Which values of flat(w) stay when the fraction s of the weights that these names have is
    pruned, those of smallest magnitude: (d,) bool."""
    mask = torch.cat([torch.full((v.numel(),), name not in names)
                      for name, v in w.items() if v.is_floating_point()])
    mask[~mask] = prune(flat(w)[~mask], s)
    return mask
