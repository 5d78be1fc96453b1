"""Writing H.264 video through PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace

from ..errors import OutputError
from ..files import atomic_path
from .picture import HD_LINES

# Visually lossless; the same bits on every processor and in every run, which x264's default does not promise.
_OPTIONS = {"crf": "18", "preset": "fast", "x264-params": "cpu-independent=1"}
_SMALL_FRAME = 256 * 256
# Players take untagged video of so many lines for BT.709 or BT.601; frames are converted to it, and tagged.
_BT709 = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709", "color_range": "tv"}


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray | torch.Tensor],
    *,
    fps: float | None = None,
    times: Sequence[float] | np.ndarray | None = None,
) -> int:
    """Write an H.264 MP4 atomically, frame for frame; returns the number of frames.

    Even sizes are stored as yuv420p, odd ones as yuv444p, so that the size is always that of the frames.

    Args:
        frames: at least one, each uint8 `[H, W, 3]` RGB, all of one size.
        fps: constant frame rate; or
        times: seconds of each frame, ascending, at least one for each (variable frame rate); the first is at 0 in
            the file.

    Raises:
        OutputError: the file cannot be written, or the encoder refuses the size.
        ValueError: not exactly one of `fps` and `times`, no frames, fewer times than frames, or a frame of
            another size or dtype.
    """
    if (fps is None) == (times is None):
        raise ValueError("give exactly one of fps and times")
    clock = None if times is None else np.asarray(times, dtype=np.float64)
    if clock is not None and (clock.ndim != 1 or not np.isfinite(clock).all() or (np.diff(clock) <= 0).any()):
        raise ValueError("times must be one ascending list of finite seconds")
    if fps is not None:
        rate = Fraction(fps).limit_denominator(100_000)
    else:
        assert clock is not None
        rate = Fraction((len(clock) - 1) / (clock[-1] - clock[0]) if len(clock) > 1 else 1.0)
        rate = rate.limit_denominator(100_000)
    if rate <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    try:
        with atomic_path(path) as temporary:
            return _encode(temporary, frames, clock, rate)
    except av.FFmpegError as error:
        raise OutputError(f"{os.fspath(path)} cannot be encoded as H.264: {error.strerror or error}.") from error


def _encode(
    path: os.PathLike[str],
    frames: Iterable[np.ndarray | torch.Tensor],
    clock: np.ndarray | None,
    rate: Fraction,
) -> int:
    time_base = 1 / rate if clock is None else Fraction(1, 90_000)
    count, tick = 0, -1
    shape: tuple[int, ...] | None = None
    # An absolute path with its protocol, so that FFmpeg takes no colon in the name for that of an address.
    with av.open(f"file:{os.path.abspath(path)}", "w", format="mp4") as container:
        stream: Any = None
        for frame in frames:
            array = np.ascontiguousarray(frame.numpy() if isinstance(frame, torch.Tensor) else frame)
            shape = shape or array.shape
            if array.dtype != np.uint8 or array.shape != shape or shape[2:] != (3,) or not array.size:
                raise ValueError(f"frames must be uint8 [H, W, 3] of one size, got {array.dtype} {list(array.shape)}")
            if stream is None:
                stream = _add_stream(container, shape, rate, time_base)
            if clock is not None and count >= len(clock):
                raise ValueError(f"times must have a value for each frame, got only {len(clock)}")
            picture = VideoFrame.from_ndarray(array, format="rgb24")
            picture.time_base = time_base
            # Frames closer than a tick still come one after the other.
            tick = count if clock is None else max(tick + 1, round((clock[count] - clock[0]) / time_base))
            picture.pts = tick
            if shape[0] >= HD_LINES:
                picture = picture.reformat(format=stream.pix_fmt, dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(picture))
            count += 1
        if stream is None:
            raise ValueError("frames must hold at least one frame")
        container.mux(stream.encode(None))
    return count


def _add_stream(container: Any, shape: tuple[int, ...], rate: Fraction, time_base: Fraction) -> Any:
    height, width = shape[:2]
    stream = container.add_stream("libx264", rate=rate, options=_OPTIONS | (_BT709 if height >= HD_LINES else {}))
    stream.width, stream.height = width, height
    stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
    stream.time_base = stream.codec_context.time_base = time_base
    if height * width <= _SMALL_FRAME:
        # The bits depend on the thread count too; small clips come out alike on every machine.
        stream.thread_count = 1
    return stream
