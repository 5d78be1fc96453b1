"""What the commands of the command line share: options, what they print and how, progress bars."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from typer.core import TyperOption

from ..errors import ConfigError, OutputError, printable
from ..json_text import dump_json, parse_json

if TYPE_CHECKING:
    from rich.progress import Progress

# It shows texts of others, so it takes nothing in them for markup or for the name of an emoji.
stderr = Console(stderr=True, markup=False, emoji=False, highlight=False)


def echo(text: object, *, lines: bool = False) -> None:
    """Print a line to stdout; see `printable`.

    Raises:
        OutputError: stdout cannot be written, as on a full disk.
    """
    _write(printable(str(text), lines=lines) + "\n")


def echo_json(value: Any) -> None:
    """Print JSON to stdout.

    Raises:
        OutputError: see `echo`; or a number in it is not finite.
    """
    try:
        text = dump_json(value)
    except ValueError as error:
        raise OutputError(f"The result cannot be printed as JSON: {error}.") from error
    echo(text)


def show_table(table: RenderableType) -> None:
    """Print a rich table to stdout; markup in its texts is not interpreted.

    Raises:
        OutputError: see `echo`.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    _write(captured.get())


def _write(text: str) -> None:
    try:
        typer.echo(text, nl=False)
    except BrokenPipeError:  # no failure: the reader has seen enough
        raise
    except OSError as error:
        raise OutputError(f"The standard output cannot be written: {error.strerror or error}.") from error


def note(text: str) -> None:
    """Print a line to stderr; see `printable`."""
    stderr.print(printable(text), soft_wrap=True)


def begin_log(level: int) -> None:
    """Log to stderr from `level` on, with nothing in it that a terminal would obey."""

    class Printable(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record), lines=True)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable(logging.BASIC_FORMAT))
    logging.basicConfig(level=level, handlers=[handler], force=True)


# Options ---------------------------------------------------------------------------------------------------------


def path_option(*names: str, help: str) -> Any:
    """An option that takes a path, and refuses an empty one."""
    return typer.Option(*names, parser=_read_path, metavar="PATH", help=help)


def path_argument(name: str, *, help: str) -> Any:
    """An argument that takes a path, and refuses an empty one."""
    return typer.Argument(parser=_read_path, metavar=name, help=help)


def _read_path(text: str | Path) -> Path:
    """Refuse an empty path: `Path` would take it for the current folder."""
    if text == "":
        raise typer.BadParameter("it must not be empty.")
    return Path(text)


def finite(value: float | None) -> float | None:
    """Callback of an option that refuses infinity and NaN, which pass its bounds."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def given(context: typer.Context, *names: str) -> list[str]:
    """Return those of the named options that the user gave, as they are written on the command line."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if isinstance(parameter, TyperOption)
        and parameter.name in names
        and getattr(context.get_parameter_source(parameter.name), "name", "DEFAULT") == "COMMANDLINE"
    ]


Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Model folder; the shipped tiny checkpoint when left out.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one, each process its own.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def read_settings(pairs: list[str] | None) -> dict[str, Any]:
    """Parse key=value pairs with JSON values; a value that is not JSON is a text.

    Raises:
        ConfigError: a key comes twice, or a value is JSON that cannot be read.
    """
    settings: dict[str, Any] = {}
    for pair in pairs or ():
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{pair!r} is not key=value.", param_hint="--set")
        if key in settings:
            raise ConfigError(f"--set gives {key!r} twice; give it once.")
        try:
            settings[key] = parse_json(value)
        except ValueError as error:
            if not isinstance(error.__cause__, json.JSONDecodeError):
                raise ConfigError(f"--set {key}: the value cannot be read, {error}.") from error
            settings[key] = value
    return settings


# Progress --------------------------------------------------------------------------------------------------------


def progress_bar() -> Progress:
    """A bar on stderr that disappears when it is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True)


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar; yields the function that moves it to (done, total)."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
