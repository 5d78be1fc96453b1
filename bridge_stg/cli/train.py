"""`bridge-stg train`: train from a configuration, or print the memory plan of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Json, echo, echo_json, finite, given, path_option, progress_bar


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
