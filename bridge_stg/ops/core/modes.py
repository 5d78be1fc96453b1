"""The modes of torch that a call may be made in: autocast, forward-mode and functional differentiation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a device; the "meta" device has none."""
    # torch.amp.is_autocast_available would break a graph of torch 2.11.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A block in which autocast is off for a device."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def differentiates_forward() -> bool:
    """Whether a level of forward-mode differentiation is open, as in `torch.func.jvp`."""
    return forward_ad._current_level >= 0


def differentiates_functionally(*tensors: Tensor | None) -> bool:
    """Whether `torch.func.grad`, `vjp` or `jacrev` takes the gradient of a tensor, also within `vmap`."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    for x in tensors:
        while x is not None and functorch.is_functorch_wrapped_tensor(x):
            if functorch.is_gradtrackingtensor(x) and x.requires_grad:
                return True
            x = functorch.get_unwrapped(x)
    return False


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where the caller asks for a derivative that a registered op does not have.

    Torch itself would drop a tangent silently, and answer `torch.func.grad` with an error about its internals.
    """
    if differentiates_forward():
        for x in tensors:
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd, linearize, forward_ad); it must be "
                    "differentiated in reverse mode, with backward() or torch.autograd.grad."
                )
    if differentiates_functionally(*tensors):
        raise NotImplementedError(
            f"{op} has no functional derivative (torch.func.grad, vjp, jacrev); it must be differentiated with "
            "backward() or torch.autograd.grad."
        )
