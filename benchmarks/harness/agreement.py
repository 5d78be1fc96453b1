"""Who earns a time: outputs and gradients that agree with the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Disagreement(Exception):
    """Outputs that are wrong; the message says how."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; infinity where `found` is not finite but `expected` is."""
    a, b = found.detach().double(), expected.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b)
    if not bool(difference.isfinite().all()):
        return float("inf")
    norm = float(torch.where(b.isfinite(), b, 0.0).norm())
    return float(difference.norm()) / max(norm, 1e-30)


def same_form(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Why the outputs cannot even be compared, or None."""
    if len(found) != len(expected):
        return f"{len(found)} outputs in place of {len(expected)}"
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape:
            return f"output {i} has shape {list(a.shape)} in place of {list(b.shape)}"
    return None


def gradient_disagreement(
    found: Sequence[Tensor | None], expected: Sequence[Tensor | None], names: Sequence[str], tolerance: float
) -> str | None:
    """Why the gradients of the leaves are wrong, or None."""
    for name, a, b in zip(names, found, expected, strict=True):
        if a is None or b is None:
            if a is not b:
                return f"gradient of {name} is missing" if a is None else f"gradient of {name} is not expected"
            continue
        error = relative_error(a, b)
        if not error <= tolerance:
            return f"gradient of {name} has relative error {error:.1e}, allowed {tolerance:.0e}"
    return None
