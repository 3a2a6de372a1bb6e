"""An update on the wire: what a server asks of it before it takes part in the average.

This file knows no net and no client, and needs torch alone.
"""
import torch

def accept(w):
    """The state_dict w, if every floating point value in it is finite. Raises ValueError naming the first tensor that is not."""
    for name, v in w.items():
        if v.is_floating_point() and not torch.isfinite(v).all(): raise ValueError(f'{name} holds NaN or infinity')
    return w
