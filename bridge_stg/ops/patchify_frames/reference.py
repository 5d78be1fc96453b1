"""The definition of `patchify_frames` in plain PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(
    video: Tensor,
    frame_index: Tensor | None,
    size: Sequence[int],
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    rescale_factor: float,
    interpolation: str,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """The definition of `patchify_frames`; frames outside the video are clamped into it."""
    frames = video if frame_index is None else video[frame_index.clamp(0, video.shape[0] - 1)]
    if layout == "THWC":
        frames = frames.permute(0, 3, 1, 2)
    frames = resize_frames(frames, size[0], size[1], interpolation)
    shift = per_channel(mean, rescale_factor, video.device)
    spread = per_channel(std, rescale_factor, video.device)
    pixels = frames.to(torch.float32).sub(shift).div_(spread)
    if missing := -pixels.shape[0] % temporal_patch_size:
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
    return to_patches(pixels, patch_size, temporal_patch_size, merge_size).to(dtype)


def reference_out(*arguments: Any) -> None:
    """The definition of `patchify_frames_out`, whose last argument is `out` in place of `dtype`."""
    out = arguments[-1]
    out.copy_(reference(*(*arguments[:-1], out.dtype)))


def reference_videos(
    videos: Sequence[Tensor], frame_index: Sequence[Tensor | None], sizes: Sequence[int], *settings: Any
) -> Tensor:
    """The definition of `patchify_videos`; `sizes` is height and width of each video in turn."""
    pairs = zip(sizes[::2], sizes[1::2], strict=True)
    return torch.cat(
        [reference(*one, *settings) for one in zip(videos, frame_index, pairs, strict=True)],
    )


def per_channel(values: Sequence[float], rescale_factor: float, device: torch.device) -> Tensor:
    """values / rescale_factor as [3, 1, 1], in float32 as the Hugging Face processors fuse rescaling in.

    Filled in place on the device: a copy from the host would wait for it.
    """
    fused = torch.tensor(values, dtype=torch.float32) * (1.0 / rescale_factor)
    return torch.cat([torch.full((1, 1, 1), value, dtype=torch.float32, device=device) for value in fused.tolist()])


def resize_frames(frames: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """Antialiased resize of uint8 frames [T, 3, H, W] to uint8 [T, 3, height, width], as torchvision v2 does it."""
    if tuple(frames.shape[-2:]) == (height, width):
        return frames
    if frames.device.type == "cpu":
        return F.interpolate(frames, (height, width), mode=interpolation, antialias=True, align_corners=False)
    wide = F.interpolate(frames.float(), (height, width), mode=interpolation, antialias=True, align_corners=False)
    return wide.clamp_(0.0, 255.0).round_().to(torch.uint8)


def to_patches(pixels: Tensor, patch_size: int, temporal_patch_size: int, merge_size: int) -> Tensor:
    """[T, 3, h, w] to rows of patches in the order of the vision tower."""
    count, channels, height, width = pixels.shape
    merged_h, merged_w = height // patch_size // merge_size, width // patch_size // merge_size
    blocks = pixels.reshape(
        count // temporal_patch_size,
        temporal_patch_size,
        channels,
        merged_h,
        merge_size,
        patch_size,
        merged_w,
        merge_size,
        patch_size,
    )  # [t, dt, c, hb, mh, py, wb, mw, px]
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return rows.reshape(-1, channels * temporal_patch_size * patch_size * patch_size)
