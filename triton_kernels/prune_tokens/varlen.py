"""`prune_tokens_varlen` in Triton: bounds, score, select, offsets, pack. Five launches, no host sync.

The launchers take and return what the op's reference does; tokens, queries and the gradient of the packed tokens may
have any strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import choose_config
from ..common.nvtx import nvtx_range
from .backward import launch_backward
from .policies import launch_selection
from .records import ScoreOptions
from .scores import launch_scores
from .segments import locate, safe_offsets, segment_strides, tile_count
from .selection import copy_rows

PACK_ROWS = 32
PACK_WIDTH = 64
SCAN_BLOCK = 1024

backward = nvtx_range("bridge_stg.prune_tokens_varlen.backward")(launch_backward)


@nvtx_range("bridge_stg.prune_tokens_varlen")
def forward(
    tokens: Tensor,
    cu_seqlens: Tensor,
    queries: Tensor,
    budget: Tensor,
    policy: str,
    capacity: int,
    options: ScoreOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(packed [capacity, D], index [capacity], score [capacity], cu_seqlens_out [S + 1], count []); see `reference`."""
    rows, width = tokens.shape
    segments = queries.shape[0]
    config = choose_config("prune_tokens_varlen", tokens, queries, segments, max(rows // segments, 1))
    bounds, _ = safe_offsets(cu_seqlens, rows)
    scores = launch_scores(tokens, queries, config, options, bounds=bounds)
    place, counts = launch_selection(scores, bounds, budget, policy)
    starts = bounds.new_empty(segments)
    cu_seqlens_out = cu_seqlens.new_empty(cu_seqlens.shape)
    count = bounds.new_empty(())
    offsets_kernel[(1,)](
        bounds,
        place,
        counts,
        starts,
        cu_seqlens_out,
        count,
        segments,
        capacity,
        CLIP=policy == "per_clip",
        BLOCK=SCAN_BLOCK,
        num_warps=4,
    )
    packed = tokens.new_empty(capacity, width)
    index = tokens.new_empty(capacity, dtype=torch.int64)
    score = tokens.new_empty(capacity, dtype=torch.float32)
    tiles = tile_count(rows, segments, PACK_ROWS, packed=True)
    pack_kernel[(tiles + triton.cdiv(capacity, PACK_ROWS),)](
        tokens,
        scores,
        bounds,
        place,
        starts,
        count,
        packed,
        index,
        score,
        segments,
        rows,
        capacity,
        tiles,
        segment_strides(tokens),
        WIDTH=width,
        BLOCK_N=PACK_ROWS,
        BLOCK_D=PACK_WIDTH,
        num_warps=4,
    )
    return packed, index, score, cu_seqlens_out, count


@triton.jit(do_not_specialize=["segments", "capacity"])
def offsets_kernel(
    bounds, place, counts, starts, cu_seqlens_out, count, segments, capacity, CLIP: tl.constexpr, BLOCK: tl.constexpr
):
    """One program writes where the kept rows of each segment begin, and how many rows are kept in all.

    Args:
        bounds, place, counts: of `safe_offsets` and `select_rows_kernel`.
        starts: [S] int64, written: first slot of each segment. With CLIP all are 0, since places then count from the
            first segment.
        cu_seqlens_out: [S + 1], written: the first slots, cut off at the capacity.
        count: [] int64, written.
    """
    end = tl.load(bounds + segments)
    total = end * 0
    if CLIP:
        total += tl.load(counts)
    first = segments * 0
    while first < segments:
        s = first + tl.arange(0, BLOCK)
        inside = s < segments
        if CLIP:
            row = tl.load(bounds + s, mask=inside, other=0)
            code = tl.load(place + row, mask=inside & (row < end), other=0)
            before = tl.where(code < 0, -1 - code, code).to(tl.int64)
            before = tl.where(row < end, before, total)
            tl.store(starts + s, before * 0, mask=inside)
        else:
            size = tl.load(counts + s, mask=inside, other=0).to(tl.int64)
            before = total + tl.cumsum(size, 0) - size
            total += tl.sum(size, 0)
            tl.store(starts + s, before, mask=inside)
        cut = tl.minimum(before, capacity)
        tl.store(cu_seqlens_out + s, cut.to(cu_seqlens_out.dtype.element_ty), mask=inside)
        first += BLOCK
    tl.store(cu_seqlens_out + segments, tl.minimum(total, capacity).to(cu_seqlens_out.dtype.element_ty))
    tl.store(count, total)


@triton.jit(do_not_specialize=["segments", "rows", "capacity", "tiles"])
def pack_kernel(
    tokens,
    scores,
    bounds,
    place,
    starts,
    count,
    packed,
    index,
    score,
    segments,
    rows,
    capacity,
    tiles,
    token_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copies the kept rows of one tile, with index and score, to their slots; programs past `tiles` clear the rest."""
    program = tl.program_id(0)
    if program < tiles:
        segment, start, size, tile = locate(program, bounds, segments, rows, BLOCK_N, True)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row = start + n
        code = tl.load(place + row, mask=n < size, other=-1)
        slot = tl.load(starts + segment) + code
        kept = (code >= 0) & (slot < capacity)
        tl.store(index + slot, row, mask=kept)
        tl.store(score + slot, tl.load(scores + row, mask=kept, other=0.0), mask=kept)
        copy_rows(tokens, packed, row, slot, kept, token_stride, WIDTH, BLOCK_D)
    else:
        slot = (program - tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        empty = (slot >= tl.load(count)) & (slot < capacity)
        tl.store(index + slot, slot * 0 - 1, mask=empty)
        tl.store(score + slot, tl.zeros([BLOCK_N], tl.float32), mask=empty)
        for step in range(0, WIDTH, BLOCK_D):
            d = step + tl.arange(0, BLOCK_D)
            nothing = tl.zeros([BLOCK_N, BLOCK_D], packed.dtype.element_ty)
            tl.store(packed + slot[:, None] * WIDTH + d[None, :], nothing, mask=empty[:, None] & (d < WIDTH)[None, :])
