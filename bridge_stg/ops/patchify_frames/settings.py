"""The settings of `patchify_frames`: what all videos of a call share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_choice, check_integer, check_number, shorten

Interpolation = Literal["bicubic", "bilinear"]
Layout = Literal["TCHW", "THWC"]
# Source pixels that the filter reaches on each side of its centre, before antialiasing widens it.
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
# A longer side, or a larger patch or group, is a mistake, and products of such numbers may overflow.
LONGEST_SIDE = 2**16
_FLOAT32 = torch.finfo(torch.float32)
_OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PatchSettings(NamedTuple):
    """The settings that all videos of a call share, in the order of the registered ops' arguments."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: Sequence[float]
    std: Sequence[float]
    rescale_factor: float
    interpolation: str
    layout: str

    @property
    def columns(self) -> int:
        """Values in a row of the output."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def grid(self, frames: int, size: Sequence[int]) -> tuple[int, int, int]:
        """Temporal groups, and patches down and across, of `frames` frames of (height, width) `size`."""
        groups = (frames + self.temporal_patch_size - 1) // self.temporal_patch_size
        return groups, size[0] // self.patch_size, size[1] // self.patch_size

    def frame_size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of a video of that shape."""
        return (shape[2], shape[3]) if self.layout == "TCHW" else (shape[1], shape[2])

    def taps(self, source: int, target: int) -> float:
        """Width of the antialiased filter along an axis, in source pixels."""
        return 2 * SUPPORT[self.interpolation] * max(1.0, source / target)


def unpack(flat: Sequence[Any]) -> tuple[PatchSettings, Sequence[Any]]:
    """The settings at the head of a registered op's arguments from `patch_size` on, and the arguments after them."""
    count = len(PatchSettings._fields)
    return PatchSettings(*flat[:count]), flat[count:]


def check_settings(op: str, given: PatchSettings, dtype: torch.dtype) -> PatchSettings:
    """Check the settings, and return them as the registered ops take them.

    Raises:
        TypeError, ValueError: a setting of the wrong type or range; settings that give a pixel a value beyond `dtype`.
    """
    check_choice(op, "layout", given.layout, ("TCHW", "THWC"))
    patch_size = check_integer(op, "patch_size", given.patch_size, 1, LONGEST_SIDE)
    temporal_patch_size = check_integer(op, "temporal_patch_size", given.temporal_patch_size, 1, LONGEST_SIDE)
    merge_size = check_integer(op, "merge_size", given.merge_size, 1, LONGEST_SIDE)
    check_choice(op, "interpolation", given.interpolation, tuple(SUPPORT))
    if not isinstance(dtype, torch.dtype) or dtype not in _OUTPUT_DTYPES:
        raise TypeError(f"{op}: dtype must be {' or '.join(map(str, _OUTPUT_DTYPES))}, got {dtype}.")
    factor = check_number(op, "rescale_factor", given.rescale_factor)
    mean, std = _three_numbers(op, "mean", given.mean), _three_numbers(op, "std", given.std)
    if factor <= 0:
        raise ValueError(f"{op}: rescale_factor must be positive, got {given.rescale_factor}.")
    if min(std) <= 0:
        raise ValueError(f"{op}: std must be positive, got {std}.")
    settings = PatchSettings(
        patch_size, temporal_patch_size, merge_size, mean, std, factor, given.interpolation, given.layout
    )
    _check_values(op, settings, dtype)
    return settings


def _check_values(op: str, settings: PatchSettings, dtype: torch.dtype) -> None:
    """Raise ValueError where a pixel would be infinite or NaN: the float32 terms are mean and std over `factor`."""
    mean, std, factor = settings.mean, settings.std, settings.rescale_factor
    shift, spread = ([value / factor for value in values] for values in (mean, std))
    pairs = zip(shift, spread, strict=True)
    highest = max(max(abs(s), abs(255 - s)) / t if t >= _FLOAT32.tiny else math.inf for s, t in pairs)
    limit = torch.finfo(dtype).max
    if not (highest <= limit and max(*map(abs, shift), *spread) <= _FLOAT32.max):
        raise ValueError(
            f"{op}: mean, std and rescale_factor must give pixel values of at most {limit:.5g} in magnitude, what "
            f"{dtype} holds, got {highest:.5g} by mean {mean}, std {std} and rescale_factor {factor}."
        )


def _three_numbers(op: str, name: str, values: Sequence[float]) -> list[float]:
    numbers = [check_number(op, name, value) for value in check_list(op, name, values, "3 numbers, one a channel")]
    if len(numbers) != 3:
        raise ValueError(f"{op}: {name} must have 3 values (one a channel), got {len(numbers)}.")
    return numbers


def check_list(op: str, name: str, value: Any, contents: str) -> Sequence[Any]:
    """Return a list, a tuple or a NumPy array as a sequence, else raise TypeError."""
    if type(value).__name__ == "ndarray":
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{op}: {name} must be {contents}, got {shorten(value)}.")
    return value


def check_frames(frame_index: Tensor, frames: int) -> None:
    """Raise ValueError unless every frame lies in 0..frames-1. Waits for the device."""
    low, high = (int(x) for x in frame_index.aminmax())
    if low < 0 or high >= frames:
        wrong = low if low < 0 else high
        raise ValueError(f"patchify_frames: frame_index must be in 0..{frames - 1} (frames of the video), got {wrong}.")
