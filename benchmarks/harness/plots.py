"""PNG plots of one op; without matplotlib there are none, and the run says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from .runner import Measured


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write_plots(folder: Path, op: str, label: str, results: Sequence[Measured]) -> list[Path]:
    """`<op>.png`, bars of the ratios a case, and `<op>_<series>.png`, times over x of each series and mode."""
    timed = [m for m in results if m.seconds is not None]
    written = []
    bars = [m for m in timed if m.case.series is None]
    if bars:
        written.append(_bars(folder / f"{op}.png", op, label, bars))
    for series in dict.fromkeys(m.case.series for m in timed if m.case.series is not None):
        found = [m for m in timed if m.case.series == series]
        name = "".join(c if c.isalnum() else "_" for c in series.lower())
        written.append(_lines(folder / f"{op}_{name}.png", op, series, label, found))
    return written


def _bars(path: Path, op: str, label: str, results: Sequence[Measured]) -> Path:
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((m.case.shape, str(m.case.dtype), m.mode) for m in results))
    heights = [sum((m.case.shape, str(m.case.dtype), m.mode) == case for m in results) + 1.5 for case in cases]
    figure = Figure(figsize=(8, 0.24 * sum(heights) + 0.8), layout="constrained")
    grid = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)
    for axes, case in zip(grid[:, 0], cases, strict=True):
        found = [m for m in results if (m.case.shape, str(m.case.dtype), m.mode) == case]
        times = [m.seconds.median * 1e3 if m.seconds else 0.0 for m in found]
        errors = [m.seconds.iqr * 5e2 if m.seconds else 0.0 for m in found]
        colors = ["#1f6feb" if m.provider.ours else "#9aa5b1" for m in found]
        axes.barh([m.provider.name for m in found], times, xerr=errors, color=colors, height=0.7)
        axes.invert_yaxis()
        axes.set_title(f"{case[0]}, {case[1].removeprefix('torch.')}, {case[2]} (ms)", fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if found[0].floor is not None:
            axes.axvline(found[0].floor * 1e3, color="#d1242f", linewidth=1, linestyle=":")
    figure.suptitle(f"{op} on {label}; dotted: the floor", fontsize=9)
    figure.savefig(path, dpi=110)
    return path


def _lines(path: Path, op: str, series: str, label: str, results: Sequence[Measured]) -> Path:
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(m.mode for m in results))
    figure = Figure(figsize=(5 * len(modes), 4), layout="constrained")
    grid = figure.subplots(1, len(modes), squeeze=False)
    for axes, mode in zip(grid[0], modes, strict=True):
        for name in dict.fromkeys(m.provider.name for m in results if m.mode == mode):
            found = sorted(
                (m for m in results if (m.mode, m.provider.name) == (mode, name)), key=lambda m: m.case.x or 0.0
            )
            axes.plot(
                [m.case.x for m in found],
                [m.seconds.median * 1e3 if m.seconds else 0.0 for m in found],
                marker="o",
                markersize=3,
                linewidth=2 if found[0].provider.subject else 1,
                label=name,
            )
        axes.set(xscale="log", yscale="log", title=mode, xlabel=series.split()[0], ylabel="ms")
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{op}, {series}, on {label}", fontsize=9)
    figure.savefig(path, dpi=110)
    return path
