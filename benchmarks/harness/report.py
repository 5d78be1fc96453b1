"""Results as rows of a CSV and as a Markdown page with ratios."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from .machine import revision, versions
from .runner import Measured
from .timing import Spread

COLUMNS = (
    "op",
    "provider",
    "mode",
    "shape",
    "dtype",
    "metric",
    "value",
    "spread",
    "device",
    "versions",
    "revision",
)

_LEGEND = (
    "Ratio: a provider's time over that of bridge_stg in the same round. Medians ± half the distance between the "
    "quartiles. Extra memory: the peak of a call above what was in use, less its result. Of the floor: the time that "
    "the bytes or operations need at this machine's measured rates, over the time taken."
)


def rows(op: str, label: str, results: Sequence[Measured]) -> Iterator[dict[str, str]]:
    """One row a metric; `spread` is the distance between the quartiles, or the reason of a status."""
    for m in results:
        common = {
            "op": op,
            "provider": m.provider.name,
            "mode": m.mode,
            "shape": m.case.shape,
            "dtype": str(m.case.dtype).removeprefix("torch."),
            "device": label,
            "versions": versions(),
            "revision": revision(),
        }
        yield common | {"metric": "status", "value": m.status, "spread": m.note}
        for metric, value, spread in _metrics(m):
            yield common | {"metric": metric, "value": f"{value:.6g}", "spread": spread}


def _metrics(m: Measured) -> Iterator[tuple[str, float, str]]:
    for metric, found, factor in (
        ("graph_ms" if m.captured else "time_ms", m.seconds, 1e3),
        ("eager_ms", m.eager_seconds, 1e3),
        ("ratio", m.ratio, 1.0),
        ("peak_memory_mb", m.peak, 1e-6),
        ("extra_memory_mb", m.extra, 1e-6),
    ):
        if found is not None:
            yield metric, found.median * factor, f"{found.iqr * factor:.3g}"
    if m.floor is not None:
        yield "floor_ms", m.floor * 1e3, ""
        if m.seconds is not None:
            yield "floor_share", m.floor / m.seconds.median, ""
    if m.counts is not None:
        yield "kernels", m.counts.kernels, ""
        yield "host_syncs", m.counts.syncs, ""


def write_csv(path: Path, op: str, label: str, results: Sequence[Measured]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(op, label, results))


def markdown(op: str, label: str, results: Sequence[Measured]) -> str:
    """The page of one op: a summary against the best peer, then every provider of every case."""
    lines = [f"# {op}", "", f"{label}; {versions()}; revision {revision()}.", "", _LEGEND, "", *summary(results), ""]
    for (shape, dtype, mode), found in _by_case(results):
        lines += [f"## {shape}, {dtype}, {mode}", "", *_table(found), ""]
    return "\n".join(lines)


def summary(results: Sequence[Measured]) -> list[str]:
    """One line a case: the subject against the fastest peer that agrees."""
    lines = [
        "| shape | dtype | mode | bridge_stg | best peer | times faster | extra memory, ours / theirs | of the floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (shape, dtype, mode), found in _by_case(results):
        ours = next((m for m in found if m.provider.subject), None)
        peers = [m for m in found if not m.provider.ours and m.seconds is not None]
        best = min(peers, key=lambda m: m.seconds.median if m.seconds else 0.0, default=None)
        cells = [shape, dtype, mode]
        if ours is None or ours.seconds is None:
            cells += [ours.status if ours else "-", "-", "-", "-", "-"]
        else:
            share = "-" if ours.floor is None else f"{ours.floor / ours.seconds.median:.0%}"
            cells.append(_milliseconds(ours))
            if best is None or best.ratio is None:
                cells += ["-", "-", "-", share]
            else:
                cells += [
                    f"{best.provider.name}, {_milliseconds(best)}",
                    _ratio(best),
                    _memory_share(ours, best),
                    share,
                ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _table(found: Sequence[Measured]) -> list[str]:
    ours = next((m for m in found if m.provider.subject), None)
    counted = any(m.counts is not None for m in found)
    head = ["provider", "time", "ratio", "extra memory", "ours / theirs", "of the floor"]
    head += ["launched by the host", "kernels", "host syncs"] if counted else []
    lines = [f"| {' | '.join([*head, 'note'])} |", "|---" * (len(head) + 1) + "|"]
    for m in found:
        if m.seconds is None:
            cells = ["-"] * (len(head) - 1)
            note = f"{m.status}: {m.note}"
        else:
            share = "-" if m.floor is None else f"{m.floor / m.seconds.median:.0%}"
            extra = "-" if m.extra is None else f"{m.extra.median / 1e6:.1f} MB"
            memory = "-" if ours is None or m is ours else _memory_share(ours, m)
            cells = [_milliseconds(m), _ratio(m), extra, memory, share]
            note = ""
            if counted:
                eager = "-" if m.eager_seconds is None else f"{m.eager_seconds.median * 1e3:.3f} ms"
                cells += [eager, *(map(str, m.counts) if m.counts else ("-", "-"))]
                note = "" if m.captured else m.note or "not captured in a graph"
        lines.append(f"| {' | '.join([m.provider.name, *cells, note.replace('|', '/')])} |")
    return lines


def _by_case(results: Sequence[Measured]) -> Iterator[tuple[tuple[str, str, str], list[Measured]]]:
    def key(m: Measured) -> tuple[str, str, str]:
        return m.case.shape, str(m.case.dtype).removeprefix("torch."), m.mode

    for case, found in groupby(results, key):
        yield case, list(found)


def _milliseconds(m: Measured) -> str:
    assert m.seconds is not None
    return f"{m.seconds.median * 1e3:.3f} ms ± {_half(m.seconds) * 1e3:.3f}"


def _ratio(m: Measured) -> str:
    return "1" if m.ratio is None else f"{m.ratio.median:.2f} ± {_half(m.ratio):.2f}"


def _half(spread: Spread) -> float:
    return spread.iqr / 2


def _memory_share(ours: Measured, theirs: Measured) -> str:
    if ours.extra is None or theirs.extra is None or theirs.extra.median <= 0:
        return "-"
    return f"{ours.extra.median / theirs.extra.median:.2f}"
