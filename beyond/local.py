"""Other ways to train locally: a proximal term, AdamW, mixed precision.

    python fedavg.py --iid 0 --mu 0.1

In ClientUpdate, FedProx (Li et al. 2020, arXiv 1812.06127) adds mu / 2 |w - w_t|^2 to the loss,
which keeps w near the weights that the round began with; --optimizer adamw replaces SGD; --bf16 1
computes the net's matrix products and convolutions in bfloat16, weights and average in fp32.
"""
import torch

from options import fail, number

def flags(add):
    """--optimizer, --mu, --bf16."""
    add('optimizer', 'sgd', str,
        'local optimizer; the paper has SGD; with adamw try --lr 0.001',
        choices=('sgd', 'adamw'))
    add('mu', 0.0, number(float, 0, 1e9),
        "FedProx: mu / 2 |w - w_t|^2 is added to each client's loss")
    add('bf16', 0, bool, '1: clients train in bfloat16 by autocast; faster for paper_cnn on CPUs '
        'that have instructions for it; slower on other CPUs and for small nets')

CLASHES = (('bf16', 'cut', 'whose halves exchange fp32'),
           ('bf16', 'model lstm', 'which many CPUs can train in fp32 only'))

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
            if p.grad is not None:      # frozen parameters have none
                p.grad = p.grad.add(p.detach() - p_0.to(p.device), alpha=self.args.mu)

class AdamW:
    """torch's AdamW with its defaults but for lr; a new one in each round."""
    stacks = True

    def optimizer(self, parameters, lr):
        graph = torch.is_tensor(lr) and lr.is_cuda      # it has to count its steps on the device
        return torch.optim.AdamW(parameters, lr=lr, capturable=graph)

class Bf16:
    """Mixed precision (torch.autocast): the net computes in bfloat16 where that is safe."""
    stacks = True

    def model(self, net):
        net = super().model(net)
        device = next(net.parameters()).device.type
        net.forward = torch.autocast(device, torch.bfloat16)(net.forward)
        return net

    def loss(self, logits, y, reduction='mean'):
        return super().loss(logits.float(), y, reduction)
