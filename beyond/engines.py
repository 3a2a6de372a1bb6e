"""Engines: several clients train side by side, which is faster than one after the other.

    python fedavg.py --engine stacked --compile 1

In Algorithm 1, "for each k in S_t in parallel": the weights of m clients are stacked to (m, ...)
and trained under torch.func.vmap, through the same hooks as LocalUpdate.train. Every client has
the loop's batches and, but for rounding, its weights; dropout and augmentation are drawn per
stack. --compile 1 runs the step of a stack under torch.compile.
"""
import copy
import hashlib
import inspect
import io
import math
import tokenize

import torch
from torch.utils._pytree import tree_leaves

from beyond import Room
from beyond.stacks import CompiledStack, Stack
from options import fail
from sampling import seed_torch

def flags(add):
    """--engine, --compile."""
    add('engine', 'auto', str, 'loop: one client after the other; stacked: several at once; auto: '
        'the faster one', choices=('auto', 'loop', 'stacked'))
    add('compile', 0, bool,
        '1: torch.compile the stacked step; takes from seconds to a minute at the start')

CLASHES = (('engine stacked', 'dataset shakespeare', 'whose lines have a label for each character'),
           ('compile', 'dataset shakespeare', 'whose lines have a label for each character'))

def check(args):
    """Only a stack is compiled."""
    if args.compile and args.engine == 'loop':
        fail('--compile 1: compiles the stacked step; leave out --engine loop')

def wanted(args):
    """Whether the flags ask for stacks; --engine auto takes what was measured to be faster
    (results/README.md, "Speed"): on a CPU, vmap's grouped convolutions are slow. A stack's losses
    have one value for each example, and lines of text have more."""
    if args.dataset == 'shakespeare':
        return False
    slow = args.model == 'paper_cnn' or (args.model == 'cnn' and args.local_bs > 20)
    slow = slow and args.device.type == 'cpu'
    return args.compile or args.engine == 'stacked' or (args.engine == 'auto' and not slow)

############################### What a stack cannot train ###############################

# Of the source of fedavg's Server.train and of LocalUpdate, whose hooks a stack calls for several
# clients at once, and whose other methods it replaces.
FINGERPRINT = 'a4ac06e38b334231'

def fingerprint(*functions):
    """A hash of the source of functions, without comments and white space: Python 3.12 and later
    split f-strings into tokens, and earlier ones do not."""
    kinds, words = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE), []
    blocks = {tokenize.INDENT: '{', tokenize.DEDENT: '}'}
    for function in functions:
        try:
            lines = io.StringIO(inspect.cleandoc(inspect.getsource(function))).readline
            tokens = list(tokenize.generate_tokens(lines))
        except (OSError, TypeError, SyntaxError, tokenize.TokenError):     # of a shell or a lambda
            return 'unknown'
        words += [blocks.get(token.type, token.string) for token in tokens
                  if token.type not in kinds and not token.string.startswith('"""')]
    return hashlib.sha256(''.join(''.join(words).split()).encode()).hexdigest()[:16]

def unstackable(Client, Server, net):
    """Why the clients of fedavg's Server, or their net, cannot train in a stack; None if they
    can."""
    *subclasses, LocalUpdate = [cls for cls in Client.__mro__ if cls is not object]
    hooks = {name for name in vars(LocalUpdate) if not name.startswith('__')} | {'__init__'}
    for cls in subclasses:
        if hooks & set(vars(cls)) - {'stacks'} and not vars(cls).get('stacks'):
            return f'{cls.__name__} does not say that its hooks take stacks (stacks = True)'
    methods = [method for method in vars(LocalUpdate).values() if inspect.isfunction(method)]
    if fingerprint(Server.train, *methods) != FINGERPRINT:
        return 'LocalUpdate or Server.train has been edited'
    if not all(p.requires_grad for p in net.parameters()):
        return f'{type(net).__name__} has frozen parameters'
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.RNNBase):
            return f'vmap does not take {name or "it"}, a {type(module).__name__}'
        norm = isinstance(module, torch.nn.modules.batchnorm._NormBase)
        if norm or list(module.buffers(recurse=False)):     # vmap cannot update them
            return f'{name or type(net).__name__} keeps running statistics or other buffers'
    if len(net.state_dict()) > len(list(net.parameters())):
        return f'{type(net).__name__} has a parameter with two names'
    return None

def unlike(client, net):
    """Why what the client's hooks make of net cannot train in a stack; None if it can."""
    parameters, name = list(client.model(net).parameters()), type(client).__mro__[1].__name__
    if not all(p.requires_grad for p in parameters):
        return f'the model of {name} has frozen parameters'
    if len(client.optimizer(parameters, client.args.lr).param_groups) > 1:
        return f'the optimizer of {name} has several groups of parameters'
    return None

@torch.no_grad()
def memory(net, x, B):
    """An estimate of the bytes that a client needs in a stack, with batches of B examples like x,
    (1, ...): 20 a weight, for it, its start, its gradient and two moments; 16 a value that a layer
    gives, for it, what functions make of it, and their gradients; the batch itself."""
    net, values = copy.deepcopy(net).eval(), []
    for layer in net.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda _, __, out: values.extend(
                v.numel() for v in tree_leaves(out) if isinstance(v, torch.Tensor)))
    net(x)
    weights = sum(p.numel() for p in net.parameters())
    return 20 * weights + B * (16 * sum(values) + x.element_size() * x.numel())

##################################### The server's side ######################################

class Stacked(Room):
    """Trains the clients of S_t in stacks, those with the most steps first."""
    def __init__(self, args):
        super().__init__(args)
        self.reason = unstackable(self.Client, type(self).__mro__[-2], self.net)
        self.insist()

    def insist(self):
        """Exits with one line if stacks were asked for and cannot be had."""
        args = self.args
        if self.reason and (args.engine == 'stacked' or args.compile):
            fail(f'--engine {args.engine}, --compile {args.compile}: the clients cannot train '
                 f'stacked, {self.reason}; take --engine loop and no --compile', everyone=True)

    def idle(self):
        return super().idle() | ({'Stacked'} if self.reason else set())

    def prepare(self):
        super().prepare()
        k = next(iter(self.parts))
        self.reason = self.reason or unlike(self.client(k, self.Round(0)), self.net)
        self.insist()
        if self.reason:
            print(f'--engine {self.args.engine}: clients train one after the other, as '
                  f'{self.reason}')
            return
        B = min(self.args.local_bs, max(map(len, self.parts.values())))
        kind = CompiledStack if self.args.compile else Stack
        self.stack_of = {net: kind(net, self.client(k, self.Round(0)), self.stack_size(net, B), B)
                         for net in self.nets()}
        self.check_loss()
        for stack in self.stack_of.values() if self.args.compile else ():
            stack.compile(*self.train_set.tensors)

    @torch.no_grad()
    def check_loss(self):
        """Exits with one line if the clients' loss cannot be that of a stack."""
        x, y = (v[:2] for v in self.train_set.tensors)
        client = self.client(next(iter(self.parts)), self.Round(0))
        loss = client.loss(copy.deepcopy(self.net).eval()(client.transform(x)), y, reduction='none')
        if loss.shape != y.shape[:1]:
            fail(f'--engine {self.args.engine}: {type(client).__mro__[1].__name__} gives a loss of '
                 f'shape {tuple(loss.shape)} with reduction="none"; give one value for each '
                 'example, or leave stacks = True out', everyone=True)

    def stack_size(self, net, B):
        """How many clients a stack has: on a CPU ten, compiled as many as have 1 MiB of weights
        (ten at most), which was fastest (results/README.md, "Speed"); on a GPU what a quarter of
        its memory holds, as there may be two stacks for a moment; not of what is free, as the same
        seed has to give the same bits. All stacks of a net are of like size."""
        size = 10
        if self.args.compile:
            size = min(size, max(1, 2**20 // (4 * sum(v.numel() for v in net.parameters()))))
        if self.args.device.type == 'cuda':
            _, whole = torch.cuda.mem_get_info(self.args.device)
            need = memory(net, self.train_set.tensors[0][:1], B)
            size = max(1, whole // 4 // len(self.nets()) // need)
        m = max(round(self.args.frac * self.K), 1)
        m = math.ceil(m / self.size / len(self.nets()))
        return math.ceil(m / math.ceil(m / size))

    def train(self, w, S_t, r):
        return super().train(w, S_t, r) if self.reason else self.stacked(w, S_t, r)

    def stacked(self, w, S_t, r):
        """Yields the Update of each client of S_t."""
        if not S_t:
            return
        stack, args = self.stack_of[self.net], self.args
        stack.client = self.client(next(iter(S_t)), r)
        lr = args.lr * args.lr_decay ** (r.t - 1)
        plans = {k: self.plan(k, E, stack.client, r) for k, E in S_t.items()}
        order = sorted(S_t, key=lambda k: -len(plans[k][0]))
        for i in range(0, len(order), stack.size):
            ks = order[i:i + stack.size]
            seed_torch(self.args.seed, 'dropout', r.t, ks[0])
            states = [self.start(k, w, r) for k in ks]
            stack.begin(self.net, states, lr)
            results = stack.train(*self.train_set.tensors, [plans[k] for k in ks])
            for k, (w_k, loss) in zip(ks, results):
                yield self.Update(k, w_k, self.weight(k), loss)

    def plan(self, k, E, client, r):
        """Client k's batches as indices, (steps, B), and weights, (steps, B): 1/b for each of the
        b examples of a batch, 0 for padding."""
        seed_torch(self.args.seed, 'train', r.t, k)
        batches = client.batches(len(self.parts[k]), E, self.args.local_bs)
        index = torch.as_tensor(self.parts[k], device=self.args.device)
        sizes = torch.tensor([len(b) for b in batches], device=index.device)
        real = torch.arange(int(sizes.max()), device=index.device) < sizes[:, None]
        padded = index.new_zeros(real.shape)
        padded[real] = index[torch.cat(batches)]
        return padded, real / sizes[:, None]
