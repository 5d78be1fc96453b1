"""Charts of a dataset's statistics."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.statistics import MEASURES, Statistics
from ..files import atomic_path
from .charts import Colors, writable

_MOST_BARS = 40
_LONGEST_TITLE = 100
_PANELS = ("clip_seconds", "event_seconds", "event_share", "box_share", "words")


def draw_statistics(statistics: Statistics, path: str | os.PathLike[str], title: str = "") -> None:
    """One picture: a histogram of every measure that occurs, and where in the clip events start and end.

    The title is drawn as it is, without mathematics or markup; a sign that the font lacks becomes an empty box.

    Raises:
        OutputError: the file cannot be written.
        ValueError: the suffix is not a picture format.
    """
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"a chart must be a .png, .svg or .pdf, got {os.fspath(path)!r}")
    colors = Colors()
    figure = Figure(figsize=(11, 6), layout="constrained")
    title = writable(title)
    if len(title) > _LONGEST_TITLE:
        title = title[:_LONGEST_TITLE] + "..."
    heading = f"{title}  ({statistics.counts['samples']} samples)".strip()
    figure.suptitle(heading, color=colors.ink, parse_math=False)
    panels = list(figure.subplots(2, 3).flat)
    for axes, name in zip(panels, _PANELS, strict=False):
        _histogram(axes, statistics, name, colors)
    _places(panels[-1], statistics, colors)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # nothing the reader of a title can mend
        figure.savefig(temporary, dpi=110)


def _histogram(axes: Axes, statistics: Statistics, name: str, colors: Colors) -> None:
    values = statistics.values[name]
    axes.set_xlabel(MEASURES[name], color=colors.muted)
    if not len(values):
        axes.text(0.5, 0.5, "none", ha="center", va="center", color=colors.muted, transform=axes.transAxes)
    else:
        highest = max(float(values.max()), 1.0 if name.endswith("_share") else 0.0)
        bins = range(int(highest) + 2) if name == "words" and highest < _MOST_BARS else _MOST_BARS
        axes.hist(values, bins=bins, range=(0, highest or 1), color=colors.predicted)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    _quiet(axes, colors)


def _places(axes: Axes, statistics: Statistics, colors: Colors) -> None:
    """Start against end of the events, as shares of the clip."""
    start, end = statistics.values["event_start"], statistics.values["event_end"]
    axes.set_xlabel(MEASURES["event_start"], color=colors.muted)
    axes.set_ylabel(MEASURES["event_end"], color=colors.muted)
    axes.plot([0, 1], [0, 1], color=colors.line, linewidth=1)
    if len(start):
        axes.hexbin(start, end, gridsize=24, extent=(0, 1, 0, 1), mincnt=1, bins="log", cmap="viridis")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    _quiet(axes, colors)


def _quiet(axes: Axes, colors: Colors) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(colors.line)
    axes.tick_params(colors=colors.muted, labelsize=8)
