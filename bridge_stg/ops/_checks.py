"""Argument checks shared by the ops: one table of expected shapes and dtypes per call, sentences on failure."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32)
BOOLEAN = (torch.bool,)
INT64 = (torch.int64,)
UINT8 = (torch.uint8,)


class Expect(NamedTuple):
    """What one tensor argument must be.

    Attributes:
        name: the argument's name.
        value: what was passed; None is allowed only where `optional`.
        shape: one letter or number an axis, as in "B N D"; a letter stands for the same size everywhere.
        dtypes: the dtypes allowed.
        optional: whether None is allowed.
    """

    name: str
    value: Any
    shape: str
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


def check_tensors(op: str, *table: Expect) -> dict[str, int]:
    """Check every row of the table and return the size of each letter.

    Raises:
        TypeError: something that is not a tensor, or a dtype that is not allowed.
        ValueError: a wrong rank, a size that disagrees, or tensors on several devices.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    first: Expect | None = None
    for expect in table:
        name, value = expect.name, expect.value
        if value is None and expect.optional:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}.")
        if value.dtype not in expect.dtypes:
            allowed = " or ".join(str(dtype) for dtype in expect.dtypes)
            raise TypeError(f"{op}: {name} must be {allowed}, got {value.dtype}.")
        axes = expect.shape.split()
        if value.dim() != len(axes):
            raise ValueError(
                f"{op}: {name} must have shape [{', '.join(axes)}], got {value.dim()} axes {_shape(value)}."
            )
        for axis, size in zip(axes, value.shape, strict=True):
            if axis.isdigit():
                if size != int(axis):
                    raise ValueError(f"{op}: {name} must have shape [{', '.join(axes)}], got {_shape(value)}.")
            elif axis not in sizes:
                sizes[axis], owner[axis] = size, name
            elif size != sizes[axis]:
                raise ValueError(
                    f"{op}: {name} must have shape [{', '.join(axes)}] with {axis}={sizes[axis]} "
                    f"(from {owner[axis]}), got {_shape(value)}."
                )
        if first is None:
            first = expect
        elif value.device != first.value.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first.name} ({first.value.device}), got {value.device}."
            )
    return sizes


def check_same_dtype(op: str, name: str, value: Tensor, **others: Tensor | None) -> None:
    """Raise TypeError unless all `others` have the dtype of `value`, which is called `name`."""
    for other, tensor in others.items():
        if tensor is not None and tensor.dtype != value.dtype:
            raise TypeError(f"{op}: {other} must have the dtype of {name} ({value.dtype}), got {tensor.dtype}.")


def check_choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the strings in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_integer(op: str, name: str, value: Any, low: int, high: int | None = None, meaning: str = "") -> None:
    """Raise unless `value` is an int in low..high; `meaning` says in brackets what the bound is."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}.")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{op}: {name} must be {bounds}{f' ({meaning})' if meaning else ''}, got {value}.")


def check_number(op: str, name: str, value: Any) -> float:
    """Return `value` as a float if it is a Python number, else raise TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}.")
    return float(value)


def _shape(value: Tensor) -> str:
    return str(list(value.shape))
