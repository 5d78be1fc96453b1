"""Whether multiplying by a linear layer's weight is the same as calling the layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops.core.checks import FLOATING
from ..ops.core.modes import autocasts

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def weight_obstacle(layer: nn.Module) -> str | None:
    """The reason why `layer` does more than multiply by `weight` and add `bias`; None if it does no more.

    It does more if it is of another class (an adapter, a quantised or a parametrized layer), if the call is hooked
    (offload, weight norm, observers), or if the weight is not a plain tensor (sharded, quantised).
    """
    if type(layer) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return f"it is a {type(layer).__module__}.{type(layer).__qualname__}"
    if "forward" in layer.__dict__:
        return "its forward is replaced"
    if any(getattr(layer, name) for name in _HOOKS):
        return "it has hooks"
    if type(layer.weight) not in (Tensor, nn.Parameter, FakeTensor):  # FakeTensor while torch traces
        return f"its weight is a {type(layer.weight).__name__}"
    return None


def input_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype that a linear layer expects `x` in: that of its weight, or that of `x` if the weight is quantised."""
    weight = getattr(layer, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in FLOATING else x.dtype


def check_like_weight(op: str, weight: Tensor, **tensors: Tensor | None) -> None:
    """Check that tensors are on the device of `weight` and, outside autocast, of its dtype.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor is on another device.
    """
    for name, x in tensors.items():
        if x is None:
            continue
        if x.device != weight.device:
            raise ValueError(f"{op}: {name} must be on the device of the weights ({weight.device}), got {x.device}.")
        if x.dtype != weight.dtype and not autocasts(x.device.type):
            raise TypeError(f"{op}: {name} must have the dtype of the weights ({weight.dtype}), got {x.dtype}.")
