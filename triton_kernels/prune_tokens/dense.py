"""`prune_tokens` in Triton: one launch where segments fill the machine, else score, select, copy. No host sync.

The launchers take and return what the op's reference does. Tokens, queries, mask and the gradient of the kept tokens
may have any strides; only a strided gradient of scores is copied, [B, k] or [B, N] floats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import choose_config, select_span, upcasts
from ..common.nvtx import nvtx_range
from .backward import Rows, score_gradients
from .scores import fold_mean, score_kernel, score_rows
from .selection import copy_rows, largest_key, largest_key_of_many, load_keys, place_picks

LONG_BLOCK = 4096


@nvtx_range("bridge_stg.prune_tokens")
def forward(
    tokens: Tensor,
    queries: Tensor,
    keep: int,
    scoring: str,
    reduce: str,
    scale: float,
    mask: Tensor | None,
    return_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kept [B, k, D], index [B, k], score [B, k], scores [B, N] or empty); see the op's `reference`."""
    batch, length, width = tokens.shape
    if not 1 <= keep <= length:
        raise ValueError(f"prune_tokens: keep must be in 1..{length} (tokens per segment), got {keep}.")
    kept = tokens.new_empty(batch, keep, width)
    index = tokens.new_empty(batch, keep, dtype=torch.int64)
    score = tokens.new_empty(batch, keep, dtype=torch.float32)
    scores = tokens.new_empty(batch, length, dtype=torch.float32)
    if batch:
        _launch(tokens, queries, mask, kept, index, score, scores, scoring, reduce, scale)
    return kept, index, score, scores if return_scores else scores.new_empty(0)


def _launch(
    tokens: Tensor,
    queries: Tensor,
    mask: Tensor | None,
    kept: Tensor,
    index: Tensor,
    score: Tensor,
    scores: Tensor,
    scoring: str,
    reduce: str,
    scale: float,
) -> None:
    batch, length, width = tokens.shape
    keep = kept.shape[1]
    config = choose_config("prune_tokens", tokens, queries, batch, length)
    upcast, queries = upcasts(tokens, queries), fold_mean(queries, reduce)
    span = select_span(length)
    flags = None if mask is None else mask.view(torch.uint8)
    mask_strides = (0, 0) if mask is None else mask.stride()
    score_options = {
        "WIDTH": width,
        "BLOCK_N": config.block_n,
        "BLOCK_Q": config.block_q,
        "BLOCK_D": config.block_d,
        "UPCAST": upcast,
        "COSINE": scoring == "cosine",
        "REDUCE": reduce,
    }
    if config.fused and span is not None:
        fused_kernel[(batch,)](
            tokens,
            queries,
            flags,
            scores,
            kept,
            index,
            score,
            length,
            keep,
            queries.shape[1],
            scale,
            *tokens.stride(),
            *queries.stride(),
            *mask_strides,
            SPAN=span,
            **score_options,
            **config.launch(),
        )
        return
    score_kernel[(batch * triton.cdiv(length, config.block_n),)](
        tokens,
        queries,
        flags,
        None,
        scores,
        batch,
        length,
        queries.shape[1],
        scale,
        *tokens.stride(),
        *queries.stride(),
        *mask_strides,
        PACKED=False,
        **score_options,
        **config.launch(),
    )
    if span is None:
        select_long_kernel[(batch,)](
            scores, flags, index, score, length, keep, *mask_strides, BLOCK=LONG_BLOCK, num_warps=16
        )
    block_n, block_d = 32, 64
    select_copy_kernel[(batch * triton.cdiv(keep, block_n),)](
        tokens,
        flags,
        scores,
        kept,
        index,
        score,
        length,
        keep,
        *tokens.stride(),
        *mask_strides,
        WIDTH=width,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        SPAN=span,
        num_warps=8 if span == 4096 else 4,
    )


@triton.jit
def select(
    scores,
    mask,
    mask_stride,
    index,
    score,
    length,
    keep,
    first,
    last,
    SPAN: tl.constexpr,
):
    """Of a segment's best `keep` tokens, in their order, writes the picks first..last-1 into `index` and `score`."""
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
    token_stride_b,
    token_stride_n,
    token_stride_d,
    query_stride_b,
    query_stride_q,
    query_stride_d,
    mask_stride_b,
    mask_stride_n,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    COSINE: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """One program a segment: scores all tokens, selects, and copies the kept rows while they are in the cache.

    Args:
        tokens, queries, mask: [B, N, D], [B, Q, D] and [B, N] uint8 (or None), by strides.
        scores: [B, N] float32, written.
        kept, index, score: [B, k, D], [B, k] int64, [B, k] float32, written.
        length, keep: N <= SPAN and k.
    """
    segment = tl.program_id(0).to(tl.int64)
    tokens += segment * token_stride_b
    queries += segment * query_stride_b
    scores += segment * length
    kept += segment * keep * WIDTH
    index += segment * keep
    score += segment * keep
    if mask is not None:
        mask += segment * mask_stride_b
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
            token_stride_n,
            token_stride_d,
            query_stride_q,
            query_stride_d,
            WIDTH,
            BLOCK_N,
            BLOCK_Q,
            BLOCK_D,
            UPCAST,
            COSINE,
            REDUCE,
        )
        if mask is not None:
            alive = tl.load(mask + row.to(tl.int64) * mask_stride_n, mask=row < length, other=0)
            value = tl.where(alive != 0, value, float("-inf"))
        tl.store(scores + row, value, mask=row < length)
        first += BLOCK_N
    tl.debug_barrier()  # the scores were written by other threads than read them
    select(scores, mask, mask_stride_n, index, score, length, keep, 0, keep, SPAN)
    tl.debug_barrier()
    first = length * 0
    while first < keep:
        slot = first + tl.arange(0, BLOCK_N)
        row = tl.load(index + slot, mask=slot < keep, other=0)
        copy_rows(tokens, kept, row, slot, slot < keep, token_stride_n, token_stride_d, WIDTH, BLOCK_D)
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
    token_stride_b,
    token_stride_n,
    token_stride_d,
    mask_stride_b,
    mask_stride_n,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Copies one tile of a segment's kept rows. With SPAN >= N each program selects anew, which spares a launch.

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
            mask += segment * mask_stride_b
        select(
            scores + segment * length,
            mask,
            mask_stride_n,
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
        tokens + segment * token_stride_b,
        kept + segment * keep * WIDTH,
        row,
        slot,
        slot < keep,
        token_stride_n,
        token_stride_d,
        WIDTH,
        BLOCK_D,
    )


@triton.jit(do_not_specialize=["length", "keep"])
def select_long_kernel(
    scores,
    mask,
    index,
    score,
    length,
    keep,
    mask_stride_b,
    mask_stride_n,
    BLOCK: tl.constexpr,
):
    """One program a segment of any length: the threshold, then the picks in order."""
    segment = tl.program_id(0).to(tl.int64)
    scores += segment * length
    index += segment * keep
    score += segment * keep
    if mask is not None:
        mask += segment * mask_stride_b
    threshold, wanted = largest_key_of_many(scores, mask, mask_stride_n, length, keep, BLOCK)
    picks = keep * 0
    first = length * 0
    while first < length:
        n = first + tl.arange(0, BLOCK)
        value, key = load_keys(scores, mask, mask_stride_n, n, length)
        ties = ((key == threshold) & (n < length)).to(tl.int32)
        picked, count = place_picks(key, threshold, wanted)
        picked = picked & (n < length)
        slot = picks + count - 1
        tl.store(index + slot, n.to(tl.int64), mask=picked)
        tl.store(score + slot, value, mask=picked)
        picks += tl.sum(picked.to(tl.int32), 0)
        wanted = tl.maximum(wanted - tl.sum(ties, 0), 0)
        first += BLOCK


@nvtx_range("bridge_stg.prune_tokens.backward")
def backward(
    grad_kept: Tensor | None,
    grad_score: Tensor | None,
    grad_scores: Tensor | None,
    tokens: Tensor | None,
    kept: Tensor,
    index: Tensor,
    score: Tensor,
    scores: Tensor,
    queries: Tensor,
    token_count: int,
    scoring: str,
    reduce: str,
    scale: float,
    masked: bool,
    need_tokens: bool,
    need_queries: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [B, N, D] and queries [B, Q, D], empty where not needed; see `reference_backward`."""
    batch, keep, _ = kept.shape
    dense = grad_scores is not None
    rows = Rows(
        x=tokens if dense else kept,
        score=scores if dense else score,
        gradient=grad_scores if dense else grad_score,
        offsets=None,
        segments=batch,
        length=token_count if dense else keep,
        dense=dense,
        extra=grad_score if dense else None,
    )
    return score_gradients(
        rows,
        queries,
        grad_kept,
        index,
        None,
        keep,
        token_count,
        scoring,
        reduce,
        scale,
        masked,
        need_tokens,
        need_queries,
        kept,
    )
