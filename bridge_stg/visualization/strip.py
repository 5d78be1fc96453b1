"""A grounding as one picture: frames across the clip, and its time line below."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..data import GroundingSample, VideoInfo, decode_frames, probe
from ..evaluation.metrics import SampleScore, score_sample
from ..evaluation.predictions import Prediction
from ..files import atomic_path, refuse_source
from .charts import Colors, draw_timeline
from .drawing import load_font, render_frame, true_boxes, wrap_text

if TYPE_CHECKING:
    from ..models.result import GroundingResult

STRIP_WIDTH = 1800
_MARGIN, _GAP = 44, 14
_DPI = 72  # one point is one pixel, so that all sizes below are in pixels
_TITLE, _TEXT = 36, 23


def draw_strip(
    video: str | os.PathLike[str] | VideoInfo,
    result: GroundingResult,
    out_png: str | os.PathLike[str],
    sample: GroundingSample | None = None,
    columns: int = 6,
) -> Path:
    """Write a PNG, `STRIP_WIDTH` pixels wide: sentence, `columns` frames with boxes and times, time line.

    Frames are spread over the clip, at least half of them inside the predicted interval where it has so many;
    those are underlined. Small frames are scaled up. With `sample`, truth and scores are shown as well.

    Args:
        video: a path, or what `probe` returned for it, which saves looking at the file again.

    Raises:
        VideoError: the video cannot be read.
        OutputError: the file cannot be written, or is the video itself.
        ValueError: `columns` is not positive.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    info = probe(video)
    refuse_source(info, out_png)
    colors = Colors()
    picked = pick_frames(info.frame_count, [entry.frame for entry in result.tube], columns)
    tube = {entry.frame: entry for entry in result.tube}
    truth = true_boxes(sample)
    inner = STRIP_WIDTH - 2 * _MARGIN
    width = (inner - (columns - 1) * _GAP) // columns
    pictures = [
        render_frame(image, tube.get(frame), truth.get(frame), width, thickness=3)
        for frame, image in zip(picked, decode_frames(info, picked).numpy(), strict=True)
    ]
    title = wrap_text(result.sentence, load_font(_TITLE, bold=True), inner, max_lines=2)
    line_height = round(_TITLE * 1.3)
    subtitle_top = _MARGIN + len(title) * line_height
    frames_top = subtitle_top + 56
    frames_end = frames_top + pictures[0].shape[0]
    chart_top = frames_end + 70
    rows = 1 + (sample is not None and sample.interval is not None)
    chart_end = chart_top + 52 * rows + (130 if result.presence else 0)

    canvas = _Canvas(STRIP_WIDTH, chart_end + 74)
    for row, line in enumerate(title):
        canvas.text(_MARGIN, _MARGIN + (row + 0.4) * line_height, line, _TITLE, colors.ink, bold=True)
    canvas.text(_MARGIN, subtitle_top + 16, _describe(result, sample), _TEXT, colors.muted)
    for column, (frame, picture) in enumerate(zip(picked, pictures, strict=True)):
        left = _MARGIN + column * (width + _GAP)
        axes = canvas.axes(left, frames_top, left + width, frames_end)
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        axes.axis("off")
        inside = frame in tube
        if inside:
            canvas.bar(left, frames_end + 3, left + width, frames_end + 9, colors.predicted)
        color = colors.ink if inside else colors.muted
        canvas.text(left, frames_end + 30, f"{info.start_time + info.times[frame]:.2f} s", _TEXT, color, bold=inside)

    chart = canvas.axes(_MARGIN + 150, chart_top, STRIP_WIDTH - _MARGIN - 20, chart_end)
    draw_timeline(chart, result, sample, info.duration, colors, _TEXT * 0.9)
    marks = np.full(len(picked), chart.get_ylim()[1])
    chart.plot(info.start_time + info.times[picked], marks, "v", color=colors.muted, markersize=9, clip_on=False)
    with atomic_path(out_png) as temporary:
        canvas.figure.savefig(temporary, format="png")
    return Path(out_png)


class _Canvas:
    """A white figure in which things are placed by pixels from the top left."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def _box(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        w, h = self.width, self.height
        return left / w, 1 - bottom / h, (right - left) / w, (bottom - top) / h

    def axes(self, left: float, top: float, right: float, bottom: float) -> Axes:
        return self.figure.add_axes(self._box(left, top, right, bottom))

    def bar(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        x, y, width, height = self._box(left, top, right, bottom)
        self.figure.add_artist(Rectangle((x, y), width, height, color=color, linewidth=0))

    def text(self, x: float, y: float, text: str, size: float, color: str, *, bold: bool = False) -> None:
        # Sentences and file names are never mathematics, whatever dollar signs they hold.
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=size,
            color=color,
            weight="bold" if bold else "normal",
            va="center",
            parse_math=False,
        )


def pick_frames(frame_count: int, inside: list[int], columns: int) -> list[int]:
    """Up to `columns` frames, ascending, spread over the clip; at least half (if so many) are in `inside`."""
    columns = min(columns, frame_count)
    even = _spread(list(range(frame_count)), columns)
    members = set(inside)
    wanted = min(len(inside), math.ceil(columns / 2))
    if sum(frame in members for frame in even) >= wanted:
        return even
    outside = [frame for frame in range(frame_count) if frame not in members]
    return sorted(_spread(inside, wanted) + _spread(outside, columns - wanted))


def _spread(frames: list[int], count: int) -> list[int]:
    """`count` of the frames, evenly spaced, each in the middle of its share."""
    return [frames[int((i + 0.5) * len(frames) / count)] for i in range(count)]


def score_result(result: GroundingResult, sample: GroundingSample | None) -> SampleScore | None:
    """The scores of a result; None where no true interval is known."""
    if sample is None or sample.interval is None:
        return None
    return score_sample(sample, Prediction.from_result(sample.id, result))


def _describe(result: GroundingResult, sample: GroundingSample | None) -> str:
    start, end = result.interval
    facts = [f"predicted {start:.2f} to {end:.2f} s (from {result.interval_source})"]
    if sample is not None and sample.interval is not None and (score := score_result(result, sample)):
        true_start, true_end = (edge + result.start_time for edge in sample.interval)
        facts += [f"true {true_start:.2f} to {true_end:.2f} s", f"tIoU {score.tIoU:.2f}"]
        if score.vIoU is not None:
            facts.append(f"vIoU {score.vIoU:.2f}")
    facts.append(f"confidence {result.confidence:.2f}")
    return "   ·   ".join(facts)
