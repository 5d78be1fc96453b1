"""`bridge-stg demo`: ground the bundled clips, draw everything, and watch a fresh tiny model learn."""

from __future__ import annotations

import logging
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from .console import finite, path_option, progress_bar, show_table, stderr
from .tables import grounding_table

if TYPE_CHECKING:
    from ..data import GroundingSample
    from ..models import BridgeSTGForVideoGrounding
    from ..visualization import ReportEntry


def demo(
    out: Annotated[Path, path_option("--out", "-o", help="Folder for MP4s, strips and report.html.")] = Path(
        "demo-out"
    ),
    train_seconds: Annotated[
        float, typer.Option(min=0, callback=finite, help="How long the fresh model trains; 0 skips it.")
    ] = 60.0,
) -> None:
    """Ground three bundled clips, write a report, and train a fresh tiny model for about a minute."""
    from ..data import read_samples
    from ..evaluation import Prediction, score_sample
    from ..files import ensure_writable_folder
    from ..models import load_model
    from ..visualization import write_report

    ensure_writable_folder(out)
    with stderr.status("loading the tiny checkpoint"):
        model = load_model()
    entries, rows = [], []
    for sample in read_samples(str(resources.files("bridge_stg") / "assets" / "clips" / "demo.jsonl")):
        with stderr.status(Text(f"grounding {sample.sentence!r}")):
            entry = _ground(model, sample, out)
        entries.append(entry)
        if sample.interval is not None:
            score = score_sample(sample, Prediction.from_result(sample.id, entry.result))
            rows.append((sample.sentence, entry.result.interval, sample.interval, score.tIoU, score.vIoU or 0.0))
    show_table(grounding_table(rows))
    curve: list[tuple[int, float]] = []
    if train_seconds > 0:
        curve = _train_fresh(out / "training", train_seconds)
        (first, high), (last, low) = curve[0], curve[-1]
        stderr.print(f"a fresh model: loss {high:.2f} at step {first}, {low:.2f} at step {last}")
    write_report(entries, out / "report.html", title="Bridge-STG demo", training=curve or None)
    stderr.print(f"wrote {out / 'report.html'}")


def _ground(model: BridgeSTGForVideoGrounding, sample: GroundingSample, out: Path) -> ReportEntry:
    """Ground a sample and write its annotated MP4, its strip and its JSON."""
    from ..data import probe
    from ..files import write_text
    from ..visualization import ReportEntry, annotate_video, draw_strip

    video = probe(sample.video)
    result = model.ground(video, sample.sentence)
    annotated = annotate_video(video, result, out / f"{sample.id}.mp4", sample=sample)
    draw_strip(video, result, out / f"{sample.id}.png", sample=sample)
    write_text(out / f"{sample.id}.json", result.to_json(indent=2))
    return ReportEntry(result, sample, annotated, video)


def _train_fresh(folder: Path, seconds: float) -> list[tuple[int, float]]:
    """Train the 'demo' configuration for some seconds with a live progress bar; returns its (step, loss) curve."""
    from ..training import TrainingProgress, load_config, train

    logging.getLogger("transformers").setLevel(logging.ERROR)
    run = folder / time.strftime("%Y%m%d-%H%M%S")  # a fresh model each time, never a resumed one
    with progress_bar() as bar:
        progress = TrainingProgress(bar)
        train(load_config("demo"), run, callbacks=[progress], max_seconds=seconds, tensorboard=False)
    return progress.curve
