"""`attend_memory` in Triton: gradients of the query and the bias, over splits of the keys that are summed in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import multiprocessors
from .merge import merge_splits, sum_places
from .tiles import (
    LOG2E,
    SIDES,
    SIZES,
    find_keys,
    is_plain,
    key_arguments,
    key_range,
    load_keys,
    load_levels,
    load_rows,
    load_windows,
    loop_bound,
    padded_width,
    query_tile,
    split_keys,
    widened,
)


@triton.jit(do_not_specialize=["rows"])
def attend_memory_delta(
    delta, d_out, out, d_lse, rows, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):
    """delta [rows] = rowsum(d_out * out) - d_lse for contiguous rows [rows, C]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    place = row[:, None] * WIDTH + column[None, :]
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    slope = tl.load(d_out + place, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(slope * tl.load(out + place, mask=mask, other=0.0).to(tl.float32), axis=1)
    if d_lse is not None:
        total -= tl.load(d_lse + row, mask=row < rows, other=0.0)
    tl.store(delta + row, total, mask=row < rows)


@triton.jit(do_not_specialize=SIZES + SIDES)
def attend_memory_query_gradient(
    d_query, d_bias, query, d_out, lse, delta, memory, position, bias, key_mask, index, window,
    memory_b, memory_m, memory_c, position_b, position_m, position_c,
    bias_b, bias_m, mask_b, mask_m, index_b, index_k, window_b, window_r, window_e,
    scale, M, R, K, splits, split_size,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row tile over one split: d query [B, splits, R, C] of that part, and d bias [B, row tiles, K] where wanted.

    query and d_out [B, R, C] are contiguous. With BLOCK_D < BLOCK_C the second grid axis walks over columns of d query.
    """
    row_tiles = tl.cdiv(R, BLOCK_R)
    tile = tl.program_id(0)
    part = tile // row_tiles
    batch = (part // splits).to(tl.int64)
    row = tile % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = part % splits * split_size
    last = tl.minimum(first + split_size, K)
    if window is not None:
        start, end = load_windows(window, batch, row, window_b, window_r, window_e, R, K)
        if d_bias is None:
            first, last = key_range(start, end, first, last, BLOCK_K)
    row_b = R.to(tl.int64) * WIDTH
    level, drop = load_levels(lse, delta, batch, row, R)
    if BLOCK_D == BLOCK_C:
        rows = load_rows(query, batch, row, row < R, row_b, WIDTH, 1, column, WIDTH)
        slopes = load_rows(d_out, batch, row, row < R, row_b, WIDTH, 1, column, WIDTH)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for begin in range(loop_bound(first), loop_bound(last), BLOCK_K):
        place = begin + tl.arange(0, BLOCK_K)
        key, seen = find_keys(place, batch, key_mask, mask_b, mask_m, index, index_b, index_k, M, K)
        if BLOCK_D == BLOCK_C:
            value, keys = load_keys(
                memory, position, batch, key, seen, column,
                memory_b, memory_m, memory_c, position_b, position_m, position_c, WIDTH,
            )  # fmt: skip
            score = tl.dot(rows, tl.trans(keys), input_precision="ieee")  # [BLOCK_R, BLOCK_K]
            d_weight = tl.dot(slopes, tl.trans(value), input_precision="ieee")
        else:
            score = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
            d_weight = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
            for chunk in range(0, BLOCK_C, BLOCK_D):
                some = chunk + tl.arange(0, BLOCK_D)
                rows = load_rows(query, batch, row, row < R, row_b, WIDTH, 1, some, WIDTH)
                slopes = load_rows(d_out, batch, row, row < R, row_b, WIDTH, 1, some, WIDTH)
                value, keys = load_keys(
                    memory, position, batch, key, seen, some,
                    memory_b, memory_m, memory_c, position_b, position_m, position_c, WIDTH,
                )  # fmt: skip
                score = tl.dot(rows, tl.trans(keys), score, input_precision="ieee")
                d_weight = tl.dot(slopes, tl.trans(value), d_weight, input_precision="ieee")
            value, keys = load_keys(
                memory, position, batch, key, seen, column,
                memory_b, memory_m, memory_c, position_b, position_m, position_c, WIDTH,
            )  # fmt: skip
        score *= scale * LOG2E
        if bias is not None:
            extra = tl.load(bias + batch * bias_b + key * bias_m, mask=seen, other=0.0).to(tl.float32)
            score += (extra * LOG2E)[None, :]
        visible = seen[None, :]
        if window is not None:
            visible &= (place[None, :] >= start[:, None]) & (place[None, :] < end[:, None])
        weight = tl.where(visible, tl.math.exp2(score - level[:, None]), 0.0)
        d_score = weight * (d_weight - drop[:, None])
        if d_bias is not None:
            share = d_bias + (batch * row_tiles + tile % row_tiles) * K + place
            tl.store(share, tl.sum(d_score, axis=0), mask=(place < K) & (tl.program_id(1) == 0))
        total = tl.dot(d_score.to(keys.dtype), keys, total, input_precision="ieee")
    offset = (part.to(tl.int64) * R + row)[:, None] * WIDTH + column[None, :]
    mask = (row < R)[:, None] & (column < WIDTH)[None, :]
    tl.store(d_query + offset, (total * scale).to(d_query.dtype.element_ty), mask=mask)


def row_delta(d_out: Tensor, out: Tensor, d_lse: Tensor | None) -> Tensor:
    """rowsum(d_out * out) - d_lse, [B, R] float32, for contiguous d_out [B, R, C]."""
    batch, rows, width = d_out.shape
    delta = d_out.new_empty((batch, rows), dtype=torch.float32)
    if delta.numel():
        d_lse = None if d_lse is None else d_lse.contiguous()
        attend_memory_delta[(triton.cdiv(batch * rows, 8),)](
            delta, d_out, out.contiguous(), d_lse, batch * rows,
            WIDTH=width, BLOCK_C=padded_width(width), BLOCK_R=8, num_warps=4,
        )  # fmt: skip
    return delta


def query_gradients(
    query: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    memory: Tensor,
    position: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    index: Tensor | None,
    window: Tensor | None,
    scale: float,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """d query [B, R, C], and d bias [B, M] or an empty tensor; query and d_out are contiguous."""
    if (wide := widened(query, d_out, memory, position)) is not None:
        d_query, d_bias = query_gradients(
            wide[0], wide[1], lse, delta, wide[2], wide[3], bias, key_mask, index, window, scale, need_bias
        )
        return d_query.to(query.dtype), d_bias
    batch, rows, width = query.shape
    keys = memory.shape[1] if index is None else index.shape[1]
    tensors, strides = key_arguments(memory, position, bias, key_mask, index, window)
    tile = query_tile(rows, width, query.element_size(), is_plain(position, index, window))
    row_tiles, padded = triton.cdiv(rows, tile.rows), padded_width(width)
    chunks = padded // tile.columns
    splits, size = split_keys(batch * row_tiles * chunks, keys, tile.keys, multiprocessors(query.device))
    d_query = torch.empty_like(query)
    parts = d_query if splits == 1 else delta.new_empty((batch, splits, rows, width))
    share = delta.new_empty((batch, row_tiles, keys)) if need_bias else None
    if query.numel():
        attend_memory_query_gradient[batch * splits * row_tiles, chunks](
            parts, share, query, d_out, lse, delta, *tensors, *strides,
            scale, memory.shape[1], rows, keys, splits, size, WIDTH=width, BLOCK_C=padded, **tile.options(),
        )  # fmt: skip
        if splits > 1:
            merge_splits(d_query, None, parts, None)
    if share is None or bias is None:
        return d_query, query.new_empty(0)
    d_bias = share.sum(dim=1)
    if index is not None:
        return d_query, sum_places(d_bias[:, :, None], index, memory.shape[1], bias.dtype)[:, :, 0]
    return d_query, d_bias.to(bias.dtype)
