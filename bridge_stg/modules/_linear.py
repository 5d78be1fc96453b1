"""When the weight of a linear layer may be multiplied in place of a call, and when only the call is right."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops.core.checks import FLOATING
from ..ops.core.modes import autocasts

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def weight_obstacle(layer: nn.Module) -> str | None:
    """Why `layer` does more than multiply by its `weight` and add its `bias`, or None where it does just that.

    It does more where it is another class (an adapter, a quantised layer, a parametrized one), where something hooks
    the call (offload, weight norm, observers) and where the weight is no plain tensor (sharded, quantised).
    """
    if type(layer) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return f"it is a {type(layer).__module__}.{type(layer).__qualname__}"
    if "forward" in layer.__dict__:
        return "its forward is replaced"
    if any(getattr(layer, name) for name in _HOOKS):
        return "it has hooks"
    if type(layer.weight) not in (Tensor, nn.Parameter, FakeTensor):  # the last while something traces
        return f"its weight is a {type(layer.weight).__name__}"
    return None


def input_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """Dtype to give `x` to a linear layer in: that of the weight, or of `x` where the weight is stored otherwise."""
    weight = getattr(layer, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in FLOATING else x.dtype


def check_like_weight(op: str, weight: Tensor, **tensors: Tensor | None) -> None:
    """Check that tensors are where `weight` is and, outside autocast, of its dtype.

    Raises:
        TypeError: another dtype.
        ValueError: another device.
    """
    for name, x in tensors.items():
        if x is None:
            continue
        if x.device != weight.device:
            raise ValueError(f"{op}: {name} must be on the device of the weights ({weight.device}), got {x.device}.")
        if x.dtype != weight.dtype and not autocasts(x.device.type):
            raise TypeError(f"{op}: {name} must have the dtype of the weights ({weight.dtype}), got {x.dtype}.")
