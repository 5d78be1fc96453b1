"""`attend_memory` in Triton: the backward; d query and d bias over splits of the keys that are summed in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import multiprocessors
from ..common.nvtx import nvtx_range
from .forward import forward
from .loads import (
    LOG2E,
    SIDES,
    SIZES,
    find_keys,
    kernel_inputs,
    key_arguments,
    key_range,
    load_keys,
    load_levels,
    load_rows,
    load_windows,
    loop_bound,
)
from .merge import merge_splits, sum_places
from .records import AttentionBackward, AttentionInputs
from .shared_backward import LayerRows, memory_gradients
from .tiles import padded_width, query_tile, split_keys


@triton.jit(do_not_specialize=["rows"])
def attend_memory_delta(
    delta, d_out, out, d_lse, rows, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Compute delta [rows] = rowsum(d_out * out) - d_lse for contiguous rows [rows, C]."""
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
    memory_stride, position_stride, bias_b, bias_m, mask_b, mask_m, index_b, index_k, window_b, window_r, window_e,
    scale, M, R, K, splits, split_size,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Differentiate one tile of rows over one split: d query [B, splits, R, C], and d bias [B, row tiles, K] if wanted.

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
    query_stride = (R.to(tl.int64) * WIDTH, WIDTH, 1)
    level, drop = load_levels(lse, delta, batch, row, R)
    if BLOCK_D == BLOCK_C:
        rows = load_rows(query, batch, row, row < R, query_stride, column, WIDTH)
        slopes = load_rows(d_out, batch, row, row < R, query_stride, column, WIDTH)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for begin in range(loop_bound(first), loop_bound(last), BLOCK_K):
        place = begin + tl.arange(0, BLOCK_K)
        key, seen = find_keys(place, batch, key_mask, mask_b, mask_m, index, index_b, index_k, M, K)
        if BLOCK_D == BLOCK_C:
            value, keys = load_keys(memory, position, batch, key, seen, column, memory_stride, position_stride, WIDTH)
            score = tl.dot(rows, tl.trans(keys), input_precision="ieee")  # [BLOCK_R, BLOCK_K]
            d_weight = tl.dot(slopes, tl.trans(value), input_precision="ieee")
        else:
            score = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
            d_weight = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
            for chunk in range(0, BLOCK_C, BLOCK_D):
                some = chunk + tl.arange(0, BLOCK_D)
                rows = load_rows(query, batch, row, row < R, query_stride, some, WIDTH)
                slopes = load_rows(d_out, batch, row, row < R, query_stride, some, WIDTH)
                value, keys = load_keys(memory, position, batch, key, seen, some, memory_stride, position_stride, WIDTH)
                score = tl.dot(rows, tl.trans(keys), score, input_precision="ieee")
                d_weight = tl.dot(slopes, tl.trans(value), d_weight, input_precision="ieee")
            value, keys = load_keys(memory, position, batch, key, seen, column, memory_stride, position_stride, WIDTH)
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


@nvtx_range("bridge_stg.attend_memory_backward")
def backward(call: AttentionBackward) -> tuple[Tensor | None, ...]:
    """Gradients of query, memory, position and bias, None for one that is not needed.

    The forward runs again where its output was not saved.
    """
    inputs = call.inputs
    if call.saved.dim() != 3:
        call = call._replace(saved=forward(inputs)[0])
    d_query, d_bias, rows = layer_backward(call)
    d_memory = d_position = None
    if call.need_memory or call.need_position:
        d_memory, d_position = memory_gradients(
            [rows], inputs.memory, inputs.position, call.need_position, inputs.index, inputs.window
        )
    return d_query, d_memory if call.need_memory else None, d_position, d_bias


def layer_backward(call: AttentionBackward) -> tuple[Tensor | None, Tensor | None, LayerRows]:
    """Gradients of query and bias where needed, and what `memory_gradients` takes of this call."""
    inputs = kernel_inputs(call.inputs)
    query = inputs.query
    d_out = torch.zeros_like(query) if call.grad_out is None else call.grad_out.to(query.dtype).contiguous()
    with torch.cuda.device_of(query):
        delta = _row_delta(d_out, call.saved, call.grad_lse)
        rows = LayerRows(query, d_out, call.lse, delta, inputs.bias, inputs.key_mask, inputs.scale)
        d_query = d_bias = None
        if call.need_query or call.need_bias:
            d_query, d_bias = _query_gradients(inputs, rows, call.need_bias)
    return d_query.to(call.inputs.query.dtype) if d_query is not None and call.need_query else None, d_bias, rows


def _row_delta(d_out: Tensor, out: Tensor, d_lse: Tensor | None) -> Tensor:
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


def _query_gradients(inputs: AttentionInputs, layer: LayerRows, need_bias: bool) -> tuple[Tensor, Tensor | None]:
    """d query [B, R, C], and d bias [B, M] where it is needed."""
    query, bias = inputs.query, inputs.bias
    batch, rows, width = query.shape
    keys, size = inputs.key_count, inputs.memory.shape[1]
    tile = query_tile(inputs)
    row_tiles, options = triton.cdiv(rows, tile.rows), tile.options(width)
    chunks = options["BLOCK_C"] // tile.columns
    splits, length = split_keys(batch * row_tiles * chunks, keys, tile.keys, multiprocessors(query.device))
    d_query = torch.empty_like(query)
    parts = d_query if splits == 1 else layer.delta.new_empty((batch, splits, rows, width))
    share = layer.delta.new_empty((batch, row_tiles, keys)) if need_bias else None
    if query.numel():
        attend_memory_query_gradient[batch * splits * row_tiles, chunks](
            parts, share, query, layer.d_out, layer.lse, layer.delta, *key_arguments(inputs),
            inputs.scale, size, rows, keys, splits, length, **options,
        )  # fmt: skip
        if splits > 1:
            merge_splits(d_query, None, parts, None)
    if share is None or bias is None:
        return d_query, None
    d_bias = share.sum(dim=1)
    if inputs.index is not None:
        return d_query, sum_places(d_bias[:, :, None], inputs.index, size, bias.dtype)[:, :, 0]
    return d_query, d_bias.to(bias.dtype)
