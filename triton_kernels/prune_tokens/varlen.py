"""`prune_tokens_varlen` in Triton: bounds, score, select, offsets, pack. Five launches, no host sync.

The launchers take and return what the op's reference does; tokens, queries and the gradient of the packed tokens may
have any strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import choose_config, upcasts
from ..common.nvtx import nvtx_range
from .backward import Rows, score_gradients
from .scores import fold_mean, score_kernel
from .segments import bounds_kernel, locate
from .selection import copy_rows, largest_key_of_many, load_keys, place_picks

PACK_ROWS = 32
PACK_WIDTH = 64
SCAN_BLOCK = 1024


@nvtx_range("bridge_stg.prune_tokens_varlen")
def forward(
    tokens: Tensor,
    cu_seqlens: Tensor,
    queries: Tensor,
    budget: Tensor,
    policy: str,
    capacity: int,
    scoring: str,
    reduce: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(packed [capacity, D], index [capacity], score [capacity], cu_seqlens_out [S + 1], count []); see `reference`."""
    rows, width = tokens.shape
    segments = queries.shape[0]
    config = choose_config("prune_tokens_varlen", tokens, queries, segments, max(rows // segments, 1))
    upcast, queries = upcasts(tokens, queries), fold_mean(queries, reduce)
    packed = tokens.new_empty(capacity, width)
    index = tokens.new_empty(capacity, dtype=torch.int64)
    score = tokens.new_empty(capacity, dtype=torch.float32)
    cu_seqlens_out = cu_seqlens.new_empty(cu_seqlens.shape)
    count = tokens.new_empty((), dtype=torch.int64)
    scores = tokens.new_empty(rows, dtype=torch.float32)
    place = tokens.new_empty(rows, dtype=torch.int32)
    groups = 1 if policy == "per_clip" else segments
    counts = tokens.new_empty(groups, dtype=torch.int32)
    starts = tokens.new_empty(segments, dtype=torch.int64)
    mass = tokens.new_empty(rows, dtype=torch.int64) if policy == "top_p" else None
    bounds, _ = _follow(cu_seqlens, rows, None)
    score_kernel[(rows // config.block_n + segments,)](
        tokens,
        queries,
        None,
        bounds,
        scores,
        segments,
        rows,
        queries.shape[1],
        scale,
        0,
        *tokens.stride(),
        *queries.stride(),
        0,
        0,
        WIDTH=width,
        BLOCK_N=config.block_n,
        BLOCK_Q=config.block_q,
        BLOCK_D=config.block_d,
        UPCAST=upcast,
        COSINE=scoring == "cosine",
        REDUCE=reduce,
        PACKED=True,
        **config.launch(),
    )
    long = rows > 2048 * groups
    select_rows_kernel[(groups,)](
        scores,
        mass,
        bounds,
        budget,
        place,
        counts,
        segments,
        budget.stride(0) if budget.dim() else 0,
        POLICY=policy,
        BLOCK=4096 if long else 1024,
        num_warps=16 if long else 8,
    )
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
    tiles = rows // PACK_ROWS + segments
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
        *tokens.stride(),
        WIDTH=width,
        BLOCK_N=PACK_ROWS,
        BLOCK_D=PACK_WIDTH,
        num_warps=4,
    )
    return packed, index, score, cu_seqlens_out, count


def _follow(cu_seqlens: Tensor, rows: int, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Safe offsets [S + 1] int64 of the segments among the rows and, given the kept rows, among those."""
    bounds = cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)
    offsets = None if index is None else torch.empty_like(bounds)
    bounds_kernel[(1,)](
        cu_seqlens,
        bounds,
        index,
        offsets,
        cu_seqlens.shape[0] - 1,
        rows,
        0 if index is None else index.shape[0],
        cu_seqlens.stride(0),
        BLOCK=256,
        num_warps=4,
    )
    return bounds, offsets


@triton.jit
def mass_from(mass, scores, start, size, threshold, BLOCK: tl.constexpr):
    """Sum of the masses of a segment's tokens whose key is at least `threshold`."""
    total = tl.zeros([BLOCK], tl.int64)
    first = size * 0
    while first < size:
        n = first + tl.arange(0, BLOCK)
        _score, key = load_keys(scores + start, None, 0, n, size)
        weight = tl.load(mass + start + n, mask=n < size, other=0)
        total += tl.where(key >= threshold, weight, 0)
        first += BLOCK
    return tl.sum(total, 0)


@triton.jit
def share_threshold(mass, scores, start, size, share, BLOCK: tl.constexpr):
    """Key of the last token that the top-p rule keeps, and how many of the tokens of that key it keeps.

    A token stays when the tokens before it hold less than `share` of the mass. Masses are softmax numerators in
    units of 2^-32, so that their sums are exact, and the same in any order.
    """
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    first = size * 0
    while first < size:
        n = first + tl.arange(0, BLOCK)
        value = tl.load(scores + start + n, mask=n < size, other=float("-inf"))
        best = tl.maximum(best, tl.where(value != value, float("-inf"), value))
        first += BLOCK
    top = tl.max(best, 0)
    first = size * 0
    while first < size:
        n = first + tl.arange(0, BLOCK)
        value = tl.load(scores + start + n, mask=n < size, other=0.0)
        part = tl.where(value == top, 1.0, tl.exp((value - top).to(tl.float64)))
        part = tl.where(part == part, part, 0.0)
        weight = tl.floor(part * 4294967296.0 + 0.5).to(tl.int64)
        tl.store(mass + start + n, weight, mask=n < size)
        first += BLOCK
    tl.debug_barrier()  # the masses may be read by other threads than wrote them
    zero = (size * 0).to(tl.uint32)
    limit = share * mass_from(mass, scores, start, size, zero, BLOCK).to(tl.float64)
    wanted = tl.where(limit > 0.0, tl.ceil(limit), 0.0).to(tl.int64)  # 0 too where the share is NaN
    threshold = zero
    bit = zero + 0x80000000
    for _bit in range(32):
        enough = mass_from(mass, scores, start, size, threshold | bit, BLOCK) >= wanted
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    threshold = tl.maximum(threshold, zero + 1)  # never an unmasked NaN, whose key is 1
    above = mass_from(mass, scores, start, size, threshold + 1, BLOCK)
    each = tl.zeros([BLOCK], tl.int64)
    first = size * 0
    while first < size:
        n = first + tl.arange(0, BLOCK)
        _score, key = load_keys(scores + start, None, 0, n, size)
        weight = tl.load(mass + start + n, mask=n < size, other=0)
        each = tl.maximum(each, tl.where(key == threshold, weight, 0))
        first += BLOCK
    one = tl.maximum(tl.max(each, 0), 1)
    ties = (tl.maximum(wanted - above, 0) + one - 1) // one
    none = (threshold == 1) | (threshold == 0xFFFFFFFF)
    return threshold, tl.where(none, 0, tl.minimum(ties, size)).to(tl.int32)


@triton.jit(do_not_specialize=["segments", "budget_stride"])
def select_rows_kernel(
    scores,
    mass,
    bounds,
    budget,
    place,
    counts,
    segments,
    budget_stride,
    POLICY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a segment, or one for all with "per_clip": which rows its policy keeps.

    Args:
        scores: [R] float32.
        mass: [R] int64 scratch of "top_p", else None.
        budget: [] (stride 0) or [S].
        place: [R] int32, written: how many rows the program keeps before this one, p, as p if kept, else -1 - p.
        counts: [programs] int32, written: how many rows each keeps.
    """
    program = tl.program_id(0)
    start = tl.load(bounds + program)
    end = tl.load(bounds + (segments if POLICY == "per_clip" else program + 1))
    size = (end - start).to(tl.int32)
    limit = tl.load(budget + program.to(tl.int64) * budget_stride)
    wanted = size * 0
    threshold = wanted.to(tl.uint32)
    if POLICY == "top_p":
        threshold, wanted = share_threshold(mass, scores, start, size, limit.to(tl.float64), BLOCK)
    elif POLICY != "threshold":
        fits = tl.minimum(tl.maximum(limit.to(tl.int64), 0), size.to(tl.int64)).to(tl.int32)
        threshold, wanted = largest_key_of_many(scores + start, None, 0, size, fits, BLOCK)
    picks = size * 0
    first = size * 0
    while first < size:
        n = first + tl.arange(0, BLOCK)
        value, key = load_keys(scores + start, None, 0, n, size)
        if POLICY == "threshold":
            picked = (n < size) & (value.to(tl.float64) >= limit.to(tl.float64))
            count = tl.cumsum(picked.to(tl.int32), 0)
        else:
            picked, count = place_picks(key, threshold, wanted)
            picked = picked & (n < size)
            wanted = tl.maximum(wanted - tl.sum(((key == threshold) & (n < size)).to(tl.int32), 0), 0)
        code = picks + tl.where(picked, count - 1, 0)
        code = tl.where(picked, code, -1 - (picks + count))
        tl.store(place + start + n, code, mask=n < size)
        picks += tl.sum(picked.to(tl.int32), 0)
        first += BLOCK
    tl.store(counts + program, picks)


@triton.jit(do_not_specialize=["segments", "capacity"])
def offsets_kernel(
    bounds,
    place,
    counts,
    starts,
    cu_seqlens_out,
    count,
    segments,
    capacity,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: where each segment's kept rows begin, `starts` [S] int64, the same cut off, and their number.

    With CLIP the places of all rows count from the first segment, and all `starts` are 0.
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
    token_stride_n,
    token_stride_d,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Moves the kept rows of one tile, with index and score, to their slots; programs past `tiles` fill empty slots."""
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
        copy_rows(tokens, packed, row, slot, kept, token_stride_n, token_stride_d, WIDTH, BLOCK_D)
    else:
        slot = (program - tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        empty = (slot >= tl.load(count)) & (slot < capacity)
        tl.store(index + slot, slot * 0 - 1, mask=empty)
        tl.store(score + slot, tl.zeros([BLOCK_N], tl.float32), mask=empty)
        for step in range(0, WIDTH, BLOCK_D):
            d = step + tl.arange(0, BLOCK_D)
            nothing = tl.zeros([BLOCK_N, BLOCK_D], packed.dtype.element_ty)
            tl.store(packed + slot[:, None] * WIDTH + d[None, :], nothing, mask=empty[:, None] & (d < WIDTH)[None, :])


@nvtx_range("bridge_stg.prune_tokens_varlen.backward")
def backward(
    grad_packed: Tensor | None,
    grad_score: Tensor | None,
    packed: Tensor,
    index: Tensor,
    cu_seqlens: Tensor,
    queries: Tensor,
    row_count: int,
    scoring: str,
    reduce: str,
    scale: float,
    need_tokens: bool,
    need_queries: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [R, D] and queries [S, Q, D], empty where not needed; see `reference_backward`."""
    capacity = packed.shape[0]
    segments = queries.shape[0]
    bounds, offsets = _follow(cu_seqlens, row_count, index)
    return score_gradients(
        Rows(packed, None, grad_score, offsets, segments, capacity),
        queries,
        grad_packed,
        index,
        bounds,
        capacity,
        row_count,
        scoring,
        reduce,
        scale,
        False,
        need_tokens,
        need_queries,
        packed,
    )
