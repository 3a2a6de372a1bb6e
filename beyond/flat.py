"""A state_dict as one vector, and back: what goes over the wire, is clipped, masked or pruned."""
import torch

def flat(w):
    """The floating point tensors of the state_dict w, weights and buffers, as one vector on the
    CPU, (d,) float32."""
    return torch.cat([v.detach().flatten().float()
                      for v in w.values() if v.is_floating_point()]).cpu()

def checked(kept, n):
    """kept, {k: (n,)}, what clients keep. Raises ValueError for anything but finite floats."""
    for v in kept.values():
        if not isinstance(v, torch.Tensor) or v.layout != torch.strided or v.shape != (n,):
            raise ValueError('what a client keeps is no vector, or has another length')
        if v.dtype != torch.float32 or not v.isfinite().all():
            raise ValueError('what a client keeps is not fp32, or not finite')
    return kept

def shaped(vector, w):
    """{name: its part of vector, (d,), in its shape, on its device} for w's float tensors."""
    like = {name: v for name, v in w.items() if v.is_floating_point()}
    vector = vector.to(next(iter(like.values())).device)
    parts = vector.split([v.numel() for v in like.values()])
    return {name: part.view(v.shape) for (name, v), part in zip(like.items(), parts)}

def unflat(vector, w):
    """The state_dict like w with its floating point tensors from vector, (d,)."""
    return w | {name: v.to(w[name].dtype) for name, v in shaped(vector, w).items()}

def clip(update, S):
    """update, (d,), scaled down to an L2 norm of S if longer (McMahan et al. 2018, Section 2)."""
    norm = update.double().norm()
    return update * (S / norm) if norm > S else update
