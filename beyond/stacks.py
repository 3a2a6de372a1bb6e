"""Stacks: the weights of several clients as (m, ...), trained by one optimizer under vmap.

    stack = Stack(net, client, size=10, B=10)
    stack.begin(net, [w] * 3, lr=0.1)
    (w_1, loss_1), (w_2, loss_2), (w_3, loss_3) = stack.train(x, y, plans)

Of LocalUpdate.train's steps, a stack calls the hooks of one client object, which see no k.
"""
import inspect
import logging
import time

import torch
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence

from options import fail

class Stack:
    """Copies of a net's weights, (m, ...), m at most `size`, and one optimizer for all.

    The clients with the most steps come first, so that those still at work are the first few; one
    that is done is copied out and leaves the stack, with its optimizer state.
    """
    def __init__(self, net, client, size, B):
        self.net, self.client, self.size, self.B = client.model(net), client, size, B
        self.names = [name for name, _ in net.named_parameters()]
        self.columns = {f'{name}.weight'.lstrip('.') for name, layer in net.named_modules()
                        if isinstance(layer, torch.nn.Linear)}

    def begin(self, net, states, lr):
        """Copies of the weights in states, a state_dict for each client; a fresh optimizer."""
        self.client.model(net)
        self.w = [stacked([w[name] for w in states], name in self.columns).requires_grad_()
                  for name in self.names]
        self.start = [v.detach().clone() for v in self.w]
        self.optimizer = self.client.optimizer(self.w, lr)

    def train(self, x, y, plans):
        """(w_k, mean loss) of each client, whose plans have descending numbers of steps."""
        steps = [len(index) for index, _ in plans]
        seen = [int((weight > 0).sum()) for _, weight in plans]
        index, weight = self.padded(plans)                                      # (steps, m, B)
        total, w = torch.zeros(index.shape[1], device=x.device), [None] * len(plans)
        for s in range(steps[0]):
            self.narrow(sum(n > s for n in steps))
            m = len(self.w[0])
            at = index[s, :m]
            total[:m] += self.step(x[at], y[at], weight[s, :m])     # a graph would copy all of x
            for i, n in enumerate(steps):
                if n == s + 1:
                    w[i] = {name: v[i].detach().clone(memory_format=torch.contiguous_format)
                            for name, v in zip(self.names, self.w)}
        # Only here does the program wait for the device.
        return [(w_k, loss / n) for w_k, loss, n in zip(w, total.tolist(), seen)]

    def padded(self, plans):
        """The plans as (steps, m, B) each, zeros where a client has no more."""
        B = max(index.shape[1] for index, _ in plans)
        plans = [[torch.nn.functional.pad(v, (0, B - v.shape[1])) for v in plan] for plan in plans]
        return [pad_sequence(v) for v in zip(*plans)]

    def narrow(self, m):
        """Keeps the first m of the stack, and their optimizer state."""
        if m == len(self.w[0]):
            return
        state, group = self.optimizer.state, self.optimizer.param_groups[0]
        self.start = [v[:m] for v in self.start]
        for i, v in enumerate(self.w):
            self.w[i] = v.detach()[:m].requires_grad_()
            if v in state:
                state[self.w[i]] = {name: u[:m] if u.shape == v.shape else u
                                    for name, u in state.pop(v).items()}
        group['params'] = self.w

    @torch.no_grad()
    def step(self, x, y, weight):
        """One optimizer step of every client on the examples x, (m, B, ...), y, (m, B); the sums of
        their losses before it, (m,)."""
        x = self.client.transform(x.flatten(0, 1)).unflatten(0, weight.shape)
        grads, losses = self.gradients(x, y, weight)
        for v, g in zip(self.w, grads):
            v.grad = g
        self.client.adjust(self.w, self.start)
        # Without the wrappers around it (hooks, profiling), which would cut a compiled step.
        inspect.unwrap(type(self.optimizer).step)(self.optimizer)
        self.client.project(self.w)
        for v in self.w:
            v.grad = None
        return losses.detach() * (weight > 0).sum(1)

    def gradients(self, x, y, weight):
        """Each client's gradient of its own loss, (m, ...) for every weight, and the losses."""
        with torch.enable_grad():
            total, losses = self.losses(self.w, x, y, weight)
        return torch.autograd.grad(total, self.w, allow_unused=True), losses

    def losses(self, w, x, y, weight):
        """The sum of the clients' losses, whose gradient is each client's own, and each, (m,)."""
        def forward(w_k, x_k):
            return functional_call(self.net, dict(zip(self.names, w_k)), (x_k,))
        logits = vmap(forward, randomness='different')(list(w), x)              # (m, B, classes)
        losses = self.client.loss(logits.flatten(0, 1), y.flatten(0, 1), reduction='none')
        losses = losses.view(weight.shape) * weight
        return losses.sum(), losses.sum(1)

def stacked(tensors, columns=False):
    """Tensors of one shape as one, (m, ...), in rows whatever their own memory format; or matrices
    in columns, as vmap gives the gradient of a linear layer, so that a step adds like to like."""
    v = torch.stack(tensors, out=tensors[0].new_empty(len(tensors), *tensors[0].shape))
    return v.mT.contiguous().mT if columns else v

class CompiledStack(Stack):
    """A Stack with its step under torch.compile. Another shape would be compiled anew, so that
    all stacks have the same size and B; weights and optimizer are set back, not made anew."""
    def __init__(self, net, client, size, B):
        super().__init__(net, client, size, B)
        states = [net.state_dict()] * size
        super().begin(net, states, torch.tensor(client.args.lr, device=client.args.device))
        for v in self.w:
            v.requires_grad_(False).grad = torch.zeros_like(v)
        self.optimizer.step()       # makes the optimizer's state
        for v in self.w + self.start + self.optimizer_state():
            torch._dynamo.mark_static_address(v)        # or no CUDA graph is made of the step

    def optimizer_state(self):
        """The tensors of the optimizer's state."""
        return [v for state in self.optimizer.state.values() for v in state.values()
                if isinstance(v, torch.Tensor)]

    def compile(self, x, y):
        """Compiles the step and says how long it took; exits with one line if it cannot."""
        began = time.perf_counter()
        at = torch.zeros(self.size, self.B, dtype=torch.int64, device=x.device)
        batch = x[at], y[at], at.float()
        graph = self.client.args.device.type == 'cuda'
        torch._logging.set_logs(dynamo=logging.ERROR)
        logging.getLogger('torch.utils.cpp_extension').setLevel(logging.ERROR)   # no CUDA
        try:
            # From a graph a net with dropout learnt less (results/README.md, "Speed").
            random = graph and self.draws(*batch)
            mode = 'reduce-overhead' if graph and not random else 'default'
            self.step = torch.compile(self.step, mode=mode)
            self.step(*batch)
        except Exception as e:      # whatever torch.compile and the C++ compiler raise
            reason = str(getattr(e, 'inner_exception', e)).strip().partition('\n')[0]
            fail(f'--compile 1: torch.compile does not work here ({reason}); leave the flag out',
                 everyone=True)
        print(f'--compile 1: compiled in {time.perf_counter() - began:.0f} s'
              + ', without a CUDA graph, as a step draws random numbers' * random)

    def draws(self, *batch):
        """Whether a step draws random numbers, for dropout or augmentation, say."""
        before = generators(self.w[0].device)
        self.step(*batch)
        return not torch.equal(before, generators(self.w[0].device))

    def begin(self, net, states, lr):
        self.client.model(net)
        with torch.no_grad():
            for i in range(self.size):
                w = states[min(i, len(states) - 1)]
                for name, v, v_0 in zip(self.names, self.w, self.start):
                    v[i] = v_0[i] = w[name]
            for v in self.optimizer_state():
                v.zero_()
            self.optimizer.param_groups[0]['lr'].fill_(lr)

    def padded(self, plans):
        """As a Stack's, for `size` clients and B examples."""
        pad = torch.nn.functional.pad
        index, weight = (pad(v, (0, self.B - v.shape[-1])) for v in super().padded(plans))
        missing = self.size - index.shape[1]
        return [pad(v, (0, 0, 0, missing)) for v in (index, weight)]

    def narrow(self, m):
        """Clients that are done stay, and their steps are ignored."""

    def gradients(self, x, y, weight):
        # torch.compile does not take torch.autograd.grad.
        return torch.func.grad(self.losses, has_aux=True)(self.w, x, y, weight)

def generators(device):
    """The states of the generators that what runs on a device may draw from, as one tensor."""
    states = [torch.get_rng_state()]
    if device.type == 'cuda':
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
