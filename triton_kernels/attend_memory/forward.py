"""`attend_memory` in Triton: the forward over splits of the keys, and the attention mass.

A program holds a tile of packed rows (heads x queries) and reads its part of the keys once, as keys and as values.
The parts are merged by their log-sum-exp in a fixed order. Nothing is kept for the backward, which computes the
probabilities again from `lse`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import multiprocessors
from ..common.nvtx import nvtx_range
from .loads import (
    LN2,
    LOG2E,
    SIDES,
    SIZES,
    find_keys,
    kernel_inputs,
    key_arguments,
    key_range,
    load_keys,
    load_rows,
    load_windows,
    loop_bound,
)
from .merge import merge_splits, sum_places
from .records import AttentionInputs
from .tiles import forward_tile, mass_tile, split_keys


@triton.jit(do_not_specialize=SIZES + SIDES)
def attend_memory_forward(
    out, lse, query, memory, position, bias, key_mask, index, window,
    memory_stride, position_stride, bias_b, bias_m, mask_b, mask_m, index_b, index_k, window_b, window_r, window_e,
    scale, M, R, K, splits, split_size,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of rows to one split of the keys: out [B, splits, R, C] and lse [B, splits, R] of that part.

    query [B, R, C] is contiguous. With BLOCK_D < BLOCK_C the second grid axis walks over columns of the output, and
    the scores are summed over chunks of BLOCK_D columns.
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
        first, last = key_range(start, end, first, last, BLOCK_K)
    query_stride = (R.to(tl.int64) * WIDTH, WIDTH, 1)
    if BLOCK_D == BLOCK_C:
        rows = load_rows(query, batch, row, row < R, query_stride, column, WIDTH)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    mean = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for begin in range(loop_bound(first), loop_bound(last), BLOCK_K):
        place = begin + tl.arange(0, BLOCK_K)
        key, seen = find_keys(place, batch, key_mask, mask_b, mask_m, index, index_b, index_k, M, K)
        if BLOCK_D == BLOCK_C:
            value, keys = load_keys(memory, position, batch, key, seen, column, memory_stride, position_stride, WIDTH)
            score = tl.dot(rows, tl.trans(keys), input_precision="ieee")  # [BLOCK_R, BLOCK_K]
        else:
            score = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
            for chunk in range(0, BLOCK_C, BLOCK_D):
                some = chunk + tl.arange(0, BLOCK_D)
                rows = load_rows(query, batch, row, row < R, query_stride, some, WIDTH)
                value, keys = load_keys(memory, position, batch, key, seen, some, memory_stride, position_stride, WIDTH)
                score = tl.dot(rows, tl.trans(keys), score, input_precision="ieee")
            value = load_rows(memory, batch, key, seen, memory_stride, column, WIDTH)
        score *= scale * LOG2E
        if bias is not None:
            extra = tl.load(bias + batch * bias_b + key * bias_m, mask=seen, other=0.0).to(tl.float32)
            score += (extra * LOG2E)[None, :]
        visible = seen[None, :]
        if window is not None:
            visible &= (place[None, :] >= start[:, None]) & (place[None, :] < end[:, None])
        score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.math.exp2(score - shift[:, None])
        fade = tl.math.exp2(peak - shift)
        total = total * fade + tl.sum(weight, axis=1)
        mean = tl.dot(weight.to(value.dtype), value, mean * fade[:, None], input_precision="ieee")
        peak = higher
    blind = total == 0.0
    mean = mean / tl.where(blind, 1.0, total)[:, None]
    place = part.to(tl.int64) * R + row
    mask = (row < R)[:, None] & (column < WIDTH)[None, :]
    tl.store(out + place[:, None] * WIDTH + column[None, :], mean.to(out.dtype.element_ty), mask=mask)
    level = tl.where(blind, float("-inf"), (peak + tl.math.log2(tl.where(blind, 1.0, total))) * LN2)
    tl.store(lse + place, level, mask=(row < R) & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=["M", "R", "K", *SIDES])
def attend_memory_mass(
    mass, query, lse, memory, position, bias, key_mask, index, window,
    memory_stride, position_stride, bias_b, bias_m, mask_b, mask_m, index_b, index_k, window_b, window_r, window_e,
    scale, M, R, K,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the probabilities of one tile of keys over all rows: mass [B, K]."""
    key_tiles = tl.cdiv(K, BLOCK_K)
    batch = (tl.program_id(0) // key_tiles).to(tl.int64)
    place = tl.program_id(0) % key_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    key, seen = find_keys(place, batch, key_mask, mask_b, mask_m, index, index_b, index_k, M, K)
    if bias is not None:
        extra = tl.load(bias + batch * bias_b + key * bias_m, mask=seen, other=0.0).to(tl.float32) * LOG2E
    query_stride = (R.to(tl.int64) * WIDTH, WIDTH, 1)
    total = tl.zeros([BLOCK_K], tl.float32)
    for begin in range(0, loop_bound(R), BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        score = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for chunk in range(0, BLOCK_C, BLOCK_D):
            column = chunk + tl.arange(0, BLOCK_D)
            rows = load_rows(query, batch, row, row < R, query_stride, column, WIDTH)
            _, keys = load_keys(memory, position, batch, key, seen, column, memory_stride, position_stride, WIDTH)
            score = tl.dot(rows, tl.trans(keys), score, input_precision="ieee")
        score *= scale * LOG2E
        if bias is not None:
            score += extra[None, :]
        visible = seen[None, :]
        if window is not None:
            start, end = load_windows(window, batch, row, window_b, window_r, window_e, R, K)
            visible &= (place[None, :] >= start[:, None]) & (place[None, :] < end[:, None])
        level = tl.load(lse + batch * R + row, mask=row < R, other=float("inf"))
        level = tl.where(level == float("-inf"), float("inf"), level * LOG2E)  # a blind row weighs nothing
        total += tl.sum(tl.where(visible, tl.math.exp2(score - level[:, None]), 0.0), axis=0)
    tl.store(mass + batch * K + place, total, mask=place < K)


@nvtx_range("bridge_stg.attend_memory")
def forward(
    inputs: AttentionInputs, return_mass: bool = False, stash: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [B, R, C], lse [B, R] float32, mass [B, M] float32 or empty, an empty tensor): nothing is stashed.

    A query that is not contiguous is copied; memory and position are read by their strides.
    """
    dtype, inputs = inputs.query.dtype, kernel_inputs(inputs)
    batch, rows, width = inputs.query.shape
    out = torch.empty_like(inputs.query)
    lse = out.new_empty((batch, rows), dtype=torch.float32)
    if out.numel():
        tile = forward_tile(inputs)
        row_tiles = triton.cdiv(rows, tile.rows)
        with torch.cuda.device_of(out):
            options = tile.options(width)
            chunks = options["BLOCK_C"] // tile.columns
            processors = multiprocessors(out.device)
            splits, size = split_keys(batch * row_tiles * chunks, inputs.key_count, tile.keys, processors)
            parts, part_lse = out, lse
            if splits > 1:
                parts, part_lse = lse.new_empty((batch, splits, rows, width)), lse.new_empty((batch, splits, rows))
            attend_memory_forward[batch * splits * row_tiles, chunks](
                parts, part_lse, inputs.query, *key_arguments(inputs),
                inputs.scale, inputs.memory.shape[1], rows, inputs.key_count, splits, size, **options,
            )  # fmt: skip
            if splits > 1:
                merge_splits(out, lse, parts, part_lse)
    else:
        lse.fill_(-torch.inf)
    mass = attention_mass(inputs, lse) if return_mass else lse.new_empty(0)
    return out.to(dtype), lse, mass, lse.new_empty(0)  # no two outputs may be one tensor


def attention_mass(inputs: AttentionInputs, lse: Tensor) -> Tensor:
    """The mass [B, M] float32 of each row of the memory, from the lse [B, R] of the forward."""
    batch, rows, width = inputs.query.shape
    size, keys = inputs.memory.shape[1], inputs.key_count
    if inputs.query.numel() == 0 or keys == 0:
        return lse.new_zeros((batch, size))
    mass = lse.new_empty((batch, keys))
    tile = mass_tile(inputs)
    with torch.cuda.device_of(mass):
        attend_memory_mass[(batch * triton.cdiv(keys, tile.keys),)](
            mass, inputs.query, lse, *key_arguments(inputs), inputs.scale, size, rows, keys, **tile.options(width)
        )
        return mass if inputs.index is None else sum_places(mass[:, :, None], inputs.index, size, mass.dtype)[:, :, 0]
