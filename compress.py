"""An update on the wire: what a server asks of it before it takes part in the average.

This file knows no net and no client, and needs torch alone.
"""
import torch

def check(w):
    """Raises ValueError, naming the tensor, if a floating point value in the state_dict w is not finite."""
    for name, v in w.items():
        if v.is_floating_point() and not torch.isfinite(v).all(): raise ValueError(f'{name} holds NaN or infinity')
