"""Charts of one grounding, drawn by matplotlib into given axes or as inline SVG for HTML pages."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.sample import GroundingSample
from ..evaluation.metrics import box_iou
from .drawing import PREDICTED, TRUE, hex_color, true_boxes

if TYPE_CHECKING:
    from ..models.result import GroundingResult


@dataclass(frozen=True)
class Colors:
    """Colours of a chart, as matplotlib takes them."""

    ink: str = "#1d2733"
    muted: str = "#64717f"
    line: str = "#dde3e9"
    predicted: str = hex_color(PREDICTED)
    true: str = hex_color(TRUE)


# Stand-ins: in SVG each becomes a CSS variable, so that one chart serves light and dark pages.
_CSS = Colors(ink="#010001", muted="#010002", line="#010003", predicted="#010004", true="#010005")


_UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def writable(text: str) -> str:
    """Text of others with a replacement character for what no page and no chart can hold: controls, surrogates."""
    return _UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def draw_timeline(
    axes: Axes,
    result: GroundingResult,
    sample: GroundingSample | None,
    duration: float,
    colors: Colors,
    font_size: float,
) -> None:
    """Draw the presence curve over bars of the predicted and, where known, the true interval, over the whole video.

    Args:
        duration: of the video, seconds.
    """
    begin = result.start_time  # `sample` counts from the first frame, `result` is on the file's own clock
    rows = [("predicted", result.interval, colors.predicted)]
    if sample is not None and sample.interval is not None:
        true_start, true_end = (edge + begin for edge in sample.interval)
        rows.append(("true", (true_start, true_end), colors.true))
    ticks, labels = [], []
    if result.presence:
        times = [point.time for point in result.presence]
        values = [point.value for point in result.presence]
        axes.fill_between(times, values, color=colors.predicted, alpha=0.16, linewidth=0)
        axes.plot(times, values, color=colors.predicted, linewidth=font_size / 6, solid_capstyle="round")
        if len(times) <= 64:
            axes.plot(times, values, ".", color=colors.predicted, markersize=font_size / 2.2)
        axes.axhline(1, color=colors.line, linewidth=0.8, zorder=0)
        axes.axhline(0, color=colors.line, linewidth=0.8, zorder=0)
        axes.axvspan(*result.interval, ymin=0, ymax=1, color=colors.predicted, alpha=0.07, linewidth=0, zorder=0)
        ticks, labels = [0.5], ["presence"]
    for row, (label, (start, end), color) in enumerate(rows):
        y = -0.3 - 0.36 * row
        axes.barh(y, duration, left=begin, height=0.22, color=colors.line, alpha=0.55, linewidth=0)
        axes.barh(y, max(end - start, duration / 400), left=start, height=0.22, color=color, linewidth=0)
        ticks.append(y)
        labels.append(label)
    axes.set_ylim(-0.3 - 0.36 * (len(rows) - 1) - 0.2, 1.06 if result.presence else 0)
    axes.set_yticks(ticks, labels)
    _finish(axes, begin + duration, colors, font_size, start=begin)
    axes.tick_params(axis="y", length=0)


def draw_extents(
    figure: Figure,
    result: GroundingResult,
    sample: GroundingSample | None,
    colors: Colors,
    font_size: float,
) -> None:
    """Draw the tube as bands over time: left to right, top to bottom, and box IoU where truth is known."""
    tube = {entry.frame: (entry.time, entry.box) for entry in result.tube}
    truth = true_boxes(sample)
    period = 1 / result.fps
    axes = figure.subplots(1, 3 if truth else 2)
    ends = [*result.interval]
    if sample is not None and sample.interval is not None:
        ends += [edge + result.start_time for edge in sample.interval]
    for panel, (low, title, limit) in enumerate(
        ((0, "left and right edge, px", result.width), (1, "top and bottom edge, px", result.height))
    ):
        chart = axes[panel]
        for group, shade in ((True, 0.22), (False, 0.45)):
            entries = [entry for entry in result.tube if entry.interpolated == group]
            chart.bar(
                [entry.time for entry in entries],
                [entry.box[low + 2] - entry.box[low] for entry in entries],
                bottom=[entry.box[low] for entry in entries],
                width=period,
                align="edge",
                color=colors.predicted,
                alpha=shade,
                linewidth=0,
            )
        for side in (low, low + 2):
            _steps(
                chart,
                {t: box[side] for t, box in tube.values()},
                period,
                colors.predicted,
                font_size / 7,
                "-",
            )
            points = {
                tube[frame][0] if frame in tube else result.start_time + frame * period: box[side]
                for frame, box in truth.items()
            }
            _steps(chart, points, period, colors.true, font_size / 5, "--")
        chart.set_ylim((limit, 0) if low else (0, limit))
        chart.set_title(title, fontsize=font_size, color=colors.muted, loc="left")
    if truth:
        shared = [frame for frame in tube if frame in truth]
        values = box_iou([tube[f][1] for f in shared], [truth[f] for f in shared]).tolist() if shared else []
        points = {tube[frame][0]: value for frame, value in zip(shared, values, strict=True)}
        _steps(axes[2], points, period, colors.predicted, font_size / 5, "-")
        axes[2].set_ylim(0, 1)
        title = "box IoU" if shared else "box IoU: no frame in both intervals"
        axes[2].set_title(title, fontsize=font_size, color=colors.muted, loc="left")
    margin = max((max(ends) - min(ends)) * 0.03, period * 0.2)
    for chart in axes:
        _finish(chart, max(ends) + margin, colors, font_size, start=min(ends) - margin)
        chart.yaxis.set_major_locator(MaxNLocator(4))


def draw_loss(axes: Axes, training: Sequence[tuple[int, float]], colors: Colors, font_size: float) -> None:
    """Training loss over steps: every value thin, their running mean bold."""
    steps = np.array([step for step, _ in training])
    loss = np.array([value for _, value in training], dtype=np.float64)
    window = max(1, len(loss) // 20)
    padded = np.concatenate([np.full(window - 1, loss[0]), loss])
    smooth = np.convolve(padded, np.ones(window) / window, mode="valid")
    axes.plot(steps, loss, color=colors.predicted, linewidth=font_size / 12, alpha=0.45)
    axes.plot(steps, smooth, color=colors.predicted, linewidth=font_size / 5, solid_capstyle="round")
    axes.set_ylim(bottom=min(0, float(loss.min())))
    axes.set_title("loss", fontsize=font_size, color=colors.muted, loc="left")
    _finish(axes, float(steps[-1]), colors, font_size, start=float(steps[0]), unit="step")
    axes.yaxis.set_major_locator(MaxNLocator(4))


def to_svg(draw: Callable[[Figure, Colors, float], None], size: tuple[float, float], salt: str) -> str:
    """Draw a figure as `<svg>` for an HTML page.

    Args:
        draw: draws into the figure, in the colours and at the font size given.
        size: (width, height) in CSS pixels; the page may scale it.
        salt: keeps the ids of one figure apart from those of others on the page.

    Returns:
        An element coloured by the CSS variables `--ink`, `--muted`, `--line`, `--predicted` and `--true`.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        draw(figure, _CSS, 11.0)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r'<svg[^>]* viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Only ids that the figure itself refers to may stay: the others come again in every figure of the page.
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for name, value in vars(_CSS).items():
        svg = svg.replace(value, f"var(--{name})")
    return svg


def _steps(axes: Axes, values: Mapping[float, float], period: float, color: str, width: float, style: str) -> None:
    """One horizontal step per frame, broken where frames are missing."""
    x: list[float] = []
    y: list[float] = []
    for time in sorted(values):
        if x and time - x[-1] > period / 2:
            x.append(time)
            y.append(float("nan"))
        x += [time, time + period]
        y += [values[time], values[time]]
    axes.plot(x, y, style, color=color, linewidth=width)


def _finish(axes: Axes, end: float, colors: Colors, font_size: float, start: float = 0.0, unit: str = "s") -> None:
    """The common frame: no box, light grid over time, unit at the last tick."""
    axes.set_xlim(start, end if end > start else start + 1)
    axes.xaxis.set_major_locator(MaxNLocator(8 if unit == "s" else 6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} {unit}" if unit == "s" else f"{value:g}")
    axes.grid(axis="x", color=colors.line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colors.muted, labelsize=font_size, length=0, pad=font_size / 2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_facecolor("none")
