"""The definition of `patchify_frames` in plain PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .settings import PatchSettings, unpack


def reference(video: Tensor, frame_index: Tensor | None, size: Sequence[int], *flat: Any) -> Tensor:
    """The definition of `patchify_frames`; frames outside the video are clamped into it.

    Args:
        flat: the fields of `PatchSettings` and the output's dtype, as the registered op takes them.
    """
    settings, (dtype,) = unpack(flat)
    frames = video if frame_index is None else video[frame_index.clamp(0, video.shape[0] - 1)]
    if settings.layout == "THWC":
        frames = frames.permute(0, 3, 1, 2)
    frames = resize_frames(frames, size[0], size[1], settings.interpolation)
    mean, std = (per_channel(x, settings.rescale_factor, video.device) for x in (settings.mean, settings.std))
    pixels = frames.to(torch.float32).sub(mean).div_(std)
    if missing := -pixels.shape[0] % settings.temporal_patch_size:
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
    return to_patches(pixels, settings).to(dtype)


def reference_out(video: Tensor, frame_index: Tensor | None, size: Sequence[int], *flat: Any) -> None:
    """The definition of `patchify_frames_out`, whose last argument is `out` in place of a dtype."""
    *settings, out = flat
    out.copy_(reference(video, frame_index, size, *settings, out.dtype))


def reference_videos(
    videos: Sequence[Tensor], frame_index: Sequence[Tensor | None], sizes: Sequence[int], *flat: Any
) -> Tensor:
    """The definition of `patchify_videos`; `sizes` holds the height and width of each video in turn."""
    pairs = zip(sizes[::2], sizes[1::2], strict=True)
    return torch.cat([reference(*one, *flat) for one in zip(videos, frame_index, pairs, strict=True)])


def per_channel(values: Sequence[float], rescale_factor: float, device: torch.device) -> Tensor:
    """values / rescale_factor as [3, 1, 1] float32, rounded as the Hugging Face processors do it.

    The tensor is filled on the device, because a copy from the host would wait for the device.
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


def to_patches(pixels: Tensor, settings: PatchSettings) -> Tensor:
    """[T, 3, h, w] to rows of patches in the order of the vision tower."""
    patch, group, merge = settings.patch_size, settings.temporal_patch_size, settings.merge_size
    count, channels, height, width = pixels.shape
    down, across = height // patch // merge, width // patch // merge
    blocks = pixels.reshape(count // group, group, channels, down, merge, patch, across, merge, patch)
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # from [t, dt, c, hb, mh, py, wb, mw, px]
    return rows.reshape(-1, settings.columns)
