"""The modes of torch that surround a call: autocast, which not every device has, and forward-mode differentiation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a device; never for one that has none, such as "meta"."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A block in which autocast is off for a device."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def differentiates_forward() -> bool:
    """Whether a level of forward-mode differentiation is open, as in `torch.func.jvp`."""
    return forward_ad._current_level >= 0


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a tensor carries a tangent: a registered op would drop it in silence."""
    if not differentiates_forward():
        return
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd, linearize, forward_ad); it must be "
                "differentiated in reverse mode, with backward() or torch.autograd.grad."
            )
