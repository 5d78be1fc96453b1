"""Sums of `attend_memory` in Triton, in a fixed order: over the splits of a row, and over places of `index`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .loads import loop_bound
from .tiles import MOST_SPLITS, padded_width


@triton.jit(do_not_specialize=["R", "splits"])
def attend_memory_merge(
    out, lse, parts, part_lse, R, splits,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, MOST_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sum the parts [B, splits, R, C] of one row in order, weighted by their lse where that is given."""
    program = tl.program_id(0).to(tl.int64)  # of B x R
    first = program // R * splits * R + program % R
    column = tl.arange(0, BLOCK_C)
    peak = 0.0
    if part_lse is not None:
        every = tl.arange(0, MOST_SPLITS)
        levels = tl.load(part_lse + first + every.to(tl.int64) * R, mask=every < splits, other=float("-inf"))
        peak = tl.max(levels)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp(levels - peak))
        blind = total == 0.0
        total = tl.where(blind, 1.0, total)
        tl.store(lse + program, tl.where(blind, float("-inf"), peak + tl.log(total)))
    merged = tl.zeros([BLOCK_C], tl.float32)
    for begin in range(0, loop_bound(splits), BLOCK_S):
        split = begin + tl.arange(0, BLOCK_S)
        place = first + split.to(tl.int64) * R
        mask = (split < splits)[:, None] & (column < WIDTH)[None, :]
        part = tl.load(parts + place[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        if part_lse is not None:
            level = tl.load(part_lse + place, mask=split < splits, other=float("-inf"))
            part *= (tl.exp(level - peak) / total)[:, None]
        merged += tl.sum(part, axis=0)
    tl.store(out + program * WIDTH + column, merged.to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit(do_not_specialize=["M", "K"])
def attend_memory_sum_places(
    total, values, order, begins, M, K, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum values [B, K, C] into rows [B, M, C]: a row gets those at its places order[begins[row]:begins[row + 1]]."""
    tiles = tl.cdiv(M, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(begins + batch * (M + 1) + row, mask=row < M, other=0)
    count = tl.load(begins + batch * (M + 1) + row + 1, mask=row < M, other=0) - begin
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for turn in range(0, loop_bound(tl.max(count)), 1):
        place = tl.load(order + batch * K + begin + turn, mask=turn < count, other=0) + batch * K
        mask = (turn < count)[:, None] & (column < WIDTH)[None, :]
        result += tl.load(values + place[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    mask = (row < M)[:, None] & (column < WIDTH)[None, :]
    offset = (batch * M + row)[:, None] * WIDTH + column[None, :]
    tl.store(total + offset, result.to(total.dtype.element_ty), mask=mask)


def merge_splits(out: Tensor, lse: Tensor | None, parts: Tensor, part_lse: Tensor | None) -> None:
    """Write out [B, R, C] and lse [B, R] from parts [B, splits, R, C]: weighted by their lse, or added without one."""
    batch, splits, rows, width = parts.shape
    attend_memory_merge[(batch * rows,)](
        out, lse, parts, part_lse, rows, splits,
        WIDTH=width, BLOCK_C=padded_width(width), MOST_SPLITS=MOST_SPLITS, BLOCK_S=8, num_warps=4,
    )  # fmt: skip


def sum_places(values: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Add values [B, K, C] float32 into [B, rows, C] of `dtype` at `index`; an index outside is dropped."""
    batch, keys, width = values.shape
    total = values.new_empty((batch, rows, width), dtype=dtype)
    if total.numel() == 0:
        return total
    index = index.contiguous()
    inside = (index >= 0) & (index < rows)
    ordered, order = torch.where(inside, index, rows).sort(dim=1, stable=True)
    bounds = torch.arange(rows + 1, device=index.device).expand(batch, -1).contiguous()
    begins = torch.searchsorted(ordered, bounds)
    block_m, block_d = (64, 1) if width == 1 else (16, 64)
    attend_memory_sum_places[batch * triton.cdiv(rows, block_m), triton.cdiv(width, block_d)](
        total, values, order, begins, rows, keys, WIDTH=width, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4
    )
    return total
