"""Clips: the frames that a model sees of a video, decoded, with their times."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import VideoError, printable
from .frame_sampling import uniform_frame_index
from .video import MOST_ELONGATED, VideoInfo, decode_frames, probe


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames decoded from a video, on the clip's own clock, which starts at 0 with the first frame of the segment.

    Attributes:
        info: the video that the frames are from.
        frames: uint8 `[T, H, W, 3]`, RGB, upright.
        times: float64 `[T]`, seconds from the clip's start, ascending; repeated frames at the end repeat their time.
        source_frames: int64 `[T]`, which frames of the video these are.
        begin: seconds of the video at which the clip starts.
        duration: seconds from the clip's start to the end of its last source frame.
    """

    info: VideoInfo
    frames: torch.Tensor
    times: np.ndarray
    source_frames: np.ndarray
    begin: float
    duration: float


def load_clip(
    video: str | os.PathLike[str] | VideoInfo,
    *,
    segment: tuple[int, int] | None = None,
    fps: float,
    max_frames: int,
    multiple: int = 2,
) -> Clip:
    """Probe a video, choose frames at about `fps` a second, and decode these alone.

    Args:
        video: a path, or what `probe` returned for it, which saves looking at the file again.
        segment: source frames [start, end) that form the clip; None means the whole video. What lies behind the last
            frame is ignored.
        fps, max_frames, multiple: see `uniform_frame_index`.

    Raises:
        VideoError: the video cannot be read, or one side of its frames is more than 200 times the other.
        ValueError: a setting is out of its range, or the segment starts behind the last frame.
    """
    info = probe(video)
    check_shape(info)
    start, end = segment or (0, info.frame_count)
    end = min(end, info.frame_count)
    if not 0 <= start < end:
        raise ValueError(f"segment must have 0 <= start < end <= {info.frame_count} (frames), got {segment}")
    begin = float(info.times[start])
    clock = info.times[start:end] - begin
    index = uniform_frame_index(clock, fps, max_frames, multiple)
    finish = info.duration if end == info.frame_count else float(info.times[end])
    source = start + index
    return Clip(info, decode_frames(info, source), clock[index], source, begin, finish - begin)


def check_shape(info: VideoInfo) -> None:
    """Raise VideoError unless a vision tower can take frames of this video's shape: the bound of Qwen's processors."""
    if max(info.width, info.height) > MOST_ELONGATED * min(info.width, info.height):
        raise VideoError(
            f"{printable(info.path)} has frames of {info.width} x {info.height} pixels; one side may be at most "
            f"{MOST_ELONGATED} times the other."
        )
