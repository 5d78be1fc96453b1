"""Scores of tokens against the few queries of their segment: the forward that both prune ops share."""

import triton
import triton.language as tl

from .segments import locate


@triton.jit
def products(
    tokens,
    queries,
    row,
    live,
    first_query,
    query_count,
    token_stride_n,
    token_stride_d,
    query_stride_q,
    query_stride_d,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    COSINE: tl.constexpr,
):
    """x . q as [BLOCK_N, BLOCK_Q], and |x|^2 where the scoring is cosine, from one reading of the rows."""
    q = first_query + tl.arange(0, BLOCK_Q)
    x_row = tokens + row.to(tl.int64) * token_stride_n
    q_row = queries + q.to(tl.int64) * query_stride_q
    dots = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    for step in range(0, WIDTH, BLOCK_D):
        d = step + tl.arange(0, BLOCK_D)
        inside = d < WIDTH
        column = d.to(tl.int64)
        x = tl.load(
            x_row[:, None] + column[None, :] * token_stride_d,
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        query = tl.load(
            q_row[None, :] + column[:, None] * query_stride_d,
            mask=(q < query_count)[None, :] & inside[:, None],
            other=0.0,
        )  # [BLOCK_D, BLOCK_Q]
        if COSINE:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, 1)
        if UPCAST:
            dots = tl.dot(x.to(tl.float32), query.to(tl.float32), dots, input_precision="ieee")
        else:
            dots = tl.dot(x, query, dots)
    return dots, square


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
    token_stride_n,
    token_stride_d,
    query_stride_q,
    query_stride_d,
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
        dots, square = products(
            tokens,
            queries,
            row,
            live,
            first_query,
            query_count,
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
        )
        dots = dots * scale
        if COSINE:
            dots = dots * inverse_norm(square)[:, None]
        inside = (first_query + tl.arange(0, BLOCK_Q) < query_count)[None, :]
        if REDUCE == "mean":
            total += tl.sum(tl.where(inside, dots, 0.0), 1)
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
        return total / query_count
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
    token_stride_b,
    token_stride_n,
    token_stride_d,
    query_stride_b,
    query_stride_q,
    query_stride_d,
    mask_stride_b,
    mask_stride_n,
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
        tokens: [B, N, D] by strides; packed: [R, D], with `token_stride_b` 0.
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
        tokens += start * token_stride_n
    else:
        tokens += first * token_stride_b
    score = score_rows(
        tokens,
        queries + first * query_stride_b,
        row,
        valid,
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
        alive = tl.load(mask + first * mask_stride_b + row.to(tl.int64) * mask_stride_n, mask=valid, other=0)
        score = tl.where(alive != 0, score, float("-inf"))
    tl.store(scores + start + row, score, mask=valid)
