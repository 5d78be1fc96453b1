"""Rich tables of results for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ..errors import printable

_GROUPS = ("all", "declarative", "interrogative")
METRICS = ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5", "gt_vIoU")


def metrics_table(report: Mapping[str, Any]) -> Table:
    """Rows: all, sentence types, tiers, trivial baselines; columns: the metrics.

    Args:
        report: the summary of `evaluation.evaluate`; "floors", if it is there, holds a summary for each baseline.
    """
    table = Table("samples", *METRICS, box=None, header_style="bold")
    rows: dict[str, Mapping[str, Any] | None] = {key: report.get(key) for key in _GROUPS}
    rows |= {f"tier {name}": values for name, values in report.get("tiers", {}).items()}
    for name, summary in report.get("floors", {}).items():
        rows[f"trivial baseline: {name}"] = summary["all"]
    for name, values in rows.items():
        if values is not None:
            table.add_row(printable(name), *(_number(values.get(metric)) for metric in METRICS))
    return table


def grounding_table(rows: list[tuple[str, tuple[float, float], tuple[float, float], float, float]]) -> Table:
    """Sentence, predicted and true interval in seconds, tIoU, vIoU."""
    table = Table("sentence", "predicted", "true", "tIoU", "vIoU", box=None, header_style="bold")
    for sentence, predicted, true, t_iou, v_iou in rows:
        table.add_row(printable(sentence), _span(predicted), _span(true), f"{t_iou:.2f}", f"{v_iou:.2f}")
    return table


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f} s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
