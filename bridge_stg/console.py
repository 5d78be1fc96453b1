"""What the commands of the command line share: options, the console of stderr, progress bars."""

from __future__ import annotations

import json
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

stderr = Console(stderr=True)

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Model folder; the shipped tiny checkpoint when left out.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one, each process its own.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def read_settings(pairs: list[str] | None) -> dict[str, Any]:
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


def progress_bar() -> Progress:
    """A bar on stderr that goes when it is done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True)


def advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    """Move a bar to `done` of `total`."""
    bar.update(task, completed=done, total=total)
