"""Mapping annotated frames to decoded frames by time, as their numbers seldom agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..errors import SampleError
from .sample import Box, GroundingSample
from .video import VideoInfo

UNKNOWN_SIZE = (1, 1)  # width and height of a sample whose annotation has neither them nor a time base in frames


def has_time_base(sample: GroundingSample) -> bool:
    """Whether the sample's rate, length and size are those of a video, and not stand-ins (see `UNKNOWN_SIZE`)."""
    return (sample.width, sample.height) != UNKNOWN_SIZE


def align_to_video(sample: GroundingSample, info: VideoInfo) -> GroundingSample:
    """The same sample in the frames of its decoded video.

    The interval keeps its seconds, cut at the video's end. Every decoded frame takes the box of the annotated frame
    nearest in time, where there is one within half an annotated frame. Boxes are scaled if the video's size is
    another. An image, or a task without time, keeps its frames.

    Args:
        sample: in the frames of its annotation, frame f being at f / fps seconds.
        info: what `probe` says of the sample's video.

    Raises:
        SampleError: the event or the segment begins after the video's last frame.
    """
    if info.frame_count == 1 and sample.frame_count == 1:
        return replace(sample, width=info.width, height=info.height, boxes=_scaled(sample, info, dict(sample.boxes)))
    interval, segment = sample.interval, sample.segment
    if interval is not None:
        if interval[0] >= info.duration:
            raise SampleError(
                f"the event begins at {interval[0]:.2f} s, but the video {sample.video} ends at {info.duration:.2f} s."
            )
        interval = (interval[0], min(interval[1], info.duration))
    if segment is not None:
        # Half a frame of tolerance: the first decoded frame at or after the boundary, whatever the rounding of times.
        start, end = (int(np.searchsorted(info.times, (edge - 0.5) / sample.fps)) for edge in segment)
        if start >= info.frame_count:
            raise SampleError(
                f"the segment begins at {segment[0] / sample.fps:.2f} s, but the video {sample.video} ends at "
                f"{info.duration:.2f} s."
            )
        segment = (start, max(end, start + 1))
    position = info.times * sample.fps
    nearest = np.rint(position).astype(np.int64)
    boxes = {
        frame: sample.boxes[annotated] for frame, annotated in enumerate(nearest.tolist()) if annotated in sample.boxes
    }
    return replace(
        sample,
        width=info.width,
        height=info.height,
        fps=info.fps,
        frame_count=info.frame_count,
        interval=interval,
        segment=segment,
        boxes=_scaled(sample, info, boxes),
    )


def _scaled(sample: GroundingSample, info: VideoInfo, boxes: dict[int, Box]) -> dict[int, Box]:
    if (sample.width, sample.height) == (info.width, info.height):
        return boxes
    x, y = info.width / sample.width, info.height / sample.height
    return {frame: (x1 * x, y1 * y, x2 * x, y2 * y) for frame, (x1, y1, x2, y2) in boxes.items()}
