"""Compiles the Triton kernels of the target shapes into the cache, in several processes at once."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bridge_stg import warmup

from .events import Event, emit


def shapes(device: str) -> Iterator[dict[str, Any]]:
    """What `bridge_stg.warmup` takes, one call each: the targets' shapes in every dtype, small ones on the CPU."""
    segments, tokens, width, batch = (64, 576, 1024, 16) if device == "cuda" else (2, 32, 64, 2)
    keep = tokens // 4
    prune = {"segments": segments, "width": width, "queries": 16}
    attend = {"op": "attend_memory", "rows": 128, "keys": 8192 if device == "cuda" else 64, "width": 256}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield {"op": "prune_tokens", "tokens": tokens, "keep": keep, "dtype": dtype, **prune}
        packed = {"tokens": segments * tokens, "budget": keep, "capacity": segments * keep}
        yield {"op": "prune_tokens_varlen", "dtype": dtype, **packed, **prune}
        yield {"batch": 1, "dtype": dtype, **attend}
        yield {"batch": batch, "dtype": dtype, **attend}


def _compile(shape: dict[str, Any], device: str) -> str | None:
    """Why the shape could not be warmed up, or None; runs in a process whose CUDA context ends with it."""
    try:
        warmup([shape], device)
    except Exception as error:  # reported by the parent; the others go on
        return f"{type(error).__name__}: {error}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.warm", description=__doc__)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    todo = list(shapes(options.device))
    failed = False
    # Forked before CUDA is touched: the children have torch imported already.
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        waiting = [pool.apply_async(_compile, (shape, options.device)) for shape in todo]
        for shape, result in zip(todo, waiting, strict=True):
            reason = result.get()
            failed |= reason is not None
            name = ", ".join(str(value) for value in shape.values())
            emit(Event(name, "failed" if reason else "ok", reason or ""))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
