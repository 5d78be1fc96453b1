"""The kernels of the backward: coefficients of the products, d queries, d tokens. `backward.py` launches them.

Strides are tuples (segment, row, feature).
"""

import triton
import triton.language as tl

from .scores import inverse_norm, products
from .segments import find_rows, locate
from .selection import ascending_key


@triton.jit
def weighted_dot(weights, values, total, UPCAST: tl.constexpr):
    """total + weights @ values with float32 `weights`, to float32 accuracy.

    For bfloat16 values the weights are split into the sum of two bfloat16, which tensor cores multiply exactly; the
    range of float16 is too small for that.
    """
    if UPCAST or values.dtype == tl.float16 or values.dtype == tl.float32:
        total = tl.dot(weights, values.to(tl.float32), total, input_precision="ieee")
    else:
        high = weights.to(values.dtype)
        low = (weights - high.to(tl.float32)).to(values.dtype)
        total = tl.dot(high, values, total)
        total = tl.dot(low, values, total)
    return total


@triton.jit(do_not_specialize=["segments", "length", "keep", "query_count"])
def coefficient_kernel(
    x,
    queries,
    score,
    gradient,
    extra,
    index,
    offsets,
    coefficients,
    shrink,
    segments,
    length,
    keep,
    query_count,
    scale,
    x_stride,
    query_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    COSINE: tl.constexpr,
    REDUCE: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Takes the products of one tile of scored rows again, and writes their gradients.

    Args:
        x, queries, score, gradient, extra, offsets: as in `Operands`.
        index: [B, k] or [k] positions of the kept tokens, as in `PruneBackward`.
        segments, length, keep: B, n and k; packed: S, n and n.
        coefficients: [rows, Q] float32, written.
        shrink: [rows, 2] float32, written for cosine: d x = coefficients @ queries - shrink[0] * (shrink[1] * x).
    """
    segment, start, size, tile = locate(tl.program_id(0), offsets, segments, length, BLOCK_N, PACKED)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < size
    first = segment.to(tl.int64)
    grad = tl.load(gradient + start + row, mask=valid, other=0.0)
    if extra is not None:
        place, picked = find_rows(index + first * keep, keep, row)
        grad += tl.load(extra + first * keep + place, mask=picked & valid, other=0.0)
    if MASKED:
        # What a masked row holds must reach nothing.
        valid = valid & (tl.load(score + start + row, mask=valid, other=0.0) != float("-inf"))
    if PACKED:
        x += start * x_stride[1]
    else:
        x += first * x_stride[0]
    into = coefficients + (start + row) * query_count
    lane = tl.arange(0, BLOCK_Q)
    factor = tl.zeros([BLOCK_N], tl.float32) + scale
    inverse = tl.zeros([BLOCK_N], tl.float32)
    best = tl.zeros([BLOCK_N], tl.uint32)
    winner = tl.zeros([BLOCK_N], tl.int32)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_N], tl.float32)
    written = row < size
    first_query = query_count * 0
    while first_query < query_count:
        dots, square, lift = products(
            x,
            queries + first * query_stride[0],
            row,
            valid,
            first_query,
            query_count,
            x_stride,
            query_stride,
            WIDTH,
            BLOCK_N,
            BLOCK_Q,
            BLOCK_D,
            UPCAST,
            COSINE,
            REDUCE == "mean",
        )
        if COSINE:
            inverse = inverse_norm(square)
            dots = dots * (scale * inverse)[:, None]
            # The inverse norm of the row as it is; float32 cannot hold that of the shortest rows.
            inverse = tl.minimum(inverse * lift, 3.4e38)
            factor = scale * inverse
        else:
            dots = dots * factor[:, None]
        q = first_query + lane
        inside = (q < query_count)[None, :]
        tl.store(into[:, None] + q[None, :], dots, mask=written[:, None] & inside)
        if REDUCE == "max":
            # NaN wins, as in argmax; the lowest query wins a tie.
            key = tl.where(dots != dots, 0xFFFFFFFF, ascending_key(dots))
            key = tl.where(inside, key, 0).to(tl.uint32)
            block_best = tl.max(key, 1)
            block_winner = tl.min(tl.where(key == block_best[:, None], q[None, :], 0x7FFFFFFF), 1)
            winner = tl.where(block_best > best, block_winner, winner)
            best = tl.maximum(best, block_best)
        if REDUCE == "logsumexp":
            dots = tl.where(inside, dots, float("-inf"))
            new_top = tl.maximum(top, tl.max(dots, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(dots - shift[:, None]), 1)
            top = new_top
        first_query += BLOCK_Q
    tl.debug_barrier()  # the products may be read by other threads than wrote them
    taken = tl.zeros([BLOCK_N], tl.float32)
    first_query = query_count * 0
    while first_query < query_count:
        q = first_query + lane
        inside = valid[:, None] & (q < query_count)[None, :]
        dots = tl.load(into[:, None] + q[None, :], mask=inside, other=0.0)
        if REDUCE == "max":
            weight = (winner[:, None] == q[None, :]).to(tl.float32)
        elif REDUCE == "mean":
            weight = tl.full([BLOCK_N, BLOCK_Q], 1.0, tl.float32)  # of the one folded query
        else:
            weight = tl.exp(dots - top[:, None]) / mass[:, None]
        weight = tl.where(inside, weight * grad[:, None], 0.0)
        taken += tl.sum(weight * dots, 1)
        tl.debug_barrier()  # all have read before any overwrites
        tl.store(
            into[:, None] + q[None, :], weight * factor[:, None], mask=written[:, None] & (q < query_count)[None, :]
        )
        first_query += BLOCK_Q
    if COSINE:
        tl.store(shrink + 2 * (start + row), taken * inverse, mask=written)
        tl.store(shrink + 2 * (start + row) + 1, inverse, mask=written)


@triton.jit(do_not_specialize=["segments", "length", "query_count", "splits"])
def query_kernel(
    coefficients,
    x,
    score,
    offsets,
    d_queries,
    segments,
    length,
    query_count,
    splits,
    x_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """d queries [splits, B, Q, D]: one tile of queries and width sums one part of a segment's rows, in their order."""
    program = tl.program_id(0)
    width_tiles: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    query_tiles = (query_count + BLOCK_Q - 1) // BLOCK_Q
    d = program % width_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    program = program // width_tiles
    q = program % query_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    program = program // query_tiles
    split = program % splits
    segment = (program // splits).to(tl.int64)
    if PACKED:
        start = tl.load(offsets + segment).to(tl.int64)
        size = (tl.load(offsets + segment + 1) - start).to(tl.int32)
        x += start * x_stride[1]
    else:
        start = segment * length
        size = length
        x += segment * x_stride[0]
    part = (size + splits - 1) // splits
    first = split * part
    last = tl.minimum(first + part, size)
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    while first < last:
        row = first + tl.arange(0, BLOCK_N)
        valid = row < last
        weight = tl.load(
            coefficients + (start + row)[None, :] * query_count + q[:, None],
            mask=valid[None, :] & (q < query_count)[:, None],
            other=0.0,
        )  # [BLOCK_Q, BLOCK_N]
        if MASKED:
            valid = valid & (tl.load(score + start + row, mask=valid, other=0.0) != float("-inf"))
        values = tl.load(
            x + row.to(tl.int64)[:, None] * x_stride[1] + d.to(tl.int64)[None, :] * x_stride[2],
            mask=valid[:, None] & (d < WIDTH)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        total = weighted_dot(weight, values, total, UPCAST)
        first += BLOCK_N
    into = d_queries + ((split.to(tl.int64) * segments + segment) * query_count + q) * WIDTH
    tl.store(
        into[:, None] + d[None, :],
        total.to(d_queries.dtype.element_ty),
        mask=(q < query_count)[:, None] & (d < WIDTH)[None, :],
    )


@triton.jit(do_not_specialize=["segments", "length", "keep", "query_count"])
def token_kernel(
    grad_kept,
    coefficients,
    shrink,
    x,
    score,
    queries,
    index,
    bounds,
    d_tokens,
    segments,
    length,
    keep,
    query_count,
    grad_stride,
    x_stride,
    query_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    COSINE: tl.constexpr,
    DENSE: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Writes one tile of rows of d tokens: zeros, the gradient of the kept row, and that of its score.

    Args:
        grad_kept: [B, k, D] or [k, D] by strides, or None.
        coefficients, shrink: of the kept rows, of all with DENSE; `coefficients` None without a gradient of scores.
        d_tokens: [B, N, D] or [R, D], contiguous.
    """
    segment, start, size, tile = locate(tl.program_id(0), bounds, segments, length, BLOCK_N, PACKED, PACKED)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < size
    first = segment.to(tl.int64)
    if PACKED:
        place, picked = find_rows(index, keep, start + row)
        slot = place.to(tl.int64)
    else:
        place, picked = find_rows(index + first * keep, keep, row)
        slot = first * keep + place
        if grad_kept is not None:
            grad_kept += first * grad_stride[0]
        x += first * x_stride[0]
    picked = picked & valid
    if DENSE:
        source, x_row, scored = start + row, row, valid
    else:
        source, x_row, scored = slot, place, picked
    if coefficients is not None and MASKED:
        alive = tl.load(score + source, mask=scored, other=0.0) != float("-inf")
        scored = scored & alive
    if coefficients is not None and COSINE:
        off = tl.load(shrink + 2 * source, mask=scored, other=0.0)
        inverse = tl.load(shrink + 2 * source + 1, mask=scored, other=0.0)
    queries += first * query_stride[0]
    into = d_tokens + (start + row) * WIDTH
    for step in range(0, WIDTH, BLOCK_D):
        d = step + tl.arange(0, BLOCK_D)
        column = d.to(tl.int64)
        inside = d < WIDTH
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if coefficients is not None:
            first_query = query_count * 0
            while first_query < query_count:
                q = first_query + tl.arange(0, BLOCK_Q)
                weight = tl.load(
                    coefficients + source[:, None] * query_count + q[None, :],
                    mask=scored[:, None] & (q < query_count)[None, :],
                    other=0.0,
                )
                query = tl.load(
                    queries + q.to(tl.int64)[:, None] * query_stride[1] + column[None, :] * query_stride[2],
                    mask=(q < query_count)[:, None] & inside[None, :],
                    other=0.0,
                )
                total = weighted_dot(weight, query, total, UPCAST)
                first_query += BLOCK_Q
            if COSINE:
                value = tl.load(
                    x + x_row.to(tl.int64)[:, None] * x_stride[1] + column[None, :] * x_stride[2],
                    mask=scored[:, None] & inside[None, :],
                    other=0.0,
                )
                total -= off[:, None] * (value.to(tl.float32) * inverse[:, None])
        if grad_kept is not None:
            grad = tl.load(
                grad_kept + place.to(tl.int64)[:, None] * grad_stride[1] + column[None, :] * grad_stride[2],
                mask=picked[:, None] & inside[None, :],
                other=0.0,
            )
            total += grad.to(tl.float32)
        tl.store(into[:, None] + d[None, :], total.to(d_tokens.dtype.element_ty), mask=valid[:, None] & inside[None, :])
