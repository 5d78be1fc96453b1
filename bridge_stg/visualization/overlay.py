"""The source video with the answer drawn on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data import GroundingSample, VideoInfo, frames, probe, write_video
from ..files import refuse_source
from .drawing import PREDICTED, SHADE, TRUE, WHITE, Color, blend, draw_caption, render_frame, true_boxes

if TYPE_CHECKING:
    from ..models.result import GroundingResult


def annotate_video(
    video: str | os.PathLike[str] | VideoInfo,
    result: GroundingResult,
    out_path: str | os.PathLike[str],
    sample: GroundingSample | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a copy of `video` as H.264 MP4, with frame count, size and frame times of the source.

    The copy has no sound, is upright, in square pixels, and begins at 0 s: times of `result`, which are on the source's
    own clock, are `result.start_time` earlier there. Where a frame cannot be decoded, the nearest one stands in.

    Drawn in every frame: the sentence, and a time bar with the predicted interval, the true one (where
    `sample` is given) and the present. Inside the intervals: the predicted box, dashed where it was
    interpolated, and the corners of the true box. Frames are streamed; one is held at a time.

    Args:
        video: a path, or what `probe` returned for it, which saves looking at the file again.
        progress: called as `progress(done, frame_count)` after each frame.

    Raises:
        VideoError: the video cannot be read.
        OutputError: the file cannot be written, or is the video itself.
    """
    info = probe(video)
    refuse_source(info, out_path)
    steps = np.diff(info.times)
    if not len(steps) or np.abs(steps - 1 / info.fps).max() <= 0.01 / info.fps:
        write_video(out_path, _annotated(info, result, sample, progress), fps=info.fps)
    else:
        write_video(out_path, _annotated(info, result, sample, progress), times=info.times)
    return Path(out_path)


def _annotated(
    info: VideoInfo,
    result: GroundingResult,
    sample: GroundingSample | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[np.ndarray]:
    tube = {entry.frame: entry for entry in result.tube}
    truth = true_boxes(sample)
    margin = max(4, round(min(info.width, info.height) * 0.025))
    caption = draw_caption(result.sentence, info.width, info.height, margin=margin)
    bar = _time_bar(info, result, sample)
    bar_top = info.height - len(bar)
    caption_top = 0
    # The sentence keeps to the half of the frame in which the object is not.
    if caption is not None and _mean_height(result, info) < 0.5:
        caption_top = bar_top - len(caption)
    for index, frame in enumerate(frames(info, strict=False)):
        image = render_frame(frame, tube.get(index), truth.get(index))
        if caption is not None:
            blend(image, caption, caption_top)
        blend(image, bar, bar_top)
        x = round(float(info.times[index]) / info.duration * (info.width - 1))
        image[bar_top:, max(0, x - len(bar) // 8) : x + 1 + len(bar) // 8] = WHITE
        yield image
        if progress is not None:
            progress(index + 1, info.frame_count)


def _mean_height(result: GroundingResult, info: VideoInfo) -> float:
    centres = [(entry.box[1] + entry.box[3]) / 2 for entry in result.tube]
    return float(np.mean(centres)) / info.height if centres else 1.0


def _time_bar(info: VideoInfo, result: GroundingResult, sample: GroundingSample | None) -> np.ndarray:
    """RGBA band over the whole clip's time: one row for the predicted interval, one for the true one."""
    start, end = (edge - result.start_time for edge in result.interval)
    rows: list[tuple[tuple[float, float], Color]] = [((start, end), PREDICTED)]
    if sample is not None and sample.interval is not None:
        rows.append((sample.interval, TRUE))
    thick = max(2, round(min(info.width, info.height) * 0.014))
    gap = max(1, thick // 2)
    bar = np.empty((gap + len(rows) * (thick + gap), info.width, 4), dtype=np.uint8)
    bar[:] = (*SHADE, 190)
    for row, (interval, color) in enumerate(rows):
        top = gap + row * (thick + gap)
        left, right = (round(float(np.clip(t / info.duration, 0, 1)) * info.width) for t in interval)
        left = min(left, info.width - 1)
        bar[top : top + thick, left : max(right, left + 1)] = (*color, 255)
    return bar[-info.height :]
