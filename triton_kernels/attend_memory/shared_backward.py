"""`attend_memory` in Triton: the gradient of one memory from every layer that attended to it, in one launch.

A program owns a tile of keys and walks over the packed rows of all layers, so that d memory and d position are
written once and nothing is added across programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.nvtx import nvtx_range
from .loads import (
    LOG2E,
    SIDES,
    find_keys,
    kernel_inputs,
    key_arguments,
    load_keys,
    load_levels,
    load_rows,
    load_windows,
    loop_bound,
)
from .merge import sum_places
from .records import AttentionInputs
from .tiles import memory_tile


class LayerRows(NamedTuple):
    """What one layer adds to the gradient of the memory that it attended to.

    Attributes:
        query, d_out: [B, R, C] in the dtype of the memory.
        lse: [B, R] float32.
        delta: [B, R] float32, rowsum(d_out * out) - d_lse.
        bias: [B, M] or None.
        key_mask: [B, M] bool or None.
        scale: factor on the products.
    """

    query: Tensor
    d_out: Tensor
    lse: Tensor
    delta: Tensor
    bias: Tensor | None
    key_mask: Tensor | None
    scale: float


@triton.jit(do_not_specialize=["M", "R", "K", "bias_l", *SIDES])
def attend_memory_memory_gradient(
    d_memory, d_position, query, d_out, lse, delta, scale, layer,
    memory, position, bias, key_mask, index, window,
    memory_stride, position_stride, bias_b, bias_m, mask_b, mask_m, index_b, index_k, window_b, window_r, window_e,
    bias_l, M, R, K,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Differentiate one tile of keys over all rows: d memory [B, K, C] and, if wanted, d position [B, K, C].

    query and d_out [B, R, C], lse and delta [B, R] are contiguous, scale [R] and layer [R] belong to a row; the bias
    of a row is bias + layer * bias_l. With BLOCK_D < BLOCK_C the second grid axis walks over columns of the output.
    """
    key_tiles = tl.cdiv(K, BLOCK_K)
    batch = (tl.program_id(0) // key_tiles).to(tl.int64)
    place = tl.program_id(0) % key_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    key, seen = find_keys(place, batch, key_mask, mask_b, mask_m, index, index_b, index_k, M, K)
    query_stride = (R.to(tl.int64) * WIDTH, WIDTH, 1)
    if BLOCK_D == BLOCK_C:
        value, keys = load_keys(memory, position, batch, key, seen, column, memory_stride, position_stride, WIDTH)
    if bias is not None:
        bias += batch * bias_b + key * bias_m  # [BLOCK_K]
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    offset = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for begin in range(0, loop_bound(R), BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        touched = True
        if window is not None:
            start, end = load_windows(window, batch, row, window_b, window_r, window_e, R, K)
            near = (start < end) & (start <= tl.max(place)) & (end > tl.min(place))
            touched = tl.max(near.to(tl.int32)) > 0
        if touched:
            if BLOCK_D == BLOCK_C:
                rows = load_rows(query, batch, row, row < R, query_stride, column, WIDTH)
                slopes = load_rows(d_out, batch, row, row < R, query_stride, column, WIDTH)
                score = tl.dot(keys, tl.trans(rows), input_precision="ieee")  # [BLOCK_K, BLOCK_R]
                d_weight = tl.dot(value, tl.trans(slopes), input_precision="ieee")
            else:
                score = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
                d_weight = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
                for chunk in range(0, BLOCK_C, BLOCK_D):
                    some = chunk + tl.arange(0, BLOCK_D)
                    value, keys = load_keys(
                        memory, position, batch, key, seen, some, memory_stride, position_stride, WIDTH
                    )
                    rows = load_rows(query, batch, row, row < R, query_stride, some, WIDTH)
                    slopes = load_rows(d_out, batch, row, row < R, query_stride, some, WIDTH)
                    score = tl.dot(keys, tl.trans(rows), score, input_precision="ieee")
                    d_weight = tl.dot(value, tl.trans(slopes), d_weight, input_precision="ieee")
                rows = load_rows(query, batch, row, row < R, query_stride, column, WIDTH)
                slopes = load_rows(d_out, batch, row, row < R, query_stride, column, WIDTH)
            factor = tl.load(scale + row, mask=row < R, other=0.0)
            level, drop = load_levels(lse, delta, batch, row, R)
            score *= (factor * LOG2E)[None, :]
            if bias is not None:
                number = tl.load(layer + row, mask=row < R, other=0).to(tl.int64)
                extra = tl.load(bias[:, None] + number[None, :] * bias_l, mask=seen[:, None], other=0.0)
                score += extra.to(tl.float32) * LOG2E
            visible = seen[:, None]
            if window is not None:
                visible &= (place[:, None] >= start[None, :]) & (place[:, None] < end[None, :])
            weight = tl.where(visible, tl.math.exp2(score - level[None, :]), 0.0)
            d_score = (weight * (d_weight - drop[None, :]) * factor[None, :]).to(rows.dtype)
            weight = weight.to(rows.dtype)
            if d_position is None:
                total = tl.dot(d_score, rows, total, input_precision="ieee")
            else:
                offset = tl.dot(d_score, rows, offset, input_precision="ieee")
            total = tl.dot(weight, slopes, total, input_precision="ieee")
    output = (batch * K + place)[:, None] * WIDTH + column[None, :]
    mask = (place < K)[:, None] & (column < WIDTH)[None, :]
    if d_position is not None:
        tl.store(d_position + output, offset.to(d_position.dtype.element_ty), mask=mask)
        total += offset
    tl.store(d_memory + output, total.to(d_memory.dtype.element_ty), mask=mask)


@nvtx_range("bridge_stg.attend_memory_shared_backward")
def memory_gradients(
    layers: Sequence[LayerRows],
    memory: Tensor,
    position: Tensor | None,
    need_position: bool,
    index: Tensor | None = None,
    window: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """d memory [B, M, C] and, where it is needed, d position: sums over layers.

    Args:
        layers: at least one; their rows may differ in number, their bias and key_mask too.
        memory: [B, M, C], by its strides.
        position: [B, M, C] or None.
        need_position: whether to compute the gradient of the position.
        index, window: as in `AttentionInputs`; the window is that of the packed rows of all layers.
    """
    batch, size, width = memory.shape
    query, d_out, lse, delta = (_pack(parts) for parts in zip(*(layer[:4] for layer in layers), strict=True))
    bias, mask = _sides(layers)
    one_bias = None if bias is None else bias[0]
    inputs = kernel_inputs(AttentionInputs(query, memory, position, one_bias, mask, index, window, scale=0.0))
    keys, rows = inputs.key_count, query.shape[1]
    d_memory = query.new_empty((batch, keys, width), dtype=inputs.memory.dtype if index is None else torch.float32)
    d_position = torch.empty_like(d_memory) if need_position else None
    with torch.cuda.device_of(memory):
        if d_memory.numel():
            tile = memory_tile(inputs)
            options = tile.options(width)
            number = None if bias is None else _per_row(layers, range(len(layers)), torch.int32)
            scale = _per_row(layers, [layer.scale for layer in layers], torch.float32)
            attend_memory_memory_gradient[batch * triton.cdiv(keys, tile.keys), options["BLOCK_C"] // tile.columns](
                d_memory, d_position, inputs.query, d_out.to(inputs.query.dtype), lse, delta, scale, number,
                *key_arguments(inputs), 0 if bias is None else bias.stride(0), size, rows, keys, **options,
            )  # fmt: skip
        if index is not None:
            d_memory = sum_places(d_memory, index, size, memory.dtype)
            d_position = None if d_position is None else sum_places(d_position, index, size, memory.dtype)
    return d_memory.to(memory.dtype), None if d_position is None else d_position.to(memory.dtype)


def _pack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(tuple(parts), dim=1)


def _per_row(layers: Sequence[LayerRows], values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """For each packed row the value of its layer: [R], filled on the device."""
    counts = [layer.query.shape[1] for layer in layers]
    if len(set(values)) == 1:
        counts, values = [sum(counts)], values[:1]
    device = layers[0].query.device
    parts = [torch.full((n,), x, dtype=dtype, device=device) for n, x in zip(counts, values, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sides(layers: Sequence[LayerRows]) -> tuple[Tensor | None, Tensor | None]:
    """bias [layers, B, M] and key_mask [B, M] of all layers; masks that differ between layers go into the bias."""
    mask = layers[0].key_mask
    biases = [layer.bias for layer in layers]
    if any(layer.key_mask is not mask for layer in layers):
        mask, biases = None, [_mask_bias(layer) for layer in layers]
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None, mask
    if len(layers) == 1:
        return given[0][None], mask
    total = torch.zeros((len(layers), *given[0].shape), dtype=torch.float32, device=given[0].device)
    for number, bias in enumerate(biases):
        if bias is not None:
            total[number] = bias
    return total, mask


def _mask_bias(layer: LayerRows) -> Tensor | None:
    """The bias of a layer, -inf where its mask hides a key."""
    if layer.key_mask is None:
        return layer.bias
    return torch.where(layer.key_mask, 0.0 if layer.bias is None else layer.bias.float(), -torch.inf)
