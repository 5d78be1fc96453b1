"""How the kernels of `attend_memory` take the tensors of a call, and how they read tiles of them."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .records import AttentionInputs

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Arguments that vary from call to call: one compiled kernel serves all their values.
SIZES = ["M", "R", "K", "splits", "split_size"]
SIDES = ["bias_b", "bias_m", "mask_b", "mask_m", "index_b", "index_k", "window_b", "window_r", "window_e"]


def kernel_inputs(inputs: AttentionInputs) -> AttentionInputs:
    """Make the query contiguous.

    On the CPU, where only the interpreter runs, bfloat16 becomes float32: `tl.dot` of the interpreter is silently wrong
    for bfloat16.
    """

    def widened(x: Tensor) -> Tensor:
        return x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x

    position = None if inputs.position is None else widened(inputs.position)
    return inputs._replace(query=widened(inputs.query).contiguous(), memory=widened(inputs.memory), position=position)


def key_arguments(inputs: AttentionInputs) -> tuple[Any, ...]:
    """Return memory, position, bias, key mask, index and window as kernels take them, then their strides.

    The strides of memory and position are a tuple each. Those of the others, `SIDES`, are single arguments: Triton
    specialises what lies in a tuple, whatever `do_not_specialize` says.
    """
    mask = None if inputs.key_mask is None else inputs.key_mask.view(torch.uint8)
    tensors = (inputs.memory, inputs.position, inputs.bias, mask, inputs.index, inputs.window)
    axes = (3, 3, 2, 2, 2, 3)
    memory, position, *sides = ((0,) * n if x is None else x.stride() for x, n in zip(tensors, axes, strict=True))
    return *tensors, memory, position, *(stride for side in sides for stride in side)


if os.environ.get("TRITON_INTERPRET") == "1":

    def loop_bound(bound):
        """A bound of `range`: the interpreter of Triton 3.6 cannot turn its tensors into numbers under NumPy 2.4."""
        return bound.handle.data.item() if isinstance(bound, tl.tensor) else bound

else:

    @triton.jit
    def loop_bound(bound):
        return bound


@triton.jit
def find_keys(place, batch, key_mask, mask_b, mask_m, index, index_b, index_k, M, K):
    """Find the rows of the memory (int64) at places of the key list, and which of them are keys: [BLOCK_K] each."""
    seen = place < K
    key = place.to(tl.int64)
    if index is not None:
        key = tl.load(index + batch * index_b + key * index_k, mask=seen, other=-1)
        seen &= (key >= 0) & (key < M)
    if key_mask is not None:
        seen &= tl.load(key_mask + batch * mask_b + key * mask_m, mask=seen, other=0) != 0
    return key, seen


@triton.jit
def load_rows(pointer, batch, row, seen, stride, column, WIDTH: tl.constexpr):
    """Load columns of the rows that are seen, zeros for the others: [rows, columns]."""
    offset = row.to(tl.int64)[:, None] * stride[1] + column[None, :] * stride[2]
    mask = seen[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + batch * stride[0] + offset, mask=mask, other=0.0)


@triton.jit
def load_keys(
    memory, position, batch, key, seen, column, memory_stride, position_stride, WIDTH: tl.constexpr
):  # fmt: skip
    """Load a tile of the memory, as values and, with the position added, as keys: [BLOCK_K, columns] each."""
    value = load_rows(memory, batch, key, seen, memory_stride, column, WIDTH)
    keys = value
    if position is not None:
        offset = load_rows(position, batch, key, seen, position_stride, column, WIDTH)
        keys = (value.to(tl.float32) + offset.to(tl.float32)).to(value.dtype)
    return value, keys


@triton.jit
def load_windows(window, batch, row, window_b, window_r, window_e, R, K):
    """Load the window of each row, cut to 0..K and empty for rows past R: first keys and ends, [BLOCK_R] each."""
    pointer = window + batch * window_b + row.to(tl.int64) * window_r
    start = tl.load(pointer, mask=row < R, other=0).to(tl.int64)
    end = tl.load(pointer + window_e, mask=row < R, other=0).to(tl.int64)
    end = tl.minimum(tl.maximum(end, 0), K).to(tl.int32)
    return tl.minimum(tl.maximum(start, 0), K).to(tl.int32), end


@triton.jit
def load_levels(lse, delta, batch, row, R):
    """Load lse in powers of two, infinite for a row that sees nothing (its P are then 0), and delta: [BLOCK_R] each."""
    level = tl.load(lse + batch * R + row, mask=row < R, other=float("-inf"))
    blind = level == float("-inf")
    drop = tl.load(delta + batch * R + row, mask=row < R, other=0.0)
    return tl.where(blind, float("inf"), level * LOG2E), tl.where(blind, 0.0, drop)


@triton.jit
def key_range(start, end, first, last, BLOCK_K: tl.constexpr):
    """Cut first..last to what any row of a tile may see; the begin stays on a multiple of BLOCK_K."""
    begin = tl.min(tl.where(start < end, start, last)) // BLOCK_K * BLOCK_K
    stop = tl.max(tl.where(start < end, end, 0))
    return tl.maximum(first, begin), tl.minimum(last, stop)
