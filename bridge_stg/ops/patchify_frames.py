"""`patchify_frames`: sampled frames of a decoded video to the pixel values of a Qwen-VL vision tower.

Frame gather, antialiased resize, normalisation and patch layout in one op, bit for bit what the video processors
of `transformers` (`Qwen2VLVideoProcessor`, `Qwen3VLVideoProcessor`) give on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from ._backends import Backend, choose_backend, register_backend
from ._checks import INT64, UINT8, Expect, check_choice, check_integer, check_number, check_tensors
from ._library import define_op

Interpolation = Literal["bicubic", "bilinear"]
Layout = Literal["TCHW", "THWC"]
# Taps of the filter on each side of the centre, before antialiasing widens it.
_SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
_OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    On the CPU this is bit-identical to the Hugging Face processor on the CPU. "bicubic" is so under every
    ATEN_CPU_CAPABILITY; "bilinear" under "default" may differ, where torchvision takes a float path. On CUDA
    the resize is in float32, rounded half to even: at most one uint8 step from the CPU's fixed point.

    Not differentiable: pixels are integers.

    Args:
        video: uint8 RGB, [T, 3, H, W] for layout "TCHW", [T, H, W, 3] for "THWC"; any strides.
        frame_index: [T'] int64 frames in 0..T-1, in any order, repeats allowed; None for all T in order.
        size: (h, w) after the resize, multiples of patch_size * merge_size.
        mean, std: three floats each, of pixels scaled by `rescale_factor`.
        interpolation: "bicubic" or "bilinear".
        dtype: of the pixel values: float32, bfloat16 or float16, cast from float32 at the end.
        validate: whether to check the values of `frame_index` on CUDA, which waits for the device; without it
            values outside are clamped there. On the CPU they are always checked.
        backend: one of `bridge_stg.backends()`; None picks.

    Returns:
        (pixel_values [gt gh gw, 3 tp P P], grid_thw [[gt, gh, gw]] int64 on the CPU).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range; an empty video or index; a
            backend that cannot run.
    """
    frame_axes = "T 3 H W" if layout == "TCHW" else "T H W 3"
    check_choice("patchify_frames", "layout", layout, ("TCHW", "THWC"))
    sizes = check_tensors(
        "patchify_frames",
        Expect("video", video, frame_axes, UINT8),
        Expect("frame_index", frame_index, "K", INT64, optional=True),
    )
    for axis in "THW":
        check_integer("patchify_frames", f"axis {axis} of video", sizes[axis], 1)
    frames = sizes["T"] if frame_index is None else sizes["K"]
    check_integer("patchify_frames", "the number of frames in frame_index", frames, 1)
    for name, value in (
        ("patch_size", patch_size),
        ("temporal_patch_size", temporal_patch_size),
        ("merge_size", merge_size),
    ):
        check_integer("patchify_frames", name, value, 1)
    height, width = _check_size(size, patch_size * merge_size)
    check_choice("patchify_frames", "interpolation", interpolation, tuple(_SUPPORT))
    if dtype not in _OUTPUT_DTYPES:
        raise TypeError(f"patchify_frames: dtype must be {' or '.join(map(str, _OUTPUT_DTYPES))}, got {dtype}.")
    factor = check_number("patchify_frames", "rescale_factor", rescale_factor)
    if factor <= 0:
        raise ValueError(f"patchify_frames: rescale_factor must be positive, got {rescale_factor}.")
    means, stds = _three("mean", mean), _three("std", std)
    if 0.0 in stds:
        raise ValueError(f"patchify_frames: std must not contain 0, got {list(stds)}.")
    if validate and frame_index is not None:
        check_frames(frame_index, sizes["T"])
    pixel_values = cast(
        Tensor,
        _forward_op(
            video,
            frame_index,
            [height, width],
            patch_size,
            temporal_patch_size,
            merge_size,
            means,
            stds,
            factor,
            interpolation,
            layout,
            dtype,
            choose_backend("patchify_frames", backend, video.device.type),
        ),
    )
    grid = [-(-frames // temporal_patch_size), height // patch_size, width // patch_size]
    return pixel_values, torch.tensor([grid], dtype=torch.int64)


def patchify_videos(
    videos: Sequence[Tensor],
    frame_index: Sequence[Tensor | None] | None = None,
    *,
    size: tuple[int, int] | Sequence[tuple[int, int]],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`patchify_frames` of several videos, rows concatenated in the order given.

    Args:
        videos: one tensor a video; lengths and sizes may differ.
        frame_index: one index (or None) a video; None for all frames of each.
        size: one (h, w) for all, or one a video.
        options: the keyword arguments of `patchify_frames`, the same for all.

    Returns:
        (pixel_values [rows, 3 tp P P], grid_thw [V, 3] int64 on the CPU).

    Raises:
        ValueError: no videos, or lists whose lengths differ; what `patchify_frames` raises.
    """
    if not videos:
        raise ValueError("patchify_videos: videos must name at least one video, got none.")
    indices = [None] * len(videos) if frame_index is None else list(frame_index)
    shared = len(size) == 2 and isinstance(size[0], int)
    targets = [cast(tuple[int, int], size)] * len(videos) if shared else list(cast(Sequence[tuple[int, int]], size))
    for name, values in (("frame_index", indices), ("size", targets)):
        if len(values) != len(videos):
            raise ValueError(
                f"patchify_videos: {name} must have one entry for each of {len(videos)} videos, got {len(values)}."
            )
    parts = [
        patchify_frames(video, index, size=target, **options)
        for video, index, target in zip(videos, indices, targets, strict=True)
    ]
    return torch.cat([pixels for pixels, _ in parts]), torch.cat([grid for _, grid in parts])


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
    """The definition of `patchify_frames`."""
    frames = video
    if frame_index is not None:
        if video.device.type == "cpu":
            check_frames(frame_index, video.shape[0])
        frames = video[frame_index.clamp(0, video.shape[0] - 1)]
    if layout == "THWC":
        frames = frames.permute(0, 3, 1, 2)
    frames = resize_frames(frames, size[0], size[1], interpolation)
    shift = per_channel(mean, rescale_factor, video.device)
    spread = per_channel(std, rescale_factor, video.device)
    pixels = frames.to(torch.float32).sub(shift).div_(spread)
    if missing := -pixels.shape[0] % temporal_patch_size:
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
    return to_patches(pixels, patch_size, temporal_patch_size, merge_size).to(dtype)


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


def check_frames(frame_index: Tensor, frames: int) -> None:
    """Raise ValueError unless every frame lies in 0..frames-1. Waits for the device."""
    low, high = (int(x) for x in frame_index.aminmax())
    if low < 0 or high >= frames:
        wrong = low if low < 0 else high
        raise ValueError(f"patchify_frames: frame_index must be in 0..{frames - 1} (frames of the video), got {wrong}.")


def _check_size(size: Any, unit: int) -> tuple[int, int]:
    if len(size) != 2:
        raise ValueError(f"patchify_frames: size must be (height, width), got {size!r}.")
    for name, value in zip(("height", "width"), size, strict=True):
        check_integer("patchify_frames", f"{name} of size", value, 1)
        if value % unit:
            raise ValueError(
                f"patchify_frames: {name} of size must be a multiple of patch_size * merge_size = {unit}, got {value}."
            )
    return size[0], size[1]


def _three(name: str, values: Sequence[float]) -> list[float]:
    numbers = [check_number("patchify_frames", name, value) for value in values]
    if len(numbers) != 3:
        raise ValueError(f"patchify_frames: {name} must have 3 values (one a channel), got {len(numbers)}.")
    return numbers


def _fake(
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
    backend: str,
) -> Tensor:
    frames = video.shape[0] if frame_index is None else frame_index.shape[0]
    groups = (frames + temporal_patch_size - 1) // temporal_patch_size
    rows = groups * (size[0] // patch_size) * (size[1] // patch_size)
    return video.new_empty((rows, 3 * temporal_patch_size * patch_size * patch_size), dtype=dtype)


_forward_op = define_op(
    "patchify_frames",
    "(Tensor video, Tensor? frame_index, SymInt[2] size, int patch_size, int temporal_patch_size, int merge_size, "
    "float[3] mean, float[3] std, float rescale_factor, str interpolation, str layout, ScalarType dtype, "
    "str backend) -> Tensor",
    _fake,
)
register_backend(Backend("patchify_frames", "reference", reference))


@register_flop_formula(torch.ops.bridge_stg.patchify_frames)
def _flops(
    video: Any,
    frame_index: Any,
    size: Any,
    patch_size: Any,
    temporal_patch_size: Any,
    merge_size: Any,
    mean: Any,
    std: Any,
    rescale_factor: Any,
    interpolation: str,
    layout: str,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Two operations a tap of each resize pass that runs, and two a value to normalise."""
    height, width = video[2:4] if layout == "TCHW" else video[1:3]
    planes = 3 * (video[0] if frame_index is None else frame_index[0])
    operations = 2 * size[0] * size[1]
    if width != size[1]:
        operations += 2 * height * size[1] * _taps(width, size[1], interpolation)
    if height != size[0]:
        operations += 2 * size[0] * size[1] * _taps(height, size[0], interpolation)
    return planes * operations


def _taps(source: int, target: int, interpolation: str) -> int:
    """Width of the antialiased filter, in source pixels."""
    return int(2 * _SUPPORT[interpolation] * max(1.0, source / target))
