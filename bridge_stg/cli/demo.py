"""`bridge-stg demo`: ground the bundled clips, draw everything, and watch a fresh tiny model learn."""

from __future__ import annotations

import logging
import time
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..data import GroundingSample, read_samples
from ..evaluation import Prediction, score_sample
from ..files import ensure_writable_folder, write_text
from ..models import BridgeSTGForVideoGrounding, GroundingResult, load_model
from ..visualization import ReportEntry, annotate_video, draw_strip, write_report
from .console import show_table
from .tables import grounding_table


def bundled_clips() -> list[GroundingSample]:
    """The clips that come with the package, with their sentences and true tubes."""
    return read_samples(str(resources.files("bridge_stg") / "assets" / "clips" / "demo.jsonl"))


def run_demo(out: Path, *, train_seconds: float, console: Console) -> None:
    """Write `<clip>.mp4`, `<clip>.png`, `<clip>.json` and `report.html` to `out`; train for `train_seconds`.

    Raises:
        OutputError: `out` cannot be written.
    """
    ensure_writable_folder(out)
    samples = bundled_clips()
    with console.status("loading the tiny checkpoint"):
        model = load_model()
    entries, rows = [], []
    for sample in samples:
        with console.status(Text(f"grounding {sample.sentence!r}")):
            entry, score = _ground(model, sample, out)
        entries.append(entry)
        if sample.interval is not None:
            rows.append((sample.sentence, entry.result.interval, sample.interval, *score))
    show_table(grounding_table(rows))
    curve: list[tuple[int, float]] = []
    if train_seconds > 0:
        curve = train_fresh(out / "training", train_seconds, console)
        (first, high), (last, low) = curve[0], curve[-1]
        console.print(f"a fresh model: loss {high:.2f} at step {first}, {low:.2f} at step {last}")
    write_report(entries, out / "report.html", title="Bridge-STG demo", training=curve or None)
    console.print(f"wrote {out / 'report.html'}")


def _ground(
    model: BridgeSTGForVideoGrounding, sample: GroundingSample, out: Path
) -> tuple[ReportEntry, tuple[float, float]]:
    result: GroundingResult = model.ground(sample.video, sample.sentence)
    annotate_video(sample.video, result, out / f"{sample.id}.mp4", sample=sample)
    draw_strip(sample.video, result, out / f"{sample.id}.png", sample=sample)
    write_text(out / f"{sample.id}.json", result.to_json(indent=2))
    score = score_sample(sample, Prediction.from_result(sample.id, result))
    return ReportEntry(result, sample, annotated=out / f"{sample.id}.mp4"), (score.tIoU, score.vIoU or 0.0)


def train_fresh(folder: Path, seconds: float, console: Console) -> list[tuple[int, float]]:
    """Train the 'demo' configuration for some seconds with a live progress bar; returns its (step, loss) curve."""
    from ..training import TrainingProgress, load_config, train

    logging.getLogger("transformers").setLevel(logging.ERROR)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    run = folder / time.strftime("%Y%m%d-%H%M%S")  # a fresh model each time, never a resumed one
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        progress = TrainingProgress(bar)
        train(load_config("demo"), run, callbacks=[progress], max_seconds=seconds, tensorboard=False)
    return progress.curve
