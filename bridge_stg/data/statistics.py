"""Statistics of a dataset for tables and charts: lengths, places, sizes and words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .readers import Item, Problem
from .time_base import has_time_base

MEASURES = {
    "clip_seconds": "length of the clip (s)",
    "event_seconds": "length of the event (s)",
    "event_share": "event / clip",
    "event_start": "start of the event / clip",
    "event_end": "end of the event / clip",
    "box_share": "mean box area / frame",
    "words": "words a sentence",
}


@dataclass(frozen=True)
class Statistics:
    """Measures of the samples of a dataset.

    Attributes:
        counts: samples, skipped records, videos, samples by sentence type and by task.
        values: {measure: float64 `[n]`}, one value a sample that has it; the measures are those of `MEASURES`.
    """

    counts: dict[str, int]
    values: dict[str, np.ndarray]

    def to_dict(self) -> dict[str, Any]:
        """Counts, and mean, median, 5th and 95th percentile, least and largest of every measure that occurs."""
        rows = {}
        for name, values in self.values.items():
            if len(values):
                low, median, high = np.percentile(values, (5, 50, 95))
                row = (values.mean(), median, low, high, values.min(), values.max())
                keys = ("mean", "median", "p5", "p95", "min", "max")
                rows[name] = {"count": len(values)} | {k: round(float(v), 4) for k, v in zip(keys, row, strict=True)}
        return {"counts": self.counts, "measures": rows}


def measure_dataset(items: Iterable[Item]) -> Statistics:
    """Measure what a reader yields; problems are only counted."""
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    counts: dict[str, int] = {"samples": 0, "skipped": 0}
    videos = set()
    for item in items:
        if isinstance(item, Problem):
            counts["skipped"] += item.skipped
            continue
        for key in ("samples", item.sentence_type, f"task {item.task}"):
            counts[key] = counts.get(key, 0) + 1
        videos.add(item.video)
        values["words"].append(len(item.sentence.split()))
        first, last = item.segment or (0, item.frame_count)
        if item.interval is not None:
            values["event_seconds"].append(item.interval[1] - item.interval[0])
        if item.frame_count > 1 and has_time_base(item):
            values["clip_seconds"].append((last - first) / item.fps)
        if item.interval is not None and has_time_base(item):
            start, end = (second * item.fps for second in item.interval)
            values["event_share"].append((end - start) / (last - first))
            values["event_start"].append((start - first) / (last - first))
            values["event_end"].append((end - first) / (last - first))
        if item.boxes:
            boxes = np.array(list(item.boxes.values()), dtype=np.float64)
            area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).mean()
            values["box_share"].append(float(area) / (item.width * item.height))
    counts["videos"] = len(videos)
    return Statistics(counts, {name: np.array(found, dtype=np.float64) for name, found in values.items()})
