"""`patchify_frames`: sampled frames of a decoded video to the pixel values of a Qwen-VL vision tower.

Frame gather, antialiased resize, normalisation and patch layout in one op, bit for bit what the video processors
of `transformers` (`Qwen2VLVideoProcessor`, `Qwen3VLVideoProcessor`) give on the same device. `reference.py` holds the
definition in plain PyTorch, `registration.py` the registered ops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..core.backends import choose_backend
from ..core.checks import INT64, UINT8, Expect, check_flag, check_integer, check_tensors
from .registration import _forward_op, _out_op, _videos_op
from .settings import LONGEST_SIDE, Interpolation, Layout, PatchSettings, check_frames, check_list, check_settings


def patchify_frames(
    video: Tensor,
    frame_index: Tensor | None = None,
    *,
    size: tuple[int, int],
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    mean: Sequence[float],
    std: Sequence[float],
    rescale_factor: float = 1 / 255,
    interpolation: Interpolation = "bicubic",
    layout: Layout = "TCHW",
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather, resize, normalise and cut frames into patches.

    With P = `patch_size`, tp = `temporal_patch_size`, m = `merge_size` and the grid gt = ceil(T' / tp),
    gh = h / P, gw = w / P:

    - row r = (((t gh/m + hb) gw/m + wb) m + mh) m + mw, column = ((c tp + dt) P + py) P + px;
    - source frame `frame_index[tp t + dt]`, the last one repeated to fill the last group;
    - source pixel y = (hb m + mh) P + py, x = (wb m + mw) P + px of the antialiased resize, which is rounded to
      uint8; an axis whose size does not change is left alone;
    - value (u8 - mean / rescale_factor) / (std / rescale_factor) in float32, subtracted, then divided.

    On the CPU this gives the bits of the Hugging Face processor on the CPU: for "bicubic" under every
    ATEN_CPU_CAPABILITY, for "bilinear" under all but "default", where torchvision computes in float. On CUDA the resize
    computes in float32 and rounds once, half to even, as the processors do there. The CPU rounds and clamps between the
    passes, so that hard edges may differ between the two by a few steps of uint8.

    The compiled backends read any strides in place and need no memory but the output and a few rows of pixels a
    thread. Not differentiable: pixels are integers.

    Args:
        video: uint8 RGB, [T, 3, H, W] for layout "TCHW", [T, H, W, 3] for "THWC"; any strides.
        frame_index: [T'] int64 frames in 0..T-1, in any order, repeats allowed; None for all T in order.
        size: (h, w) after the resize, multiples of patch_size * merge_size.
        mean, std: three floats each, of pixels scaled by `rescale_factor`; std above 0, and all such that no value is
            beyond `dtype`.
        interpolation: "bicubic" or "bilinear".
        dtype: of the pixel values: float32, bfloat16 or float16, cast from float32 at the end.
        out: contiguous [gt gh gw, 3 tp P P] of `dtype` on the video's device, written in place of a new tensor.
        validate: whether to check the values of `frame_index` on CUDA, which waits for the device; without it
            values outside are clamped there. On the CPU they are always checked.
        backend: one of `bridge_stg.backends()`; None picks.

    Returns:
        (pixel_values [gt gh gw, 3 tp P P], grid_thw [[gt, gh, gw]] int64 on the CPU).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range; an empty video or index; a
            backend that cannot run.
    """
    op = "patchify_frames"
    given = PatchSettings(patch_size, temporal_patch_size, merge_size, mean, std, rescale_factor, interpolation, layout)
    settings = check_settings(op, given, dtype)
    validate = check_flag(op, "validate", validate)
    frames = _check_video(op, video, frame_index, settings, validate)
    target = _check_size(op, "size", size, settings)
    grid = settings.grid(frames, target)
    if out is not None:
        shape = f"{math.prod(grid)} {settings.columns}"
        check_tensors(op, Expect("video", video, "T A B C", UINT8), Expect("out", out, shape, (dtype,)))
        if not out.is_contiguous():
            raise ValueError(f"{op}: out must be contiguous, got strides {list(out.stride())}.")
    chosen = choose_backend(
        op if out is None else "patchify_frames_out",
        backend,
        video.device.type,
        sizes=[(settings.frame_size(video.shape), target)],
        settings=settings,
    )
    if out is None:
        out = cast(Tensor, _forward_op(video, frame_index, target, *settings, dtype, chosen))
    else:
        _out_op(video, frame_index, target, *settings, out, chosen)
    return out, torch.tensor([grid], dtype=torch.int64)


def patchify_videos(
    videos: Sequence[Tensor],
    frame_index: Sequence[Tensor | None] | None = None,
    *,
    size: tuple[int, int] | Sequence[tuple[int, int]],
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    mean: Sequence[float],
    std: Sequence[float],
    rescale_factor: float = 1 / 255,
    interpolation: Interpolation = "bicubic",
    layout: Layout = "TCHW",
    dtype: torch.dtype = torch.float32,
    validate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`patchify_frames` of several videos in one call, rows in the order given.

    Args:
        videos: one tensor a video, all on one device; lengths and sizes may differ.
        frame_index: one index (or None) a video; None for all frames of each.
        size: one (h, w) for all, or one a video.
        patch_size, temporal_patch_size, merge_size, mean, std, rescale_factor, interpolation, layout, dtype, validate,
            backend: as in `patchify_frames`, the same for all.

    Returns:
        (pixel_values [rows, 3 tp P P], grid_thw [V, 3] int64 on the CPU).

    Raises:
        TypeError, ValueError: no videos, lists whose lengths differ, videos on several devices; what
            `patchify_frames` raises.
    """
    op = "patchify_videos"
    videos = check_list(op, "videos", videos, "a list of tensors, one a video")
    if not videos:
        raise ValueError(f"{op}: videos must name at least one video, got none.")
    indices: Sequence[Tensor | None] = [None] * len(videos)
    if frame_index is not None:
        indices = check_list(op, "frame_index", frame_index, "a list of one index (or None) a video")
    size = check_list(op, "size", size, "(height, width), or one such pair a video")
    shared = len(size) == 2 and not isinstance(size[0], Sequence)
    targets = [cast(tuple[int, int], size)] * len(videos) if shared else list(cast(Sequence[tuple[int, int]], size))
    for name, values in (("frame_index", indices), ("size", targets)):
        if len(values) != len(videos):
            raise ValueError(f"{op}: {name} must have one entry for each of {len(videos)} videos, got {len(values)}.")
    given = PatchSettings(patch_size, temporal_patch_size, merge_size, mean, std, rescale_factor, interpolation, layout)
    settings = check_settings(op, given, dtype)
    validate = check_flag(op, "validate", validate)
    grids, sizes, resizes = [], [], []
    for i, (video, index, target) in enumerate(zip(videos, indices, targets, strict=True)):
        frames = _check_video(op, video, index, settings, validate, i)
        if video.device != videos[0].device:
            raise ValueError(
                f"{op}: videos[{i}] must be on the device of videos[0] ({videos[0].device}), got {video.device}."
            )
        checked = _check_size(op, "size" if shared else f"size[{i}]", target, settings)
        grids.append(settings.grid(frames, checked))
        sizes += checked
        resizes.append((settings.frame_size(video.shape), checked))
    chosen = choose_backend(op, backend, videos[0].device.type, sizes=resizes, settings=settings)
    pixel_values = cast(Tensor, _videos_op(list(videos), list(indices), sizes, *settings, dtype, chosen))
    return pixel_values, torch.tensor(grids, dtype=torch.int64)


def _check_video(
    op: str,
    video: Tensor,
    frame_index: Tensor | None,
    settings: PatchSettings,
    validate: bool,
    number: int | None = None,
) -> int:
    """Check one video and its index, and return the number of frames asked for."""
    name, index_name = ("video", "frame_index") if number is None else (f"videos[{number}]", f"frame_index[{number}]")
    sizes = check_tensors(
        op,
        Expect(name, video, "T 3 H W" if settings.layout == "TCHW" else "T H W 3", UINT8),
        Expect(index_name, frame_index, "K", INT64, optional=True),
    )
    for axis in "THW":
        check_integer(op, f"axis {axis} of {name}", sizes[axis], 1)
    frames = sizes["T"] if frame_index is None else sizes["K"]
    check_integer(op, f"the number of frames in {index_name}", frames, 1)
    if validate and frame_index is not None and not frame_index.is_meta:
        check_frames(frame_index, sizes["T"])
    return frames


def _check_size(op: str, name: str, size: Any, settings: PatchSettings) -> list[int]:
    size = check_list(op, name, size, "(height, width)")
    if len(size) != 2:
        raise ValueError(f"{op}: {name} must be (height, width), got {size}.")
    unit = settings.patch_size * settings.merge_size
    sides = []
    for side, value in zip(("height", "width"), size, strict=True):
        sides.append(check_integer(op, f"{side} of {name}", value, 1, LONGEST_SIDE))
        if value % unit:
            raise ValueError(
                f"{op}: {side} of {name} must be a multiple of patch_size * merge_size = {unit}, got {value}."
            )
    return sides
