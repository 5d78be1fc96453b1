"""Tile shapes of the kernels of `attend_memory` by problem shape, and splits of the keys."""

from __future__ import annotations

from typing import NamedTuple

import triton

from .records import AttentionInputs

WIDTHS = (64, 128, 256, 512)
MOST_SPLITS = 128


class Tile(NamedTuple):
    """Rows and keys of a tile, columns of its output, warps and pipeline stages.

    The shapes were found by compiling for sm_80, sm_90 and sm_100 with Triton 3.6 and 3.8: with none of them are
    registers put on the stack. Where the columns are fewer than the width, scores are computed again for each chunk of
    the output.
    """

    rows: int
    keys: int
    columns: int
    warps: int
    stages: int

    def options(self, width: int) -> dict[str, int]:
        """The compile-time arguments and the options of a launch over rows of `width` numbers."""
        return {
            "WIDTH": width,
            "BLOCK_C": padded_width(width),
            "BLOCK_R": self.rows,
            "BLOCK_K": self.keys,
            "BLOCK_D": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# For widths that are not multiples of 16, whose loads take many registers.
ODD_TILE = Tile(16, 16, 32, 8, 1)


def padded_width(width: int) -> int:
    """Columns of the tiles for rows of `width` <= 512 numbers."""
    return next(padded for padded in WIDTHS if width <= padded)


def forward_tile(inputs: AttentionInputs) -> Tile:
    """Tile of the forward."""
    width = inputs.query.shape[2]
    if width % 16:
        return ODD_TILE._replace(warps=4)
    padded = padded_width(width)
    if inputs.query.element_size() == 4:
        return Tile(16, 32, 64, 4, 1)
    if padded == 512:
        return Tile(32, 64, 256, 8, 2)
    return Tile(64 if _has_many_rows(inputs) else 32, 64, padded, 4 if padded == 64 else 8, 2)


def query_tile(inputs: AttentionInputs) -> Tile:
    """Tile of the gradient of the query."""
    width = inputs.query.shape[2]
    if width % 16:
        return ODD_TILE
    padded = padded_width(width)
    if inputs.query.element_size() == 4:
        return Tile(16, 16, 64, 8, 1)
    if padded == 512:
        return Tile(16, 32, 256, 8, 1)
    return Tile(64 if _has_many_rows(inputs) else 32, 32, padded, 4 if padded == 64 else 8, 2)


def memory_tile(inputs: AttentionInputs) -> Tile:
    """Tile of the gradient of the memory."""
    width = inputs.query.shape[2]
    if width % 16:
        return ODD_TILE
    padded = padded_width(width)
    if inputs.query.element_size() == 4:
        return Tile(16, 16, 64, 4, 1)
    if padded == 512:
        return Tile(16, 16 if _is_plain(inputs) else 32, 128, 8, 1)
    return Tile(16 if padded == 256 and not _is_plain(inputs) else 32, 32, padded, 4 if padded == 64 else 8, 2)


def mass_tile(inputs: AttentionInputs) -> Tile:
    """Tile of the attention mass; its columns are a step along the width."""
    if inputs.query.shape[2] % 16:
        return ODD_TILE
    return Tile(16, 32, 32, 4, 1) if inputs.query.element_size() == 4 else Tile(32, 64, 64, 4, 2)


def _is_plain(inputs: AttentionInputs) -> bool:
    """Whether a call has no position, index or window; each of them takes registers."""
    return inputs.position is None and inputs.index is None and inputs.window is None


def _has_many_rows(inputs: AttentionInputs) -> bool:
    """Whether a plain call of the padded width 256 fills tiles of 64 rows."""
    _, rows, width = inputs.query.shape
    return _is_plain(inputs) and padded_width(width) == 256 and rows > 32


def split_keys(programs: int, keys: int, block: int, processors: int) -> tuple[int, int]:
    """Number of splits of the keys that fills the machine, and number of keys in each, a multiple of `block`.

    Args:
        programs: number of programs without splitting.
        keys: number of keys of a clip.
        block: number of keys of a tile.
        processors: number of multiprocessors of the device.
    """
    tiles = triton.cdiv(max(keys, 1), block)
    wanted = max(1, min(processors // max(programs, 1), MOST_SPLITS, tiles // 2))
    size = triton.cdiv(tiles, wanted) * block
    return triton.cdiv(max(keys, 1), size), size
