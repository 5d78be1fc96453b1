"""`FramePatchifier`: `ops.patchify_frames` with the settings of a vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import patchify_frames, patchify_videos
from ..ops.patchify_frames.api import Interpolation, Layout

# Qwen2-VL and Qwen2.5-VL normalise with these statistics of the CLIP image encoder.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class FramePatchifier(nn.Module):
    """Turns decoded frames into the pixel values of a Qwen-VL vision tower, without parameters.

    Args:
        size: (h, w) that frames are resized to, unless a call names another.
        patch_size, temporal_patch_size, merge_size, mean, std, rescale_factor, interpolation, layout, dtype: as in
            `ops.patchify_frames`; the defaults are those of Qwen2.5-VL.

    Raises:
        TypeError, ValueError: `ops.patchify_frames` refuses the type or range of a setting.
    """

    def __init__(
        self,
        size: tuple[int, int] | None = None,
        *,
        patch_size: int = 14,
        temporal_patch_size: int = 2,
        merge_size: int = 2,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        rescale_factor: float = 1 / 255,
        interpolation: Interpolation = "bicubic",
        layout: Layout = "TCHW",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.size = size
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.mean = mean
        self.std = std
        self.rescale_factor = rescale_factor
        self.interpolation: Interpolation = interpolation
        self.layout: Layout = layout
        self.dtype = dtype
        self._check()
        self.mean, self.std = tuple(mean), tuple(std)

    def _check(self) -> None:
        """Let the op check the settings now, on a frame of one pixel on the meta device."""
        size = self.size
        if size is None:  # the smallest size that fits
            sides = [side if isinstance(side, int) and side > 0 else 1 for side in (self.patch_size, self.merge_size)]
            size = (sides[0] * sides[1],) * 2
        shape = (1, 1, 1, 3) if self.layout == "THWC" else (1, 3, 1, 1)
        patchify_frames(torch.empty(shape, dtype=torch.uint8, device="meta"), size=size, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "mean": self.mean,
            "std": self.std,
            "rescale_factor": self.rescale_factor,
            "interpolation": self.interpolation,
            "layout": self.layout,
            "dtype": self.dtype,
        }

    def forward(
        self,
        video: Tensor | Sequence[Tensor],
        frame_index: Tensor | Sequence[Tensor | None] | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Patchify one video or a list of them.

        Args:
            video: uint8 [T, 3, H, W] or [T, H, W, 3] as `layout` says, or a list of such.
            frame_index: [T'] int64 frames of the video, or one index (or None) a video of a list.
            size: (h, w) in place of the module's.

        Returns:
            (pixel_values [rows, 3 tp P P], grid_thw [V, 3] int64 on the CPU).

        Raises:
            ValueError: neither the call nor the module has a size, or what `ops.patchify_frames` raises.
        """
        target = self.size if size is None else size
        if target is None:
            raise ValueError("size must be given to FramePatchifier or to its call, got None in both.")
        options = {"size": target, **self._options()}
        if isinstance(video, Tensor):
            return patchify_frames(video, cast(Tensor | None, frame_index), **options)
        return patchify_videos(video, cast(Sequence[Tensor | None] | None, frame_index), **options)

    def extra_repr(self) -> str:
        return f"size={self.size}, patch_size={self.patch_size}, layout={self.layout!r}"
