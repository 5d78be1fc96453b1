"""Scores of tokens against the few queries of their segment: the forward that both prune ops share."""

import triton
import triton.language as tl
from torch import Tensor

from .segments import locate


def fold_mean(queries: Tensor, reduce: str) -> Tensor:
    """The queries as the kernels take them: for "mean" their mean [B, 1, D] in float32, as the op defines it."""
    return queries.float().mean(dim=1, keepdim=True) if reduce == "mean" else queries


@triton.jit
def lifted_products(
    tokens,
    queries,
    row,
    live,
    lift,
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
    FOLDED: tl.constexpr,
):
    """x . q as [BLOCK_N, BLOCK_Q], and |x|^2 where the scoring is cosine, from one reading of the rows times `lift`.

    `lift` [BLOCK_N] holds powers of two, or is None for rows as they are. A single folded query fills no tile of a
    matrix product: its products are summed as they are, and repeated BLOCK_Q times.
    """
    q = first_query + tl.arange(0, BLOCK_Q)
    x_row = tokens + row.to(tl.int64) * token_stride_n
    q_row = queries + q.to(tl.int64) * query_stride_q
    dots = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    dot = tl.zeros([BLOCK_N], tl.float32)
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
        if lift is not None:
            x = (x.to(tl.float32) * lift[:, None]).to(x.dtype)
        if COSINE:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, 1)
        if FOLDED:
            query = tl.load(queries + column * query_stride_d, mask=inside, other=0.0)  # [BLOCK_D]
            dot += tl.sum(x.to(tl.float32) * query[None, :], 1)
        else:
            query = tl.load(
                q_row[None, :] + column[:, None] * query_stride_d,
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
def lift_of(
    tokens,
    row,
    beyond,
    token_stride_n,
    token_stride_d,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Powers of two [BLOCK_N] that take the rows in `beyond` to numbers around 1; 1 for the others and what is 0."""
    peak = tl.zeros([BLOCK_N], tl.float32)
    x_row = tokens + row.to(tl.int64) * token_stride_n
    for step in range(0, WIDTH, BLOCK_D):
        d = step + tl.arange(0, BLOCK_D)
        x = tl.load(
            x_row[:, None] + d.to(tl.int64)[None, :] * token_stride_d,
            mask=beyond[:, None] & (d < WIDTH)[None, :],
            other=0.0,
        )
        peak = tl.maximum(peak, tl.max(tl.abs(x.to(tl.float32)), 1))
    # 2^-e of the exponent's bits, both ends of which have no normal reciprocal.
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
    FOLDED: tl.constexpr,
):
    """`lifted_products`, and the lift [BLOCK_N] of each row: 1 but for cosine of rows whose squares float32 lacks."""
    dots, square = lifted_products(
        tokens, queries, row, live, None, first_query, query_count,
        token_stride_n, token_stride_d, query_stride_q, query_stride_d,
        WIDTH, BLOCK_N, BLOCK_Q, BLOCK_D, UPCAST, COSINE, FOLDED,
    )  # fmt: skip
    lift = tl.full([BLOCK_N], 1.0, tl.float32)
    if COSINE and tokens.dtype.element_ty != tl.float16:  # whose squares all fit
        beyond = live & ((square < 8.67e-19) | (square > 1.2e24))  # 2^-60, 2^80
        if tl.sum(beyond.to(tl.int32), 0) > 0:
            # Rare, and so by small steps and without matrix products, whose tiles would cost all calls registers.
            lift = lift_of(tokens, row, beyond, token_stride_n, token_stride_d, WIDTH, BLOCK_N, 16)
            lifted = lift != 1.0
            count = tl.where(tl.sum(lifted.to(tl.int32), 0) > 0, tl.minimum(query_count - first_query, BLOCK_Q), 0)
            number = count * 0
            while number < count:
                dot, own = lifted_products(
                    tokens, queries + (first_query + number).to(tl.int64) * query_stride_q, row, live, lift, 0, 1,
                    token_stride_n, token_stride_d, query_stride_q, query_stride_d,
                    WIDTH, BLOCK_N, BLOCK_Q, 16, UPCAST, COSINE, True,
                )  # fmt: skip
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
        dots, square, _lift = products(
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
