"""The configuration that the kernels of a call run with: rules on shapes and dtypes, overruled by tuned tables.

A tuned table is JSON, `{key: {"block_n": 64, ...}}`, with the keys of `tuned_key`. The package ships `tuned/<op>.json`;
`bridge-stg tune` writes a table to a file of the user's, which BRIDGE_STG_TUNED names.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

# An H100, for tensors that are not on a GPU (tests).
DEFAULT_MULTIPROCESSORS = 132
DEFAULT_CAPABILITY = (9, 0)

# Longest segment that one program scores and selects by itself, and how many keys a program may hold at once.
FUSED_LENGTH = 1024
SELECT_SPANS = (256, 1024, 4096)

_OVERRULED: dict[str, Any] = {}


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of the kernels of one call.

    Attributes:
        block_n: tokens of a tile.
        block_q: queries of a tile; more queries go in several rounds.
        block_d: width of a step along the tokens.
        num_warps, num_stages: as in Triton.
        registers: most that a thread may use. Without this limit ptxas spills a value or two for one more warp.
        fused: whether one program scores, selects and copies a whole segment, in one launch.
    """

    block_n: int
    block_q: int
    block_d: int
    num_warps: int = 4
    num_stages: int = 3
    registers: int = 128
    fused: bool = False


def choose_config(op: str, tokens: Tensor, queries: Tensor, segments: int, length: int) -> Config:
    """The configuration of a call of `op`: from the tuned tables, or by rule.

    Args:
        segments: number of segments.
        length: tokens of each segment; the mean for packed ones.
    """
    width, query_count = tokens.shape[-1], queries.shape[1]
    fused = op == "prune_tokens" and length <= FUSED_LENGTH and segments >= multiprocessors(tokens.device)
    config = replace(score_config(tokens, queries), fused=fused)
    key = tuned_key(op, capability(tokens.device), tokens.dtype, segments, length, width, query_count)
    overrides = tuned_table(op, os.environ.get("BRIDGE_STG_TUNED")).get(key, {})
    config = replace(config, **(overrides | _OVERRULED))
    return replace(config, fused=config.fused and length <= FUSED_LENGTH)


@contextmanager
def overruled(fields: Mapping[str, Any]) -> Iterator[None]:
    """A block in which every configuration has these fields; tuning uses it, and tests of what tuning may find."""
    before = dict(_OVERRULED)
    _OVERRULED.update(fields)
    try:
        yield
    finally:
        _OVERRULED.clear()
        _OVERRULED.update(before)


def score_config(tokens: Tensor, queries: Tensor) -> Config:
    """The configuration that the rules give. The kernels compiled with it do not spill on sm_80, sm_90 or sm_100."""
    few = queries.shape[1] <= 16
    registers = 168 if few else 255
    if upcasts(tokens, queries):
        # Two stages of unaligned float32 keep a pointer for each element, and spill.
        return Config(32, 16 if few else 32, 32, num_warps=4, num_stages=1, registers=registers)
    step = 64 if few and aligned(tokens, queries) else 32
    return Config(64, 16 if few else 64, step, num_warps=8, num_stages=3, registers=registers)


def gradient_config(kept: Tensor, queries: Tensor) -> Config:
    """The configuration of the backward kernels; no tuned table overrules it."""
    few = queries.shape[1] <= 16
    registers = 168 if few else 255
    # A product tile, its key and its winner are alive at once: 64 rows spill, and 32 in float32.
    if upcasts(kept, queries):
        return Config(16, 16 if few else 32, 32, num_warps=4, num_stages=1, registers=registers)
    return Config(32, 16 if few else 64, 32, num_warps=8, num_stages=3, registers=registers)


def product_constants(config: Config, x: Tensor, queries: Tensor) -> dict[str, int]:
    """Constants and launch options of a kernel that takes products of the rows `x` with their queries."""
    return {
        "WIDTH": x.shape[-1],
        "BLOCK_N": config.block_n,
        "BLOCK_Q": config.block_q,
        "BLOCK_D": config.block_d,
        "UPCAST": upcasts(x, queries),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.registers,
    }


def aligned(*tensors: Tensor) -> bool:
    """Whether Triton may read 16 bytes at once: it looks at pointers, and whether strides are multiples of 16."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(stride % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def upcasts(tokens: Tensor, queries: Tensor) -> bool:
    """Whether products are taken in float32: of mixed dtypes, of float32, and in the interpreter.

    The interpreter's `tl.dot` is wrong for bfloat16.
    """
    return tokens.dtype != queries.dtype or tokens.dtype == torch.float32 or tokens.device.type == "cpu"


def select_span(length: int) -> int | None:
    """Number of keys that a program holds at once to select from `length`; None where they do not fit."""
    return next((span for span in SELECT_SPANS if length <= span), None)


def tuned_key(
    op: str, sm: tuple[int, int], dtype: torch.dtype, segments: int, length: int, width: int, query_count: int
) -> str:
    """Key of the tuned tables: op, architecture, dtype and the shape, each size rounded up to a power of two."""
    sizes = (("B", segments), ("N", length), ("D", width), ("Q", query_count))
    shape = "-".join(f"{name}{triton.next_power_of_2(max(size, 1))}" for name, size in sizes)
    return f"{op}/sm_{sm[0]}{sm[1]}/{str(dtype).removeprefix('torch.')}/{shape}"


@functools.cache
def tuned_table(op: str, user_file: str | None) -> dict[str, dict[str, Any]]:
    """The shipped table of `op`, overruled by the user's file."""
    table: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "tuned" / f"{op}.json").read_text())
    if user_file:
        table = table | json.loads(Path(user_file).read_text())
    return table


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else DEFAULT_CAPABILITY
