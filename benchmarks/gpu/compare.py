"""Predicted times beside measured ones."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PREDICTIONS = Path(__file__).parents[1] / "results" / "predictions.csv"
APART = 1.5  # a factor between the two that needs an explanation
_KEY = ("op", "provider", "mode", "shape", "dtype")


def compare(rows: Sequence[Mapping[str, str]], predictions: Path = PREDICTIONS) -> Iterator[str]:
    """A Markdown table of all predicted targets, from rows of `results.csv`."""
    if not predictions.is_file():
        yield f"no predictions: {predictions} is not there"
        return
    measured = {tuple(row[name] for name in _KEY): row for row in rows if row["metric"] == "graph_ms"}
    launched = {tuple(row[name] for name in _KEY): row for row in rows if row["metric"] in ("time_ms", "eager_ms")}
    yield "Predictions are a model's, measurements are graph replays; eager launches are a column of their own."
    yield ""
    yield "| op | shape | mode | predicted | measured | measured / predicted | eager | predicted floor |"
    yield "|---|---|---|---|---|---|---|---|"
    with predictions.open(newline="", encoding="utf-8") as file:
        totals = [row for row in csv.DictReader(file) if row["kernel"] == "total"]
    for row in totals:
        key = tuple(row[name] for name in _KEY)
        predicted = float(row["predicted_us"])
        cells = [row["op"], row["shape"], row["mode"], f"{predicted:.1f} us"]
        if key in measured:
            taken = 1e3 * float(measured[key]["value"])
            far = " (!)" if not 1 / APART <= taken / predicted <= APART else ""
            cells += [f"{taken:.1f} us", f"{taken / predicted:.2f}{far}"]
        else:
            cells += ["-", "-"]
        cells.append(f"{1e3 * float(launched[key]['value']):.1f} us" if key in launched else "-")
        yield f"| {' | '.join([*cells, row['floor_us'] + ' us'])} |"
