"""The command line: results on stdout, progress, notes and errors on stderr."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .console import (
    Json,
    advance,
    begin_log,
    echo,
    echo_json,
    finite,
    given,
    note,
    path_argument,
    path_option,
    progress_bar,
    show_table,
    stderr,
)
from .data import app as data_app
from .ending import run
from .evaluate import evaluate
from .ground import ground

app = typer.Typer(
    name="bridge-stg",
    help="Say [bold]when[/] an event happens in a video and [bold]where[/] the object is, frame by frame.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(ground)
app.add_typer(data_app)
app.command()(evaluate)


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of every command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if debug else "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    begin_log(logging.DEBUG if debug else logging.WARNING)


@app.command()
def synth(
    folder: Annotated[Path, path_argument("FOLDER", help="Where clips/ and SPLIT.jsonl go.")],
    split: Annotated[str, typer.Option(help="train, val or test; test compositions never occur in train.")] = "test",
    count: Annotated[int, typer.Option(min=1, help="How many clips.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same clips.")] = 0,
    tier: Annotated[list[str] | None, typer.Option(help="A tier; repeat for several. All when left out.")] = None,
    background: Annotated[
        list[Path] | None,
        path_option("--background", help="A real video to draw over; repeat for several. Procedural when left out."),
    ] = None,
) -> None:
    """Write a split of SyntheticTubes: H.264 clips and a JSONL of samples."""
    from ..data import SPLITS, TIERS, write_split

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
    echo(path)


@app.command()
def train(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="A YAML file, or a shipped configuration such as 'tiny'.")],
    out: Annotated[
        Path | None,
        path_option("--out", "-o", help="Folder of checkpoints, logs and the final model; runs/CONFIG when left out."),
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override, such as schedule.steps=500.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.01, callback=finite, help="Stop cleanly after that long.")
    ] = None,
    plan: Annotated[
        int | None, typer.Option(min=1, help="Print the memory that each of so many GPUs would need, and stop.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train from a configuration, under torchrun in many processes; run again to resume exactly where it stopped."""
    from ..distributed import rank_and_size
    from ..training import TrainingProgress, load_config
    from ..training import train as run_training

    if plan is not None and (unused := given(context, "out", "max_minutes")):
        raise typer.BadParameter("it is for a run, and --plan starts none.", param_hint=unused[0])
    wanted = load_config(config, settings or ())
    if plan is not None:
        from ..training.memory_plan.plan import memory_plan

        found = memory_plan(wanted, plan)
        if as_json:
            echo_json(found.to_dict())
        else:
            echo(found.text(), lines=True)
        return
    rank, _ = rank_and_size()
    folder = Path("runs") / Path(config).stem if out is None else out
    with progress_bar() as bar:
        run_training(
            wanted,
            folder,
            callbacks=[TrainingProgress(bar)] if rank == 0 else [],
            max_seconds=None if max_minutes is None else 60 * max_minutes,
        )
    if rank == 0 and as_json:
        echo_json({"out": str(folder)})
    elif rank == 0:
        echo(folder)


@app.command()
def demo(
    out: Annotated[Path, path_option("--out", "-o", help="Folder for MP4s, strips and report.html.")] = Path(
        "demo-out"
    ),
    train_seconds: Annotated[
        float, typer.Option(min=0, callback=finite, help="How long the fresh model trains; 0 skips it.")
    ] = 60.0,
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
        Path | None,
        path_option("--out", "-o", help="Results go to OUT/<device>; benchmarks/results when left out."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA where there is one when left out.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="Begin no case after that long, and name what is left out."),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List cases and providers, run nothing.")] = False,
    benchmarks: Annotated[
        Path | None,
        path_option(
            "--benchmarks", help="The folder benchmarks/ of a checkout; the one beside the package when left out."
        ),
    ] = None,
) -> None:
    """Measure the ops against their peers: time in pairs, memory, floors. A wrong output gets no time."""
    from .bench import load_benchmarks

    command = load_benchmarks(benchmarks)
    try:
        text, code = command.run_benchmarks(
            ops or (),
            quick=quick,
            out=out,
            device=device,
            seconds=seconds,
            list_only=list_only,
            echo=note,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    echo(text, lines=True)
    raise typer.Exit(code)


@app.command()
def tune(
    op: Annotated[str, typer.Argument(help="prune_tokens or prune_tokens_varlen.")] = "prune_tokens",
    out: Annotated[Path, path_option("--out", "-o", help="The table; name it in BRIDGE_STG_TUNED.")] = Path(
        "tuned.json"
    ),
    shape: Annotated[
        list[str] | None,
        typer.Option(help="segments,tokens,width,queries; repeat for several. A usual set when left out."),
    ] = None,
) -> None:
    """Time the Triton configurations of OP on this GPU and keep the best of each shape."""
    from ..ops.core.tuning import tune_op

    tune_op(op, out, shape, report=note)
    echo(out)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, backends and why one is not usable, GPU, codecs."""
    from .doctor import diagnose, diagnosis_table

    facts = diagnose()
    if as_json:
        echo_json(facts)
    else:
        show_table(diagnosis_table(facts))


def main() -> None:
    """Entry point: user errors become one sentence on stderr and exit code 1, see `ending`."""
    arguments = sys.argv[1:]
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options
    if debug:  # accepted anywhere, defined once
        arguments = ["--debug", *(a for a in options if a != "--debug"), *arguments[len(options) :]]
    sys.exit(run(app, arguments, "bridge-stg", debug=debug))
