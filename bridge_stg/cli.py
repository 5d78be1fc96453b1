"""The command line: results on stdout, progress, notes and errors on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .cli_data import app as data_app
from .cli_evaluate import evaluate
from .console import Device, Json, Model, advance, progress_bar, stderr
from .errors import BridgeSTGError

app = typer.Typer(
    name="bridge-stg",
    help="Say [bold]when[/] an event happens in a video and [bold]where[/] the object is, frame by frame.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app)
app.command()(evaluate)


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
    video: Annotated[Path | None, typer.Argument(help="A video file.")] = None,
    sentence: Annotated[
        str | None, typer.Argument(help='What to look for, such as "the red circle that moves left".')
    ] = None,
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for the annotated MP4, the strip and result.json; a JSONL file for --manifest."
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="Ground a JSONL of id, video and sentence instead; run again to resume, under torchrun to share it."
        ),
    ] = None,
    as_json: Json = False,
    spatial_fps: Annotated[
        float | None, typer.Option(min=0.01, help="Localise at most this many frames a second, interpolate the rest.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Records of --manifest grounded at once; all their frames are in memory.")
    ] = 1,
    device: Device = "auto",
    stream: Annotated[
        int | None, typer.Option(min=0, help="Which of VIDEO's video streams, from 0; the default one when left out.")
    ] = None,
) -> None:
    """Find [bold]when[/] and [bold]where[/] SENTENCE happens in VIDEO."""
    if manifest is not None:
        if stream is not None:
            raise typer.BadParameter("it is for one VIDEO.", param_hint="--stream")
        if video is not None or out is None:
            raise typer.BadParameter(
                "it takes no VIDEO and SENTENCE, and needs --out FILE.jsonl.", param_hint="--manifest"
            )
        _ground_manifest(manifest, out, model, device, spatial_fps, batch_size, as_json)
        return
    if video is None or sentence is None:
        raise typer.BadParameter("both are needed, unless there is a --manifest.", param_hint="VIDEO SENTENCE")
    from .data import probe
    from .files import ensure_writable_folder, refuse_source, write_text
    from .models import load_model
    from .processes import own_device
    from .visualization import annotate_video, draw_strip

    source = probe(video, stream)
    if out is not None:
        refuse_source(video, *(out / name for name in ("annotated.mp4", "strip.png", "result.json")))
        ensure_writable_folder(out)
    with stderr.status("loading the model"):
        network = load_model(model).to(own_device(device))
    with stderr.status("grounding"):
        result = network.ground(source, sentence, spatial_fps=spatial_fps)
    if result.interval_source == "presence" and network.config.interval_source == "text":
        stderr.print("The generated answer holds no readable interval; the presence curve gives it.")
    if out is not None:
        with progress_bar() as bar:
            task = bar.add_task("annotating", total=result.frame_count)
            annotate_video(source, result, out / "annotated.mp4", progress=partial(advance, bar, task))
        draw_strip(source, result, out / "strip.png")
        write_text(out / "result.json", result.to_json(indent=2))
        stderr.print(f"wrote annotated.mp4, strip.png and result.json to {out}")
    if as_json:
        typer.echo(result.to_json())
    else:
        typer.echo(
            f"{result.interval[0]:.2f} s to {result.interval[1]:.2f} s "
            f"({result.interval_source}, confidence {result.confidence:.2f}), {len(result.tube)} boxes"
        )


def _ground_manifest(
    manifest: Path,
    out: Path,
    model: str | None,
    device: str,
    spatial_fps: float | None,
    batch_size: int,
    as_json: bool,
) -> None:
    from .manifest import ground_manifest, read_manifest
    from .models import load_model
    from .processes import own_device, rank_and_size

    rank, world_size = rank_and_size()
    read_manifest(manifest)  # a mistake in it must not wait for the model
    network = load_model(model).to(own_device(device))
    with progress_bar() as bar:
        task = bar.add_task("grounding", total=None)
        summary = ground_manifest(
            partial(network.ground_batch, spatial_fps=spatial_fps),
            manifest,
            out,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for name, reason in summary.failed.items():
        stderr.print(f"{name}: {reason}", highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(summary.to_dict()))
    else:
        state = f"written to {out}" if summary.merged else "the other processes are not done yet"
        typer.echo(f"{summary.grounded} of {summary.records} grounded, {len(summary.failed)} failed; {state}")


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
    with progress_bar() as bar:
        task = bar.add_task("writing clips", total=count)
        path = write_split(
            folder,
            split,
            count,
            seed,
            tiers=tuple(tier or TIERS),
            backgrounds=tuple(background or ()),
            progress=partial(advance, bar, task),
        )
    typer.echo(path)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or a shipped configuration such as 'tiny'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of checkpoints, logs and the final model.")] = Path(
        "runs/tiny"
    ),
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override, such as schedule.steps=500.")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0.01, help="Stop cleanly after that long.")] = None,
    plan: Annotated[
        int | None, typer.Option(min=1, help="Print the memory that each of so many GPUs would need, and stop.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train from a configuration, under torchrun in many processes; run again to resume exactly where it stopped."""
    from .processes import rank_and_size
    from .training import TrainingProgress, load_config
    from .training import train as run_training

    wanted = load_config(config, settings or ())
    if plan is not None:
        from .training.memory import memory_plan

        found = memory_plan(wanted, plan)
        typer.echo(json.dumps(found.to_dict()) if as_json else found.text())
        return
    rank, _ = rank_and_size()
    with progress_bar() as bar:
        run_training(
            wanted,
            out,
            callbacks=[TrainingProgress(bar)] if rank == 0 else [],
            max_seconds=None if max_minutes is None else 60 * max_minutes,
        )
    if rank == 0:
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
def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP ...]", help="Ops to measure; all when left out.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes, few rounds, nothing that compiles long.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Results go to OUT/<device>; benchmarks/results when left out.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA where there is one when left out.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Begin no case after that long, and name what is left out.")
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List cases and providers, run nothing.")] = False,
    benchmarks: Annotated[
        Path | None,
        typer.Option(help="The folder benchmarks/ of a checkout; the one beside the package when left out."),
    ] = None,
) -> None:
    """Measure the ops against their peers: time in pairs, memory, floors. A wrong output gets no time."""
    from .benchmarking import load_benchmarks

    command = load_benchmarks(benchmarks)
    try:
        text, code = command.run_benchmarks(
            ops or (),
            quick=quick,
            out=out,
            device=device,
            seconds=seconds,
            list_only=list_only,
            echo=partial(stderr.print, highlight=False, markup=False, soft_wrap=True),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(text)
    raise typer.Exit(code)


@app.command()
def tune(
    op: Annotated[str, typer.Argument(help="prune_tokens or prune_tokens_varlen.")] = "prune_tokens",
    out: Annotated[Path, typer.Option("--out", "-o", help="The table; name it in BRIDGE_STG_TUNED.")] = Path(
        "tuned.json"
    ),
    shape: Annotated[
        list[str] | None,
        typer.Option(help="segments,tokens,width,queries; repeat for several. A usual set when left out."),
    ] = None,
) -> None:
    """Time the Triton configurations of OP on this GPU and keep the best of each shape."""
    from .ops.tuning import tune_op

    tune_op(op, out, shape, report=stderr.print)
    typer.echo(out)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, backends and why one is not usable, GPU, codecs."""
    from .diagnosis import diagnose, diagnosis_table

    facts = diagnose()
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        Console().print(diagnosis_table(facts))


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
        stderr.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
