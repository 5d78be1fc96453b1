"""Scores of tokens against the few queries of their segment: the forward that both prune ops share.

Strides are tuples (segment, row, feature) everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import Config, product_constants
from .records import ScoreOptions
from .segments import locate, segment_strides, tile_count


def fold_mean(queries: Tensor, reduce: str) -> Tensor:
    """The queries as the kernels take them: for "mean" their mean [B, 1, D] in float32, as the op defines it."""
    return queries.float().mean(dim=1, keepdim=True) if reduce == "mean" else queries


def launch_scores(
    tokens: Tensor,
    queries: Tensor,
    config: Config,
    options: ScoreOptions,
    mask: Tensor | None = None,
    bounds: Tensor | None = None,
) -> Tensor:
    """Scores [B, N] or, of packed segments, [R] float32 of all tokens; -inf where masked.

    Args:
        tokens: [B, N, D] or packed [R, D] by strides.
        queries: [B, Q, D] by strides.
        mask: [B, N] uint8 by strides, or None.
        bounds: [B + 1] of `safe_offsets` for packed segments, else None.
    """
    scores = tokens.new_empty(tokens.shape[:-1], dtype=torch.float32)
    folded = fold_mean(queries, options.reduce)
    segments, length = queries.shape[0], tokens.shape[-2]
    score_kernel[(tile_count(length, segments, config.block_n, bounds is not None),)](
        tokens,
        folded,
        mask,
        bounds,
        scores,
        segments,
        length,
        folded.shape[1],
        options.scale,
        segment_strides(tokens),
        folded.stride(),
        (0, 0) if mask is None else mask.stride(),
        COSINE=options.cosine,
        REDUCE=options.reduce,
        PACKED=bounds is not None,
        **product_constants(config, tokens, queries),
    )
    return scores


@triton.jit
def lifted_products(
    tokens,
    queries,
    row,
    live,
    lift,
    first_query,
    query_count,
    token_stride,
    query_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    COSINE: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """Products x . q [BLOCK_N, BLOCK_Q] and, for cosine, |x|^2 [BLOCK_N] of rows x that are multiplied by `lift`.

    `lift` [BLOCK_N] holds powers of two, or is None for rows as they are. A single folded query fills no tile of a
    matrix product: its products are summed without one, and repeated BLOCK_Q times.
    """
    q = first_query + tl.arange(0, BLOCK_Q)
    x_row = tokens + row.to(tl.int64) * token_stride[1]
    q_row = queries + q.to(tl.int64) * query_stride[1]
    dots = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    dot = tl.zeros([BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    for step in range(0, WIDTH, BLOCK_D):
        d = step + tl.arange(0, BLOCK_D)
        inside = d < WIDTH
        column = d.to(tl.int64)
        x = tl.load(
            x_row[:, None] + column[None, :] * token_stride[2], mask=live[:, None] & inside[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_D]
        if lift is not None:
            x = (x.to(tl.float32) * lift[:, None]).to(x.dtype)
        if COSINE:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, 1)
        if FOLDED:
            query = tl.load(queries + column * query_stride[2], mask=inside, other=0.0)  # [BLOCK_D]
            dot += tl.sum(x.to(tl.float32) * query[None, :], 1)
        else:
            query = tl.load(
                q_row[None, :] + column[:, None] * query_stride[2],
                mask=(q < query_count)[None, :] & inside[:, None],
                other=0.0,
            )  # [BLOCK_D, BLOCK_Q]
            if UPCAST:
                dots = tl.dot(x.to(tl.float32), query.to(tl.float32), dots, input_precision="ieee")
            else:
                dots = tl.dot(x, query, dots)
    if FOLDED:
        dots += dot[:, None]
    return dots, square


@triton.jit
def lift_of(tokens, row, beyond, token_stride, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Powers of two [BLOCK_N] that bring the rows in `beyond` near 1; 1 for the other rows and for zero rows."""
    peak = tl.zeros([BLOCK_N], tl.float32)
    x_row = tokens + row.to(tl.int64) * token_stride[1]
    for step in range(0, WIDTH, BLOCK_D):
        d = step + tl.arange(0, BLOCK_D)
        x = tl.load(
            x_row[:, None] + d.to(tl.int64)[None, :] * token_stride[2],
            mask=beyond[:, None] & (d < WIDTH)[None, :],
            other=0.0,
        )
        peak = tl.maximum(peak, tl.max(tl.abs(x.to(tl.float32)), 1))
    # 2^-e from the bits of the exponent e, whose lowest and highest values have no normal reciprocal.
    exponent = tl.minimum(tl.maximum((peak.to(tl.uint32, bitcast=True) >> 23).to(tl.int32), 1), 253)
    lift = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where((peak > 0.0) & (peak < float("inf")), lift, 1.0)


@triton.jit
def products(
    tokens,
    queries,
    row,
    live,
    first_query,
    query_count,
    token_stride,
    query_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    COSINE: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """`lifted_products` and the lift [BLOCK_N] of each row: 1, except for cosine where float32 cannot hold |x|^2."""
    dots, square = lifted_products(
        tokens,
        queries,
        row,
        live,
        None,
        first_query,
        query_count,
        token_stride,
        query_stride,
        WIDTH,
        BLOCK_N,
        BLOCK_Q,
        BLOCK_D,
        UPCAST,
        COSINE,
        FOLDED,
    )
    lift = tl.full([BLOCK_N], 1.0, tl.float32)
    if COSINE and tokens.dtype.element_ty != tl.float16:  # whose squares all fit
        beyond = live & ((square < 8.67e-19) | (square > 1.2e24))  # 2^-60, 2^80
        if tl.sum(beyond.to(tl.int32), 0) > 0:
            # This is rare. It takes small steps and no matrix products, whose tiles would cost all calls registers.
            lift = lift_of(tokens, row, beyond, token_stride, WIDTH, BLOCK_N, 16)
            lifted = lift != 1.0
            count = tl.where(tl.sum(lifted.to(tl.int32), 0) > 0, tl.minimum(query_count - first_query, BLOCK_Q), 0)
            number = count * 0
            while number < count:
                dot, own = lifted_products(
                    tokens,
                    queries + (first_query + number).to(tl.int64) * query_stride[1],
                    row,
                    live,
                    lift,
                    0,
                    1,
                    token_stride,
                    query_stride,
                    WIDTH,
                    BLOCK_N,
                    BLOCK_Q,
                    16,
                    UPCAST,
                    COSINE,
                    True,
                )
                ours = (tl.arange(0, BLOCK_Q) == number)[None, :] & lifted[:, None]
                dots = tl.where(ours | (FOLDED & lifted[:, None]), dot, dots)
                square = tl.where(lifted, own, square)
                number += 1
    return dots, square, lift


@triton.jit
def inverse_norm(square):
    """1 / |x| from |x|^2; 0 for a zero row."""
    return tl.where(square == 0.0, 0.0, tl.rsqrt(tl.where(square == 0.0, 1.0, square)))


@triton.jit
def score_rows(
    tokens,
    queries,
    row,
    live,
    query_count,
    scale,
    token_stride,
    query_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    COSINE: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """Scores [BLOCK_N] of the rows `row` of a segment, whose tokens and queries the pointers begin at."""
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    first_query = query_count * 0
    while first_query < query_count:
        dots, square, _lift = products(
            tokens,
            queries,
            row,
            live,
            first_query,
            query_count,
            token_stride,
            query_stride,
            WIDTH,
            BLOCK_N,
            BLOCK_Q,
            BLOCK_D,
            UPCAST,
            COSINE,
            REDUCE == "mean",
        )
        dots = dots * scale
        if COSINE:
            dots = dots * inverse_norm(square)[:, None]
        inside = (first_query + tl.arange(0, BLOCK_Q) < query_count)[None, :]
        if REDUCE == "mean":  # of the one folded query
            total = tl.sum(tl.where(inside, dots, 0.0), 1)
        else:
            dots = tl.where(inside, dots, float("-inf"))
            # tl.max drops NaN.
            block_best = tl.where(tl.sum((dots != dots).to(tl.int32), 1) > 0, float("nan"), tl.max(dots, 1))
            bigger = (block_best > best) | (block_best != block_best)
            new_best = tl.where(bigger & (best == best), block_best, best)
            if REDUCE == "logsumexp":
                # An infinite maximum is not subtracted: inf - inf is NaN.
                shift = tl.where(tl.abs(new_best) == float("inf"), 0.0, new_best)
                old_shift = tl.where(tl.abs(best) == float("inf"), 0.0, best)
                carried = tl.where(total == 0.0, 0.0, total * tl.exp(old_shift - shift))
                total = carried + tl.sum(tl.exp(dots - shift[:, None]), 1)
            best = new_best
        first_query += BLOCK_Q
    if REDUCE == "mean":
        return total
    elif REDUCE == "logsumexp":
        return tl.log(total) + tl.where(tl.abs(best) == float("inf"), 0.0, best)
    else:
        return best


@triton.jit(do_not_specialize=["segments", "length", "query_count"])
def score_kernel(
    tokens,
    queries,
    mask,
    bounds,
    scores,
    segments,
    length,
    query_count,
    scale,
    token_stride,
    query_stride,
    mask_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    COSINE: tl.constexpr,
    REDUCE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Scores of one tile of a segment's tokens.

    Args:
        tokens: [B, N, D] by strides; packed: [R, D], with a stride 0 of segments.
        queries: [B, Q, D] by strides.
        mask: [B, N] uint8 by strides, or None; a masked token scores -inf.
        bounds: [B + 1] of `bounds_kernel`, or None where not packed.
        scores: [B, N] or [R] float32.
        segments, length: B and N; packed: S and R.
    """
    segment, start, size, tile = locate(tl.program_id(0), bounds, segments, length, BLOCK_N, PACKED)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < size
    first = segment.to(tl.int64)
    if PACKED:
        tokens += start * token_stride[1]
    else:
        tokens += first * token_stride[0]
    score = score_rows(
        tokens,
        queries + first * query_stride[0],
        row,
        valid,
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
        alive = tl.load(mask + first * mask_stride[0] + row.to(tl.int64) * mask_stride[1], mask=valid, other=0)
        score = tl.where(alive != 0, score, float("-inf"))
    tl.store(scores + start + row, score, mask=valid)
