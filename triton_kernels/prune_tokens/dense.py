"""`prune_tokens` in Triton: one launch where segments fill the machine, else score, select, copy. No host sync.

The launchers take and return what the op's reference does. Tokens, queries, mask and the gradient of the kept tokens
may have any strides; only a strided gradient of scores is copied, [B, k] or [B, N] floats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import choose_config, product_constants, select_span
from ..common.nvtx import nvtx_range
from .backward import launch_backward
from .records import ScoreOptions
from .scores import fold_mean, launch_scores, score_rows
from .selection import copy_rows, largest_key, largest_key_of_many, load_keys, place_picks

LONG_BLOCK = 4096
COPY_ROWS = 32
COPY_WIDTH = 64

backward = nvtx_range("bridge_stg.prune_tokens.backward")(launch_backward)


@nvtx_range("bridge_stg.prune_tokens")
def forward(
    tokens: Tensor, queries: Tensor, keep: int, options: ScoreOptions, mask: Tensor | None, return_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kept [B, k, D], index [B, k], score [B, k], scores [B, N] or empty); see the op's `reference`."""
    batch, length, width = tokens.shape
    if not 1 <= keep <= length:
        raise ValueError(f"prune_tokens: keep must be in 1..{length} (tokens per segment), got {keep}.")
    kept = tokens.new_empty(batch, keep, width)
    index = tokens.new_empty(batch, keep, dtype=torch.int64)
    score = tokens.new_empty(batch, keep, dtype=torch.float32)
    if batch == 0:
        return kept, index, score, score.new_empty((0, length) if return_scores else 0)
    config = choose_config("prune_tokens", tokens, queries, batch, length)
    flags = None if mask is None else mask.view(torch.uint8)
    span = select_span(length)
    if config.fused and span is not None:
        scores = tokens.new_empty(batch, length, dtype=torch.float32)
        folded = fold_mean(queries, options.reduce)
        fused_kernel[(batch,)](
            tokens,
            folded,
            flags,
            scores,
            kept,
            index,
            score,
            length,
            keep,
            folded.shape[1],
            options.scale,
            tokens.stride(),
            folded.stride(),
            (0, 0) if flags is None else flags.stride(),
            SPAN=span,
            COSINE=options.cosine,
            REDUCE=options.reduce,
            **product_constants(config, tokens, queries),
        )
    else:
        scores = launch_scores(tokens, queries, config, options, flags)
        _select_and_copy(tokens, flags, scores, kept, index, score)
    return kept, index, score, scores if return_scores else scores.new_empty(0)


def _select_and_copy(
    tokens: Tensor, flags: Tensor | None, scores: Tensor, kept: Tensor, index: Tensor, score: Tensor
) -> None:
    """Fill `kept`, `index` and `score` from the scores of all tokens."""
    batch, length, width = tokens.shape
    keep = index.shape[1]
    span = select_span(length)
    mask_stride = (0, 0) if flags is None else flags.stride()
    if span is None:
        select_long_kernel[(batch,)](
            scores, flags, index, score, length, keep, mask_stride, BLOCK=LONG_BLOCK, num_warps=16
        )
    select_copy_kernel[(batch * triton.cdiv(keep, COPY_ROWS),)](
        tokens,
        flags,
        scores,
        kept,
        index,
        score,
        length,
        keep,
        tokens.stride(),
        mask_stride,
        WIDTH=width,
        BLOCK_N=COPY_ROWS,
        BLOCK_D=COPY_WIDTH,
        SPAN=span,
        num_warps=8 if span == 4096 else 4,
    )


@triton.jit
def select(scores, mask, mask_stride, index, score, length, keep, first, last, SPAN: tl.constexpr):
    """Writes the picks first..last-1 of a segment into `index` and `score`: its best `keep` tokens, in their order."""
    n = tl.arange(0, SPAN)
    value, key = load_keys(scores, mask, mask_stride, n, length)
    threshold = largest_key(key, keep)
    ties_wanted = keep - tl.sum((key > threshold).to(tl.int32), 0)
    picked, count = place_picks(key, threshold, ties_wanted)
    slot = count - 1
    ours = picked & (slot >= first) & (slot < last)
    tl.store(index + slot, n.to(tl.int64), mask=ours)
    tl.store(score + slot, value, mask=ours)


@triton.jit(do_not_specialize=["length", "keep", "query_count"])
def fused_kernel(
    tokens,
    queries,
    mask,
    scores,
    kept,
    index,
    score,
    length,
    keep,
    query_count,
    scale,
    token_stride,
    query_stride,
    mask_stride,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    COSINE: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """Scores all tokens of a segment, selects, and copies the kept rows while they are in the cache; one program each.

    Args:
        tokens, queries, mask: [B, N, D], [B, Q, D] and [B, N] uint8 (or None), by strides.
        scores: [B, N] float32, written.
        kept, index, score: [B, k, D], [B, k] int64, [B, k] float32, written.
        length, keep: N <= SPAN and k.
    """
    segment = tl.program_id(0).to(tl.int64)
    tokens += segment * token_stride[0]
    queries += segment * query_stride[0]
    scores += segment * length
    kept += segment * keep * WIDTH
    index += segment * keep
    score += segment * keep
    if mask is not None:
        mask += segment * mask_stride[0]
    first = length * 0
    while first < length:
        row = first + tl.arange(0, BLOCK_N)
        value = score_rows(
            tokens,
            queries,
            row,
            row < length,
            query_count,
            scale,
            token_stride,
            query_stride,
            WIDTH,
            BLOCK_N,
            BLOCK_Q,
            BLOCK_D,
            UPCAST,
            COSINE,
            REDUCE,
        )
        if mask is not None:
            alive = tl.load(mask + row.to(tl.int64) * mask_stride[1], mask=row < length, other=0)
            value = tl.where(alive != 0, value, float("-inf"))
        tl.store(scores + row, value, mask=row < length)
        first += BLOCK_N
    tl.debug_barrier()  # the scores were written by other threads than read them
    select(scores, mask, mask_stride[1], index, score, length, keep, 0, keep, SPAN)
    tl.debug_barrier()
    first = length * 0
    while first < keep:
        slot = first + tl.arange(0, BLOCK_N)
        row = tl.load(index + slot, mask=slot < keep, other=0)
        copy_rows(tokens, kept, row, slot, slot < keep, token_stride, WIDTH, BLOCK_D)
        first += BLOCK_N


@triton.jit(do_not_specialize=["length", "keep"])
def select_copy_kernel(
    tokens,
    mask,
    scores,
    kept,
    index,
    score,
    length,
    keep,
    token_stride,
    mask_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Copies one tile of a segment's kept rows. Where SPAN >= N each program selects again, which saves a launch.

    Args:
        tokens, mask: as in `fused_kernel`.
        scores: [B, N] float32.
        kept: [B, k, D], written; index, score: [B, k], written, or read where SPAN is None.
    """
    tiles = (keep + BLOCK_N - 1) // BLOCK_N
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_N
    index += segment * keep
    if SPAN is not None:
        if mask is not None:
            mask += segment * mask_stride[0]
        select(
            scores + segment * length,
            mask,
            mask_stride[1],
            index,
            score + segment * keep,
            length,
            keep,
            first,
            tl.minimum(first + BLOCK_N, keep),
            SPAN,
        )
        tl.debug_barrier()  # the picks were written by other threads than read them
    slot = first + tl.arange(0, BLOCK_N)
    row = tl.load(index + slot, mask=slot < keep, other=0)
    copy_rows(
        tokens + segment * token_stride[0],
        kept + segment * keep * WIDTH,
        row,
        slot,
        slot < keep,
        token_stride,
        WIDTH,
        BLOCK_D,
    )


@triton.jit(do_not_specialize=["length", "keep"])
def select_long_kernel(scores, mask, index, score, length, keep, mask_stride, BLOCK: tl.constexpr):
    """Selects in a segment of any length: finds the threshold, then writes the picks in order; one program each."""
    segment = tl.program_id(0).to(tl.int64)
    scores += segment * length
    index += segment * keep
    score += segment * keep
    if mask is not None:
        mask += segment * mask_stride[0]
    threshold, wanted = largest_key_of_many(scores, mask, mask_stride[1], length, keep, BLOCK)
    picks = keep * 0
    first = length * 0
    while first < length:
        n = first + tl.arange(0, BLOCK)
        value, key = load_keys(scores, mask, mask_stride[1], n, length)
        ties = ((key == threshold) & (n < length)).to(tl.int32)
        picked, count = place_picks(key, threshold, wanted)
        picked = picked & (n < length)
        slot = picks + count - 1
        tl.store(index + slot, n.to(tl.int64), mask=picked)
        tl.store(score + slot, value, mask=picked)
        picks += tl.sum(picked.to(tl.int32), 0)
        wanted = tl.maximum(wanted - tl.sum(ties, 0), 0)
        first += BLOCK
