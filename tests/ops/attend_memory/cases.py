"""Calls of `attend_memory` and how far a backend is from float64, against plain PyTorch in the same dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge_stg.ops import attend_memory


class Shape(NamedTuple):
    """B, R, M, C and which options a call has."""

    clips: int
    rows: int
    keys: int
    width: int
    options: str = ""  # of "position bias mask"


SHAPES = (
    Shape(2, 5, 7, 4, "position bias mask"),
    Shape(1, 1, 1, 1),
    Shape(3, 1, 65, 19, "mask"),
    Shape(2, 32, 64, 256),
    Shape(2, 33, 300, 70, "position bias mask"),
    Shape(1, 128, 2100, 64, "bias"),  # several units of keys
    Shape(1, 70, 2100, 1024, "position mask"),  # and of rows, of a width that shares places in a cache
    Shape(1, 300, 40, 512, "bias"),
)


def draw(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves (query, memory, position, bias) in float64, exact in `dtype`, and the keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    clips, rows, keys, width, options = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).double()

    leaves = [normal(clips, rows, width), normal(clips, keys, width), normal(clips, keys, width), normal(clips, keys)]
    arguments: dict[str, Any] = {"scale": width**-0.5, "return_mass": True}
    if "mask" in options:
        arguments["key_mask"] = torch.rand(clips, keys, generator=generator) > 0.3
        arguments["key_mask"][-1:, : keys // 2] = False
    return leaves, arguments


def attend(
    shape: Shape, leaves: list[Tensor], arguments: dict[str, Any], dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """out, lse, mass and the gradients of a fixed loss in query, memory, and in position and bias where used."""
    inputs = [x.to(dtype).requires_grad_() for x in leaves]
    position, bias = (
        x if name in shape.options else None for name, x in zip(("position", "bias"), inputs[2:], strict=True)
    )
    out, lse, mass = attend_memory(inputs[0], inputs[1], position=position, bias=bias, backend=backend, **arguments)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse)]
    seen = lse.masked_fill(lse.isneginf(), 0.0)
    loss = (out.double() * weights[0]).sum() + (seen.double() * weights[1]).sum()
    used = [x for x in (inputs[0], inputs[1], position, bias) if x is not None]
    return [x.detach() for x in (out, lse, mass, *torch.autograd.grad(loss, used))]


def relative(found: Tensor, wanted: Tensor) -> float:
    hidden = wanted.isneginf()
    assert torch.equal(hidden, found.isneginf())
    difference = (found.double() - wanted).masked_fill(hidden, 0.0)
    return float(difference.norm() / wanted.masked_fill(hidden, 0.0).norm().clamp(min=1e-30))


def check(shape: Shape, dtype: torch.dtype = torch.float32, backend: str = "native") -> None:
    """Error against float64 at most twice that of plain PyTorch, or a few roundings."""
    leaves, arguments = draw(shape, dtype)
    exact = attend(shape, leaves, arguments, torch.float64, "reference")
    theirs, ours = (attend(shape, leaves, arguments, dtype, name) for name in ("reference", backend))
    for name, wanted, plain, found in zip(
        ("out", "lse", "mass", "d_query", "d_memory", "d_position", "d_bias"), exact, theirs, ours, strict=False
    ):
        assert found.dtype == plain.dtype and found.shape == plain.shape
        bound = 2 * relative(plain, wanted) + 4 * torch.finfo(torch.float32).eps
        assert relative(found, wanted) <= bound, (shape, dtype, name, relative(found, wanted), bound)


def check_cases() -> None:
    for shape in SHAPES:
        check(shape)
    for dtype in (torch.bfloat16, torch.float16):
        check(Shape(2, 24, 150, 72, "position bias mask"), dtype)


if __name__ == "__main__":
    check_cases()
