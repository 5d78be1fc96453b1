"""`bridge-stg tune`: checks what the user asked for, then has `triton_kernels/common/tuning.py` time it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import BridgeSTGError
from ...files import ensure_writable_folder
from .triton import triton_obstacle


def tune_op(
    op: str, out: Path, shapes: list[str] | None = None, report: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, Any]]:
    """Tune `op` for shapes "segments,tokens,width,queries" (None: a usual set) and merge the result into `out`.

    Raises:
        BridgeSTGError: Triton cannot run, no GPU, an unknown op, or a shape that is not four positive integers.
    """
    obstacle = triton_obstacle()
    if obstacle is not None:
        raise BridgeSTGError(f"tune cannot run: {obstacle}.")
    kernels = importlib.import_module("bridge_stg.triton_kernels.common.tuning")
    sizes = tuple(_shape(text) for text in shapes) if shapes else kernels.DEFAULT_SHAPES
    ensure_writable_folder(out.parent)
    try:
        table: dict[str, dict[str, Any]] = kernels.tune(op, out, sizes, report)
    except ValueError as error:  # an unknown op, no GPU, a table that is not JSON
        raise BridgeSTGError(str(error)) from error
    return table


def _shape(text: str) -> tuple[int, int, int, int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise BridgeSTGError(f"--shape must be segments,tokens,width,queries, four positive integers, got {text!r}.")
    segments, tokens, width, queries = (int(part) for part in parts)
    return segments, tokens, width, queries
