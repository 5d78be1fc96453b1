"""Rows of a program, in segments of equal length or packed ones, and the search for rows among sorted positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def segment_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides (segment, row, feature) of [B, n, D] or of packed rows [n, D], which have none of segments."""
    if x is None:
        return (0, 0, 0)
    return x.stride() if x.dim() == 3 else (0, *x.stride())


def tile_count(length: int, segments: int, block: int, packed: bool) -> int:
    """How many programs `locate` needs for all tiles of `block` rows."""
    return length // block + segments if packed else segments * triton.cdiv(length, block)


def safe_offsets(cu_seqlens: Tensor, rows: int, index: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Offsets [S + 1] int64 of the segments among the rows and, given the kept rows, among those.

    They are safe to follow whatever `cu_seqlens` holds; see `bounds_kernel`.
    """
    bounds = cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)
    offsets = None if index is None else torch.empty_like(bounds)
    bounds_kernel[(1,)](
        cu_seqlens,
        bounds,
        index,
        offsets,
        cu_seqlens.shape[0] - 1,
        rows,
        0 if index is None else index.shape[0],
        cu_seqlens.stride(0),
        BLOCK=256,
        num_warps=4,
    )
    return bounds, offsets


@triton.jit
def locate(program, bounds, segments, length, BLOCK: tl.constexpr, PACKED: tl.constexpr, COVER: tl.constexpr = False):
    """Segment of a program, that segment's first row and number of rows, and the program's tile within it.

    Equal segments of `length` rows have cdiv(length, BLOCK) tiles each. Only the device knows the lengths of packed
    segments: with `length` rows in all, length // BLOCK + segments programs always suffice when segment s starts at
    program bounds[s] // BLOCK + s (`bounds` of `bounds_kernel`); the programs left over get a tile past the end. COVER
    extends the first and the last segment to all rows.
    """
    if PACKED:
        low = program * 0
        high = low + segments - 1
        while low < high:
            middle = (low + high + 1) // 2
            ours = tl.load(bounds + middle) // BLOCK + middle <= program
            low = tl.where(ours, middle, low)
            high = tl.where(ours, high, middle - 1)
        segment = low
        start = tl.load(bounds + segment)
        end = tl.load(bounds + segment + 1)
        tile = program - (start // BLOCK + segment).to(tl.int32)
        if COVER:
            tile = tl.where(segment == 0, program, tile)
            start = tl.where(segment == 0, start * 0, start)
            end = tl.where(segment == segments - 1, end * 0 + length, end)
        size = (end - start).to(tl.int32)
    else:
        tiles = (length + BLOCK - 1) // BLOCK
        segment = program // tiles
        tile = program % tiles
        start = segment.to(tl.int64) * length
        size = length
    return segment, start, size, tile


@triton.jit
def lower_bound(positions, count, wanted):
    """How many of the ascending `positions` [count] lie below each `wanted`; -1 stands only at the end, above all."""
    low = (wanted * 0).to(tl.int32)
    high = low + count
    left = count
    while left > 0:
        middle = (low + high) // 2
        value = tl.load(positions + middle, mask=low < high, other=-1)
        below = (value >= 0) & (value < wanted)
        low, high = tl.where(below, middle + 1, low), tl.where(below | (low >= high), high, middle)
        left = left // 2
    return low


@triton.jit
def find_rows(positions, count, wanted):
    """Place of each `wanted` row among the ascending `positions` [count], and whether it is there."""
    place = lower_bound(positions, count, wanted)
    value = tl.load(positions + place, mask=place < count, other=-1)
    return place, value == wanted


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["segments", "rows", "capacity"])
def bounds_kernel(cu_seqlens, bounds, index, offsets, segments, rows, capacity, stride, BLOCK: tl.constexpr):
    """One program writes offsets that are safe to follow, whatever `cu_seqlens` holds.

    Args:
        cu_seqlens: [S + 1] by its stride.
        bounds: [S + 1] int64, written: each offset kept inside 0..R, and at least the one before.
        index: [capacity] int64 kept rows, ascending, -1 at the end; or None.
        offsets: [S + 1] int64, written where there is an index: where each segment begins among the kept rows.
    """
    highest = (segments * 0).to(tl.int64)
    first = segments * 0
    while first <= segments:
        s = first + tl.arange(0, BLOCK)
        inside = s <= segments
        row = tl.load(cu_seqlens + s.to(tl.int64) * stride, mask=inside, other=0).to(tl.int64)
        row = tl.minimum(tl.maximum(row, 0), rows)
        row = tl.maximum(tl.associative_scan(row, 0, larger), highest)
        tl.store(bounds + s, row, mask=inside)
        if index is not None:
            tl.store(offsets + s, lower_bound(index, capacity, row).to(tl.int64), mask=inside)
        highest = tl.max(row, 0)
        first += BLOCK
