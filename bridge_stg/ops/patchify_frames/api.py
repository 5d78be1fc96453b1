"""`patchify_frames`: sampled frames of a decoded video to the pixel values of a Qwen-VL vision tower.

Frame gather, antialiased resize, normalisation and patch layout in one op, bit for bit what the video processors
of `transformers` (`Qwen2VLVideoProcessor`, `Qwen3VLVideoProcessor`) give on the same device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core.backends import Backend, choose_backend, register_backend
from ..core.checks import (
    INT64,
    UINT8,
    Expect,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_tensors,
    shorten,
)
from ..core.library import define_op
from ..core.native import native_backend
from .reference import reference, reference_out, reference_videos

Interpolation = Literal["bicubic", "bilinear"]
Layout = Literal["TCHW", "THWC"]
# Taps of the filter on each side of the centre, before antialiasing widens it.
_SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
# Shared memory that the CUDA kernel may take for a tile.
_TILE_BYTES = 96 * 1024
# Sides, patches and groups beyond it are mistakes, and their products may overflow.
_LONGEST_SIDE = 2**16
_FLOAT32 = torch.finfo(torch.float32)
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

    On the CPU this is bit-identical to the Hugging Face processor on the CPU. "bicubic" is so under every
    ATEN_CPU_CAPABILITY; "bilinear" under "default" may differ, where torchvision takes a float path. On CUDA
    the resize is in float32 and rounds once, half to even, as the processors do there: hard edges may differ from the
    CPU, which rounds and clamps between the passes, by a few steps of uint8.

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
    settings = _check_settings(
        op, patch_size, temporal_patch_size, merge_size, mean, std, rescale_factor, interpolation, layout, dtype
    )
    patch_size, temporal_patch_size, merge_size = settings[:3]
    validate = check_flag(op, "validate", validate)
    frames = _check_video(op, "video", video, "frame_index", frame_index, layout, validate)
    height, width = _check_size(op, "size", size, patch_size * merge_size)
    grid = [-(-frames // temporal_patch_size), height // patch_size, width // patch_size]
    grid_thw = torch.tensor([grid], dtype=torch.int64)
    call = {"sizes": [(*_frame_size(video, layout), height, width)], "settings": settings}
    if out is None:
        chosen = choose_backend(op, backend, video.device.type, **call)
        return cast(Tensor, _forward_op(video, frame_index, [height, width], *settings, chosen)), grid_thw
    _check_out(op, out, video, grid[0] * grid[1] * grid[2], 3 * temporal_patch_size * patch_size**2, dtype)
    chosen = choose_backend("patchify_frames_out", backend, video.device.type, **call)
    _out_op(video, frame_index, [height, width], *settings[:-1], out, chosen)
    return out, grid_thw


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
    videos = _check_list(op, "videos", videos, "a list of tensors, one a video")
    if not videos:
        raise ValueError(f"{op}: videos must name at least one video, got none.")
    indices: Sequence[Tensor | None] = [None] * len(videos)
    if frame_index is not None:
        indices = _check_list(op, "frame_index", frame_index, "a list of one index (or None) a video")
    size = _check_list(op, "size", size, "(height, width), or one such pair a video")
    shared = len(size) == 2 and not isinstance(size[0], Sequence)
    targets = [cast(tuple[int, int], size)] * len(videos) if shared else list(cast(Sequence[tuple[int, int]], size))
    for name, values in (("frame_index", indices), ("size", targets)):
        if len(values) != len(videos):
            raise ValueError(f"{op}: {name} must have one entry for each of {len(videos)} videos, got {len(values)}.")
    settings = _check_settings(
        op, patch_size, temporal_patch_size, merge_size, mean, std, rescale_factor, interpolation, layout, dtype
    )
    patch_size, temporal_patch_size, merge_size = settings[:3]
    validate = check_flag(op, "validate", validate)
    grids, sizes = [], []
    for i, (video, index, target) in enumerate(zip(videos, indices, targets, strict=True)):
        frames = _check_video(op, f"videos[{i}]", video, f"frame_index[{i}]", index, layout, validate)
        if video.device != videos[0].device:
            raise ValueError(
                f"{op}: videos[{i}] must be on the device of videos[0] ({videos[0].device}), got {video.device}."
            )
        height, width = _check_size(op, "size" if shared else f"size[{i}]", target, patch_size * merge_size)
        grids.append([-(-frames // temporal_patch_size), height // patch_size, width // patch_size])
        sizes += [height, width]
    pairs = zip(videos, sizes[::2], sizes[1::2], strict=True)
    call = {"sizes": [(*_frame_size(video, layout), h, w) for video, h, w in pairs], "settings": settings}
    chosen = choose_backend(op, backend, videos[0].device.type, **call)
    pixel_values = cast(Tensor, _videos_op(list(videos), list(indices), sizes, *settings, chosen))
    return pixel_values, torch.tensor(grids, dtype=torch.int64)


def check_frames(frame_index: Tensor, frames: int) -> None:
    """Raise ValueError unless every frame lies in 0..frames-1. Waits for the device."""
    low, high = (int(x) for x in frame_index.aminmax())
    if low < 0 or high >= frames:
        wrong = low if low < 0 else high
        raise ValueError(f"patchify_frames: frame_index must be in 0..{frames - 1} (frames of the video), got {wrong}.")


def _check_list(op: str, name: str, value: Any, contents: str) -> Sequence[Any]:
    """Return a list, a tuple or a NumPy array as a sequence, else raise TypeError."""
    if type(value).__name__ == "ndarray":
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{op}: {name} must be {contents}, got {shorten(value)}.")
    return value


def _check_video(
    op: str, name: str, video: Tensor, index_name: str, frame_index: Tensor | None, layout: str, validate: bool
) -> int:
    """Check one video and its index, and return the number of frames asked for."""
    sizes = check_tensors(
        op,
        Expect(name, video, "T 3 H W" if layout == "TCHW" else "T H W 3", UINT8),
        Expect(index_name, frame_index, "K", INT64, optional=True),
    )
    for axis in "THW":
        check_integer(op, f"axis {axis} of {name}", sizes[axis], 1)
    frames = sizes["T"] if frame_index is None else sizes["K"]
    check_integer(op, f"the number of frames in {index_name}", frames, 1)
    if validate and frame_index is not None and not frame_index.is_meta:
        check_frames(frame_index, sizes["T"])
    return frames


def _check_settings(
    op: str,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    rescale_factor: float,
    interpolation: str,
    layout: str,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    """Check what is the same for all videos, and return it as the registered ops take it."""
    check_choice(op, "layout", layout, ("TCHW", "THWC"))
    patch_size = check_integer(op, "patch_size", patch_size, 1, _LONGEST_SIDE)
    temporal_patch_size = check_integer(op, "temporal_patch_size", temporal_patch_size, 1, _LONGEST_SIDE)
    merge_size = check_integer(op, "merge_size", merge_size, 1, _LONGEST_SIDE)
    check_choice(op, "interpolation", interpolation, tuple(_SUPPORT))
    if not isinstance(dtype, torch.dtype) or dtype not in _OUTPUT_DTYPES:
        raise TypeError(f"{op}: dtype must be {' or '.join(map(str, _OUTPUT_DTYPES))}, got {dtype}.")
    factor = check_number(op, "rescale_factor", rescale_factor)
    means, stds = _three(op, "mean", mean), _three(op, "std", std)
    if factor <= 0:
        raise ValueError(f"{op}: rescale_factor must be positive, got {rescale_factor}.")
    if 0.0 in stds:
        raise ValueError(f"{op}: std must not contain 0, got {stds}.")
    if min(stds) < 0:
        raise ValueError(f"{op}: std must be positive, got {stds}.")
    _check_values(op, means, stds, factor, dtype)
    return patch_size, temporal_patch_size, merge_size, means, stds, factor, interpolation, layout, dtype


def _check_values(op: str, mean: list[float], std: list[float], factor: float, dtype: torch.dtype) -> None:
    """Raise ValueError where a pixel would be infinite or NaN: the float32 terms are mean and std over `factor`."""
    shift, spread = ([value / factor for value in values] for values in (mean, std))
    pairs = zip(shift, spread, strict=True)
    highest = max(max(abs(s), abs(255 - s)) / t if t >= _FLOAT32.tiny else math.inf for s, t in pairs)
    limit = torch.finfo(dtype).max
    if not (highest <= limit and max(*map(abs, shift), *spread) <= _FLOAT32.max):
        raise ValueError(
            f"{op}: mean, std and rescale_factor must give pixel values of at most {limit:.5g} in magnitude, what "
            f"{dtype} holds, got {highest:.5g} by mean {mean}, std {std} and rescale_factor {factor}."
        )


def _check_size(op: str, name: str, size: Any, unit: int) -> tuple[int, int]:
    size = _check_list(op, name, size, "(height, width)")
    if len(size) != 2:
        raise ValueError(f"{op}: {name} must be (height, width), got {size}.")
    sides = []
    for side, value in zip(("height", "width"), size, strict=True):
        sides.append(check_integer(op, f"{side} of {name}", value, 1, _LONGEST_SIDE))
        if value % unit:
            raise ValueError(
                f"{op}: {side} of {name} must be a multiple of patch_size * merge_size = {unit}, got {value}."
            )
    return sides[0], sides[1]


def _check_out(op: str, out: Tensor, video: Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
    check_tensors(op, Expect("out", out, f"{rows} {columns}", (dtype,)))
    if out.device != video.device:
        raise ValueError(f"{op}: out must be on the device of video ({video.device}), got {out.device}.")
    if not out.is_contiguous():
        raise ValueError(f"{op}: out must be contiguous, got strides {list(out.stride())}.")


def _three(op: str, name: str, values: Sequence[float]) -> list[float]:
    numbers = [check_number(op, name, value) for value in _check_list(op, name, values, "3 numbers, one a channel")]
    if len(numbers) != 3:
        raise ValueError(f"{op}: {name} must have 3 values (one a channel), got {len(numbers)}.")
    return numbers


_SETTINGS = (
    "int patch_size, int temporal_patch_size, int merge_size, float[3] mean, float[3] std, float rescale_factor, "
    "str interpolation, str layout"
)


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


def _fake_videos(
    videos: Sequence[Tensor], frame_index: Sequence[Tensor | None], sizes: Sequence[int], *settings: Any
) -> Tensor:
    pairs = zip(sizes[::2], sizes[1::2], strict=True)
    return torch.cat([_fake(*one, *settings) for one in zip(videos, frame_index, pairs, strict=True)])


def _fake_out(*args: Any) -> None:
    return None


def _frame_size(video: Tensor, layout: str) -> tuple[int, int]:
    return (video.shape[2], video.shape[3]) if layout == "TCHW" else (video.shape[1], video.shape[2])


def _cuda_limits(*, sizes: Sequence[tuple[int, int, int, int]], settings: tuple[Any, ...]) -> str | None:
    """What csrc/patchify_frames/tile_plan.h cannot fit: `sizes` are (H, W, h, w) before and after the resize."""
    patch, _, merge, _, _, _, interpolation, *_ = settings
    across, down = -(-64 // patch) * patch, patch * merge  # output pixels of a tile
    for height, width, target_height, target_width in sizes:
        taps_y, taps_x = (
            2 * math.ceil(_SUPPORT[interpolation] * max(1.0, source / target)) + 1
            for source, target in ((height, target_height), (width, target_width))
        )
        words = (taps_x + 4 + down) * across + taps_y * down + 2 * (across + down) + across // patch * merge
        if 4 * words > _TILE_BYTES:
            return (
                f"a tile may take {_TILE_BYTES // 1024} KiB of shared memory, and a resize from {height} x {width} to "
                f"{target_height} x {target_width} in patches of {patch} needs {-(-words // 256)}"
            )
    return None


def _checking_frames(backend: Backend) -> Backend:
    """`backend`, which on the CPU first checks the values of the indices; on CUDA the kernel clamps them."""

    def forward(video: Any, frame_index: Any, *settings: Any) -> Any:
        pairs = [(video, frame_index)] if isinstance(video, Tensor) else zip(video, frame_index, strict=True)
        for one, index in pairs:
            if index is not None and index.device.type == "cpu":
                check_frames(index, one.shape[0])
        return backend.forward(video, frame_index, *settings)

    return dataclasses.replace(backend, forward=forward)


_forward_op = define_op(
    "patchify_frames",
    f"(Tensor video, Tensor? frame_index, SymInt[2] size, {_SETTINGS}, ScalarType dtype, str backend) -> Tensor",
    _fake,
)
_out_op = define_op(
    "patchify_frames_out",
    f"(Tensor video, Tensor? frame_index, SymInt[2] size, {_SETTINGS}, Tensor(a!) out, str backend) -> ()",
    _fake_out,
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


def _operations(video: Any, frame_index: Any, size: Any, interpolation: str, layout: str) -> int:
    """Two operations a tap of each resize pass that runs, and two a value to normalise."""
    height, width = video[2:4] if layout == "TCHW" else video[1:3]
    planes = 3 * (video[0] if frame_index is None else frame_index[0])
    operations = 2 * size[0] * size[1]
    if width != size[1]:
        operations += 2 * height * size[1] * _taps(width, size[1], interpolation)
    if height != size[0]:
        operations += 2 * size[0] * size[1] * _taps(height, size[0], interpolation)
    return planes * operations


@register_flop_formula([torch.ops.bridge_stg.patchify_frames, torch.ops.bridge_stg.patchify_frames_out])
def _flops(video: Any, frame_index: Any, size: Any, *settings: Any, **kwargs: Any) -> int:
    return _operations(video, frame_index, size, *settings[6:8])


@register_flop_formula(torch.ops.bridge_stg.patchify_videos)
def _flops_videos(videos: Any, frame_index: Any, sizes: Any, *settings: Any, **kwargs: Any) -> int:
    pairs = zip(sizes[::2], sizes[1::2], strict=True)
    return sum(_operations(*one, *settings[6:8]) for one in zip(videos, frame_index, pairs, strict=True))


def _taps(source: int, target: int, interpolation: str) -> int:
    """Width of the antialiased filter, in source pixels."""
    return int(2 * _SUPPORT[interpolation] * max(1.0, source / target))
