"""Times candidate configurations of an op on the current GPU, and writes the best to a tuned table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..prune_tokens import dense as prune_tokens
from ..prune_tokens import varlen as prune_tokens_varlen
from ..prune_tokens.records import ScoreOptions
from .configs import FUSED_LENGTH, capability, choose_config, overruled, tuned_key

Shape = tuple[int, int, int, int]

# Segments, tokens of each, width, queries. They are frames of a clip before a language model or after a vision encoder.
DEFAULT_SHAPES: tuple[Shape, ...] = (
    (16, 196, 256, 16),
    (64, 576, 1024, 16),
    (128, 256, 3584, 16),
    (512, 576, 1024, 16),
    (2048, 1024, 3584, 64),
    (1, 65536, 1024, 16),
)
DTYPES = (torch.bfloat16, torch.float16)


def _prune_tokens(tokens: Tensor, queries: Tensor) -> Callable[[], Any]:
    keep = max(1, tokens.shape[1] // 4)
    return lambda: prune_tokens.forward(tokens, queries, keep, ScoreOptions(), None, False)


def _prune_tokens_varlen(tokens: Tensor, queries: Tensor) -> Callable[[], Any]:
    segments, length, width = tokens.shape
    rows = tokens.view(-1, width)
    cu_seqlens = torch.arange(segments + 1, device=tokens.device, dtype=torch.int32) * length
    keep = max(1, length // 4)
    budget = torch.full((), keep, device=tokens.device)
    return lambda: prune_tokens_varlen.forward(
        rows, cu_seqlens, queries, budget, "per_segment", segments * keep, ScoreOptions()
    )


TUNABLE = {"prune_tokens": _prune_tokens, "prune_tokens_varlen": _prune_tokens_varlen}


def candidates(op: str, length: int) -> Iterator[dict[str, Any]]:
    """Overrides of the configuration that are worth timing for segments of `length` tokens."""
    paths = (False, True) if op == "prune_tokens" and length <= FUSED_LENGTH else (False,)
    for block_n, block_d, warps, stages, fused in itertools.product(
        (32, 64, 128), (32, 64, 128), (4, 8), (2, 3), paths
    ):
        yield {"block_n": block_n, "block_d": block_d, "num_warps": warps, "num_stages": stages, "fused": fused}


def tune(
    op: str, path: Path, shapes: tuple[Shape, ...] = DEFAULT_SHAPES, report: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, Any]]:
    """Find the best configuration of each shape and dtype, merge it into the table at `path`, and return the table.

    Args:
        op: one of `TUNABLE`.
        shapes: (segments, tokens of each, width, queries).
        report: called with a line after each shape.

    Raises:
        ValueError: an unknown op, or no GPU.
    """
    if op not in TUNABLE:
        raise ValueError(f"tune knows {' and '.join(TUNABLE)}, got {op!r}.")
    if not torch.cuda.is_available():
        raise ValueError(f"tune times the kernels of {op} on a GPU, and there is none here.")
    table: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    device = torch.device("cuda", torch.cuda.current_device())
    for (segments, length, width, query_count), dtype in itertools.product(shapes, DTYPES):
        tokens = torch.randn(segments, length, width, device=device, dtype=dtype)
        queries = torch.randn(segments, query_count, width, device=device, dtype=dtype)
        call = TUNABLE[op](tokens, queries)
        default = _time(call)
        best, chosen = default, None
        for overrides in candidates(op, length):
            with overruled(overrides):
                taken = _time(call)
            if taken is not None and (best is None or taken < best):
                best, chosen = taken, overrides
        key = tuned_key(op, capability(device), dtype, segments, length, width, query_count)
        if chosen is not None:
            table[key] = chosen
            path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        used = chosen or asdict(choose_config(op, tokens, queries, segments, length))
        report(f"{key}: {_milliseconds(default)} -> {_milliseconds(best)} ({used})")
    return table


def _time(call: Callable[[], Any]) -> float | None:
    """Median time of a call in milliseconds; None where the configuration does not fit the GPU."""
    try:
        return triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")
    except (triton.OutOfResources, triton.CompilationError):
        return None


def _milliseconds(time: float | None) -> str:
    return "does not fit" if time is None else f"{time:.4f} ms"
