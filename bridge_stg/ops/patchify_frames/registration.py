"""`patchify_frames` and `patchify_videos` as registered ops: schemas, fakes, backends, FLOP formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core.backends import Backend, register_backend
from ..core.library import define_op
from ..core.native import native_backend
from .reference import reference, reference_out, reference_videos
from .settings import PatchSettings, check_frames, unpack

# Shared memory that the CUDA kernel may take for a tile, in bytes.
_TILE_BYTES = 96 * 1024
_SETTINGS = (
    "int patch_size, int temporal_patch_size, int merge_size, float[3] mean, float[3] std, float rescale_factor, "
    "str interpolation, str layout"
)


def _fake(video: Tensor, frame_index: Tensor | None, size: Sequence[int], *flat: Any) -> Tensor:
    settings, (dtype, _) = unpack(flat)
    frames = video.shape[0] if frame_index is None else frame_index.shape[0]
    return video.new_empty((math.prod(settings.grid(frames, size)), settings.columns), dtype=dtype)


def _fake_videos(
    videos: Sequence[Tensor], frame_index: Sequence[Tensor | None], sizes: Sequence[int], *flat: Any
) -> Tensor:
    pairs = zip(sizes[::2], sizes[1::2], strict=True)
    return torch.cat([_fake(*one, *flat) for one in zip(videos, frame_index, pairs, strict=True)])


def _cuda_limits(*, sizes: Sequence[tuple[Sequence[int], Sequence[int]]], settings: PatchSettings) -> str | None:
    """Why a tile of csrc/patchify_frames/tile_plan.h does not fit, or None.

    Args:
        sizes: (height, width) before and after the resize, for each video.
    """
    patch, merge = settings.patch_size, settings.merge_size
    across, down = -(-64 // patch) * patch, patch * merge  # output pixels of a tile
    for source, target in sizes:
        taps_y, taps_x = (
            2 * math.ceil(settings.taps(before, after) / 2) + 1 for before, after in zip(source, target, strict=True)
        )
        words = (taps_x + 4 + down) * across + taps_y * down + 2 * (across + down) + across // patch * merge
        if 4 * words > _TILE_BYTES:
            return (
                f"a tile may take {_TILE_BYTES // 1024} KiB of shared memory, and a resize from {source[0]} x "
                f"{source[1]} to {target[0]} x {target[1]} in patches of {patch} needs {-(-words // 256)}"
            )
    return None


def _checking_frames(backend: Backend) -> Backend:
    """`backend` with a check of the indices on the CPU; on CUDA the kernel clamps them instead."""

    def forward(video: Any, frame_index: Any, *flat: Any) -> Any:
        pairs = [(video, frame_index)] if isinstance(video, Tensor) else zip(video, frame_index, strict=True)
        for one, index in pairs:
            if index is not None and index.device.type == "cpu":
                check_frames(index, one.shape[0])
        return backend.forward(video, frame_index, *flat)

    return dataclasses.replace(backend, forward=forward)


_forward_op = define_op(
    "patchify_frames",
    f"(Tensor video, Tensor? frame_index, SymInt[2] size, {_SETTINGS}, ScalarType dtype, str backend) -> Tensor",
    _fake,
)
_out_op = define_op(
    "patchify_frames_out",
    f"(Tensor video, Tensor? frame_index, SymInt[2] size, {_SETTINGS}, Tensor(a!) out, str backend) -> ()",
    lambda *args: None,
)
_videos_op = define_op(
    "patchify_videos",
    f"(Tensor[] videos, Tensor?[] frame_index, SymInt[] sizes, {_SETTINGS}, ScalarType dtype, str backend) -> Tensor",
    _fake_videos,
)
for _op, _definition in (
    ("patchify_frames", reference),
    ("patchify_frames_out", reference_out),
    ("patchify_videos", reference_videos),
):
    register_backend(_checking_frames(Backend(_op, "reference", _definition)))
    register_backend(_checking_frames(native_backend(_op)))
    register_backend(native_backend(_op, "cuda", limits=_cuda_limits))


@register_flop_formula([torch.ops.bridge_stg.patchify_frames, torch.ops.bridge_stg.patchify_frames_out])
def _flops(video: Any, frame_index: Any, size: Any, *flat: Any, **kwargs: Any) -> int:
    """Two operations a tap of each resize pass that runs, and two a value to normalise."""
    settings, _ = unpack(flat)
    height, width = settings.frame_size(video)
    operations = 2 * size[0] * size[1]
    if width != size[1]:
        operations += 2 * height * size[1] * int(settings.taps(width, size[1]))
    if height != size[0]:
        operations += 2 * size[0] * size[1] * int(settings.taps(height, size[0]))
    return 3 * (video[0] if frame_index is None else frame_index[0]) * operations


@register_flop_formula(torch.ops.bridge_stg.patchify_videos)
def _flops_videos(videos: Any, frame_index: Any, sizes: Any, *flat: Any, **kwargs: Any) -> int:
    pairs = zip(sizes[::2], sizes[1::2], strict=True)
    return sum(_flops(*one, *flat) for one in zip(videos, frame_index, pairs, strict=True))
