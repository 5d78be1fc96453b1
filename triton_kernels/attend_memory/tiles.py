"""What the kernels of `attend_memory` share: tile shapes by problem shape, and how rows of the memory are read."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Arguments that vary from call to call: one compiled kernel serves all their values.
SIZES = ["M", "R", "K", "splits", "split_size"]
SIDES = ["bias_b", "bias_m", "mask_b", "mask_m", "index_b", "index_k", "window_b", "window_r", "window_e"]

WIDTHS = (64, 128, 256, 512)
MOST_SPLITS = 128


def widened(*tensors: Tensor | None) -> Any:
    """The tensors with bfloat16 made float32 where the interpreter runs, whose `tl.dot` of it is silently wrong.

    None where the call may go on as it is.
    """
    wrong = [x is not None and x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors]
    if not any(wrong):
        return None
    return tuple(x if x is None or not narrow else x.float() for x, narrow in zip(tensors, wrong, strict=True))


class Tile(NamedTuple):
    """Rows and keys of a tile, columns of its output, warps and pipeline stages.

    Found by compiling for sm_80, sm_90 and sm_100 with Triton 3.6 and 3.8: none of them puts registers on the stack.
    Fewer columns than the width mean that scores are taken again for each chunk of the output.
    """

    rows: int
    keys: int
    columns: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {
            "BLOCK_R": self.rows,
            "BLOCK_K": self.keys,
            "BLOCK_D": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# For widths that are no multiple of 16, whose loads take many registers.
ODD_TILE = Tile(16, 16, 32, 8, 1)


def padded_width(width: int) -> int:
    """Columns of the tiles for rows of `width` <= 512 numbers."""
    return next(padded for padded in WIDTHS if width <= padded)


def forward_tile(rows: int, width: int, itemsize: int, plain: bool) -> Tile:
    """Tile of the forward; `plain` without position, index and window, which take registers."""
    if width % 16:
        return ODD_TILE._replace(warps=4)
    padded = padded_width(width)
    if itemsize == 4:
        return Tile(16, 32, 64, 4, 1)
    if padded == 512:
        return Tile(32, 64, 256, 8, 2)
    return Tile(64 if plain and padded == 256 and rows > 32 else 32, 64, padded, 4 if padded == 64 else 8, 2)


def query_tile(rows: int, width: int, itemsize: int, plain: bool) -> Tile:
    """Tile of the gradient of the query; `plain` as in `forward_tile`."""
    if width % 16:
        return ODD_TILE
    padded = padded_width(width)
    if itemsize == 4:
        return Tile(16, 16, 64, 8, 1)
    if padded == 512:
        return Tile(16, 32, 256, 8, 1)
    return Tile(64 if plain and padded == 256 and rows > 32 else 32, 32, padded, 4 if padded == 64 else 8, 2)


def memory_tile(width: int, itemsize: int, plain: bool) -> Tile:
    """Tile of the gradient of the memory; `plain` as in `forward_tile`."""
    if width % 16:
        return ODD_TILE
    padded = padded_width(width)
    if itemsize == 4:
        return Tile(16, 16, 64, 4, 1)
    if padded == 512:
        return Tile(16, 16 if plain else 32, 128, 8, 1)
    return Tile(16 if padded == 256 and not plain else 32, 32, padded, 4 if padded == 64 else 8, 2)


def is_plain(position: Tensor | None, index: Tensor | None, window: Tensor | None) -> bool:
    return position is None and index is None and window is None


def mass_tile(width: int, itemsize: int) -> Tile:
    """Tile of the attention mass; its columns are a step along the width."""
    if width % 16:
        return ODD_TILE
    return Tile(16, 32, 32, 4, 1) if itemsize == 4 else Tile(32, 64, 64, 4, 2)


def split_keys(programs: int, keys: int, block: int, processors: int) -> tuple[int, int]:
    """Splits of the keys that fill the machine, and keys in each, a multiple of `block`.

    Args:
        programs: programs there are without splitting.
        processors: multiprocessors of the device.
    """
    tiles = triton.cdiv(max(keys, 1), block)
    wanted = max(1, min(processors // max(programs, 1), MOST_SPLITS, tiles // 2))
    size = triton.cdiv(tiles, wanted) * block
    return triton.cdiv(max(keys, 1), size), size


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
    """Rows of the memory (int64) at places of the key list, and which of them are keys: [BLOCK_K] each."""
    seen = place < K
    key = place.to(tl.int64)
    if index is not None:
        key = tl.load(index + batch * index_b + key * index_k, mask=seen, other=-1)
        seen &= (key >= 0) & (key < M)
    if key_mask is not None:
        seen &= tl.load(key_mask + batch * mask_b + key * mask_m, mask=seen, other=0) != 0
    return key, seen


@triton.jit
def load_rows(pointer, batch, row, seen, stride_b, stride_m, stride_c, column, WIDTH: tl.constexpr):
    """Columns of the rows that are seen, zeros for the others: [rows, columns]."""
    offset = row.to(tl.int64)[:, None] * stride_m + column[None, :] * stride_c
    mask = seen[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + batch * stride_b + offset, mask=mask, other=0.0)


@triton.jit
def load_keys(
    memory, position, batch, key, seen, column, 
    memory_b, memory_m, memory_c, position_b, position_m, position_c, WIDTH: tl.constexpr,
):  # fmt: skip
    """Tiles of the memory, as values and, with the position added, as keys: [BLOCK_K, columns] each."""
    value = load_rows(memory, batch, key, seen, memory_b, memory_m, memory_c, column, WIDTH)
    keys = value
    if position is not None:
        offset = load_rows(position, batch, key, seen, position_b, position_m, position_c, column, WIDTH)
        keys = (value.to(tl.float32) + offset.to(tl.float32)).to(value.dtype)
    return value, keys


@triton.jit
def load_windows(window, batch, row, window_b, window_r, window_e, R, K):
    """First key and end of the keys of each row, cut to 0..K; an empty range for rows past R: [BLOCK_R] each."""
    pointer = window + batch * window_b + row.to(tl.int64) * window_r
    start = tl.load(pointer, mask=row < R, other=0).to(tl.int64)
    end = tl.load(pointer + window_e, mask=row < R, other=0).to(tl.int64)
    end = tl.minimum(tl.maximum(end, 0), K).to(tl.int32)
    return tl.minimum(tl.maximum(start, 0), K).to(tl.int32), end


@triton.jit
def load_levels(lse, delta, batch, row, R):
    """lse in powers of two, infinite for a row that sees nothing so that its P are 0, and delta: [BLOCK_R] each."""
    level = tl.load(lse + batch * R + row, mask=row < R, other=float("-inf"))
    blind = level == float("-inf")
    drop = tl.load(delta + batch * R + row, mask=row < R, other=0.0)
    return tl.where(blind, float("inf"), level * LOG2E), tl.where(blind, 0.0, drop)


@triton.jit
def key_range(start, end, first, last, BLOCK_K: tl.constexpr):
    """The part of first..last that holds what any row of a tile may see; its begin stays on a multiple of BLOCK_K."""
    begin = tl.min(tl.where(start < end, start, last)) // BLOCK_K * BLOCK_K
    stop = tl.max(tl.where(start < end, end, 0))
    return tl.maximum(first, begin), tl.minimum(last, stop)


def key_arguments(
    memory: Tensor,
    position: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    index: Tensor | None,
    window: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """The six tensors as kernels take them, and the fifteen strides of these."""
    seen = None if key_mask is None else key_mask.view(torch.uint8)
    tensors = (memory, position, bias, seen, index, window)
    axes = (3, 3, 2, 2, 2, 3)
    strides = [
        stride
        for tensor, count in zip(tensors, axes, strict=True)
        for stride in ((0,) * count if tensor is None else tensor.stride())
    ]
    return tensors, tuple(strides)
