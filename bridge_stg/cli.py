"""The command line: ground, evaluate, synth, train, demo, doctor. Results on stdout, progress and logs on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from .errors import BridgeSTGError

app = typer.Typer(
    name="bridge-stg",
    help="Say [bold]when[/] an event happens in a video and [bold]where[/] the object is, frame by frame.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
stderr = Console(stderr=True)

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Model folder; the shipped tiny checkpoint when left out.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def _version(value: bool) -> None:
    if value:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of every command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if debug else "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, stream=sys.stderr, force=True)


@app.command()
def ground(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    sentence: Annotated[str, typer.Argument(help='What to look for, such as "the red circle that moves left".')],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the annotated MP4, the strip and result.json.")
    ] = None,
    as_json: Json = False,
    spatial_fps: Annotated[
        float | None, typer.Option(min=0.01, help="Localise at most this many frames a second, interpolate the rest.")
    ] = None,
) -> None:
    """Find [bold]when[/] and [bold]where[/] SENTENCE happens in VIDEO."""
    from .data import probe
    from .files import ensure_writable_folder, write_text
    from .models import load_model
    from .visualization import annotate_video, draw_strip

    probe(video)
    if out is not None:
        ensure_writable_folder(out)
    with stderr.status("loading the model"):
        network = load_model(model)
    with stderr.status("grounding"):
        result = network.ground(video, sentence, spatial_fps=spatial_fps)
    if result.interval_source == "presence" and network.config.interval_source == "text":
        stderr.print("The generated answer holds no readable interval; the presence curve gives it.")
    if out is not None:
        with _progress() as bar:
            task = bar.add_task("annotating", total=result.frame_count)
            annotate_video(video, result, out / "annotated.mp4", progress=partial(_advance, bar, task))
        draw_strip(video, result, out / "strip.png")
        write_text(out / "result.json", result.to_json(indent=2))
        stderr.print(f"wrote annotated.mp4, strip.png and result.json to {out}")
    if as_json:
        typer.echo(result.to_json())
    else:
        typer.echo(
            f"{result.interval[0]:.2f} s to {result.interval[1]:.2f} s "
            f"({result.interval_source}, confidence {result.confidence:.2f}), {len(result.tube)} boxes"
        )


@app.command()
def synth(
    folder: Annotated[Path, typer.Argument(help="Where clips/ and SPLIT.jsonl go.")],
    split: Annotated[str, typer.Option(help="train, val or test; test compositions never occur in train.")] = "test",
    count: Annotated[int, typer.Option(min=1, help="How many clips.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same clips.")] = 0,
    tier: Annotated[list[str] | None, typer.Option(help="A tier; repeat for several. All when left out.")] = None,
    background: Annotated[
        list[Path] | None, typer.Option(help="A real video to draw over; repeat for several. Procedural when left out.")
    ] = None,
) -> None:
    """Write a split of SyntheticTubes: H.264 clips and a JSONL of samples."""
    from .data import SPLITS, TIERS, write_split

    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is none of {', '.join(SPLITS)}.", param_hint="--split")
    for name in tier or ():
        if name not in TIERS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(TIERS)}.", param_hint="--tier")
    with _progress() as bar:
        task = bar.add_task("writing clips", total=count)
        path = write_split(
            folder,
            split,
            count,
            seed,
            tiers=tuple(tier or TIERS),
            backgrounds=tuple(background or ()),
            progress=partial(_advance, bar, task),
        )
    typer.echo(path)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option("--data", "-d", help="Folder with SPLIT.jsonl, or a JSONL file.")],
    model: Model = None,
    split: Annotated[str, typer.Option(help="Which SPLIT.jsonl of the folder.")] = "test",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Switch of the model at inference, key=value, such as keep=1.0 or gate=false."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    predictions: Annotated[Path | None, typer.Option(help="Write the predictions here, one JSON a line.")] = None,
    floors: Annotated[bool, typer.Option(help="Add the trivial floors: best constant answer, random answer.")] = False,
    as_json: Json = False,
) -> None:
    """Score a model: m_tIoU, m_vIoU, vIoU@0.3, vIoU@0.5 and gt_vIoU per sentence type and tier."""
    from .evaluation import ConstantFloor, random_floor, write_predictions
    from .evaluation import evaluate as score
    from .inference import find_samples, predict_samples
    from .models import load_model

    samples = find_samples(data, split)[:limit]
    network = load_model(model, _settings(settings))
    with _progress() as bar:
        task = bar.add_task("grounding", total=len(samples))
        found = predict_samples(network, samples, batch_size=batch_size, progress=partial(_advance, bar, task))
    if predictions is not None:
        write_predictions(predictions, found)
    report = dict(score(samples, found).summary)
    if floors:
        constant = ConstantFloor.fit(samples).predict(samples)
        report["floors"] = {
            "best constant": score(samples, constant).summary,
            "random": score(samples, random_floor(samples)).summary,
        }
    if as_json:
        typer.echo(json.dumps(report))
    else:
        from .tables import metrics_table

        Console().print(metrics_table(report))


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or a shipped configuration such as 'tiny'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of checkpoints, logs and the final model.")] = Path(
        "runs/tiny"
    ),
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override, such as schedule.steps=500.")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0.01, help="Stop cleanly after that long.")] = None,
) -> None:
    """Train from a configuration; run again to resume exactly where it stopped."""
    from .training import TrainingProgress, load_config
    from .training import train as run_training

    with _progress() as bar:
        run_training(
            load_config(config, settings or ()),
            out,
            callbacks=[TrainingProgress(bar)],
            max_seconds=None if max_minutes is None else 60 * max_minutes,
        )
    typer.echo(out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for MP4s, strips and report.html.")] = Path(
        "demo-out"
    ),
    train_seconds: Annotated[float, typer.Option(min=0, help="How long the fresh model trains; 0 skips it.")] = 60.0,
) -> None:
    """Ground three bundled clips, write a report, and train a fresh tiny model for about a minute."""
    from .demo import run_demo

    run_demo(out, train_seconds=train_seconds, console=stderr)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, backends and why one is not usable, GPU, codecs."""
    from .diagnosis import diagnose, diagnosis_table

    facts = diagnose()
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        Console().print(diagnosis_table(facts))


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    """key=value pairs with JSON values; a value that is not JSON is text."""
    settings: dict[str, Any] = {}
    for pair in pairs or ():
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{pair!r} is not key=value.", param_hint="--set")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True)


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def main() -> None:
    """Entry point: user errors become one sentence on stderr and exit code 1."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:  # accepted anywhere, defined once
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    try:
        app(args=arguments, prog_name="bridge-stg")
    except BridgeSTGError as error:
        if debug:
            raise
        stderr.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
