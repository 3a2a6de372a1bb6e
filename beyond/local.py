"""Other ways to train locally: a proximal term, and AdamW.

    python fedavg.py --iid 0 --mu 0.1

In ClientUpdate, FedProx (Li et al. 2020, arXiv 1812.06127) adds mu / 2 |w - w_t|^2 to the loss,
which keeps w near the weights that the round began with; --optimizer adamw replaces SGD.
"""
import torch

from options import fail, number

def flags(add):
    """--optimizer, --mu."""
    add('optimizer', 'sgd', str, 'local optimizer; the paper has SGD', choices=('sgd', 'adamw'))
    add('mu', 0.0, number(float, 0, 1e9),
        "FedProx: mu / 2 |w - w_t|^2 is added to each client's loss")

def check(args):
    """AdamW has a momentum of its own."""
    if args.momentum and args.optimizer != 'sgd':
        fail(f'--momentum {args.momentum}: adamw has its own; leave the flag out, or take '
             '--optimizer sgd')

class Proximal:
    """FedProx (Li et al. 2020, Algorithm 2): the gradient of the proximal term is mu (w - w_t)."""
    stacks = True

    def adjust(self, parameters, start):
        super().adjust(parameters, start)
        for p, p_0 in zip(parameters, start):
            if p.grad is not None:      # of a frozen parameter
                p.grad = p.grad.add(p.detach() - p_0.to(p.device), alpha=self.args.mu)

class AdamW:
    """torch's AdamW with its defaults but for lr; a new one in each round."""
    stacks = True

    def optimizer(self, parameters, lr):
        return torch.optim.AdamW(parameters, lr=lr)
