"""Argument checks of the ops: a table of expected shapes and dtypes for each call, and one sentence on failure."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32)
BOOLEAN = (torch.bool,)
INT64 = (torch.int64,)
UINT8 = (torch.uint8,)
INT64_MAX = 2**63 - 1
FLOAT32_MAX = torch.finfo(torch.float32).max
FLOAT32_MIN = 2.0**-149  # the smallest above 0


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
        if value.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}.")
        if value.dtype not in expect.dtypes:
            allowed = " or ".join(str(dtype) for dtype in expect.dtypes)
            raise TypeError(f"{op}: {name} must be {allowed}, got {value.dtype}.")
        axes = expect.shape.split()
        if value.dim() != len(axes):
            raise ValueError(
                f"{op}: {name} must have shape [{', '.join(axes)}], got {value.dim()} axes {list(value.shape)}."
            )
        for axis, size in zip(axes, value.shape, strict=True):
            if axis.isdigit():
                if size != int(axis):
                    raise ValueError(f"{op}: {name} must have shape [{', '.join(axes)}], got {list(value.shape)}.")
            elif axis not in sizes:
                sizes[axis], owner[axis] = size, name
            elif size != sizes[axis]:
                raise ValueError(
                    f"{op}: {name} must have shape [{', '.join(axes)}] with {axis}={sizes[axis]} "
                    f"(from {owner[axis]}), got {list(value.shape)}."
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
    """Raise TypeError unless `value` is a string, and ValueError unless it is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        problem = ValueError if isinstance(value, str) else TypeError
        raise problem(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {shorten(value)}.")


def check_flag(op: str, name: str, value: Any) -> bool:
    """Return `value` as a bool if it is one, of Python or NumPy, else raise TypeError."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{op}: {name} must be True or False, got {shorten(value)}.")
    return bool(value)


def check_integer(op: str, name: str, value: Any, low: int, high: int = INT64_MAX, meaning: str = "") -> int:
    """Return `value` as an int if it is an integer in low..high, of Python or NumPy.

    While a graph is traced, the kernels check a bound that depends on a dynamic size: comparing it here would make the
    size static.

    Args:
        meaning: what the bound is, for the message.

    Raises:
        TypeError: not an integer; a bool is none.
        ValueError: out of range.
    """
    if not isinstance(value, (int, torch.SymInt)):
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}.")
        value = int(value)
    if isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got bool.")
    if torch.compiler.is_compiling() or isinstance(value, torch.SymInt) or isinstance(high, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        outside = statically_known_true(value < low) or statically_known_true(value > high)
    else:
        outside = value < low or value > high
    if outside:
        bounds = f"in {low}..{high} ({meaning})" if meaning else f"at least {low}" if value < low else f"at most {high}"
        raise ValueError(f"{op}: {name} must be {bounds}, got {shorten(value)}.")
    return value


def check_number(op: str, name: str, value: Any) -> float:
    """Return `value` as a float if it is a number, of Python or NumPy, that float32 holds; kernels compute in float32.

    Raises:
        TypeError: not a real number; a bool is none.
        ValueError: NaN, infinite, or of a magnitude that float32 makes infinite or 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}.")
    # Integers are compared before the conversion, which some of them overflow.
    size: Any = abs(value)
    if size != 0 and not FLOAT32_MIN <= size <= FLOAT32_MAX:
        raise ValueError(
            f"{op}: {name} must be a finite number that float32 holds (0, or {FLOAT32_MIN:.1e} to {FLOAT32_MAX:.1e} in "
            f"magnitude), got {shorten(value)}."
        )
    return float(value)


def shorten(value: Any) -> str:
    """Text that names a value in an error: numbers and strings as they are written, anything else by its type."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, (bool, str, numbers.Number, torch.SymInt)) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
