"""The command line: its commands, the options of all of them, and how it ends.

Results go to stdout; progress, notes and errors go to stderr. Exit codes: 0 done, 1 a failure of input, output or
settings, 2 a wrong command line, 128 + n ended by signal n.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any

import typer
from rich.text import Text

from ..errors import BridgeSTGError, printable
from .bench import bench, tune
from .console import begin_log, echo, stderr
from .data import app as data_app
from .data import synth
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .ground import ground
from .train import train

app = typer.Typer(
    name="bridge-stg",
    help="Say [bold]when[/] an event happens in a video and [bold]where[/] the object is, frame by frame.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (ground, evaluate, synth, train, demo, bench, tune, doctor):
    app.command()(command)
app.add_typer(data_app)

# Typer carries a click of its own since 0.20, and exports its exceptions only in part.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_INTERRUPTED = 128 + signal.SIGINT
_LOST_WORKER = "DataLoader worker (pid"  # how torch begins to say that a worker was killed or has exited


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


def main() -> None:
    """Run the command line of this process and exit; see `run`."""
    arguments = sys.argv[1:]
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in before
    if debug:  # accepted anywhere, defined once
        arguments = ["--debug", *(a for a in before if a != "--debug"), *arguments[len(before) :]]
    sys.exit(run(app, arguments, "bridge-stg", debug=debug))


def run(app: typer.Typer, arguments: Sequence[str], name: str, *, debug: bool) -> int:
    """Run a command line and return its exit code; a failure that a user can mend becomes one sentence on stderr.

    Args:
        debug: raise a failure instead, for its traceback.
    """
    _end_on(signal.SIGTERM)
    _end_on(signal.SIGHUP)
    code = 1
    try:
        code = app(args=list(arguments), prog_name=name, standalone_mode=False) or 0
        if code != _INTERRUPTED:
            return code
        failure = "interrupted."
    except (KeyboardInterrupt, typer.Abort):
        failure, code = "interrupted.", _INTERRUPTED
    except _UsageError as error:
        return _wrong_usage(error)
    except BrokenPipeError:  # the reader of stdout has seen enough
        failure = ""
    except (BridgeSTGError, OSError, MemoryError, RuntimeError) as error:
        if debug or (isinstance(error, RuntimeError) and not str(error).startswith(_LOST_WORKER)):
            raise
        failure = _sentence(error)
    if failure:
        with suppress(OSError):  # stderr may be on the same full disk
            stderr.print(Text.assemble(("error:", "red"), f" {printable(failure)}"), soft_wrap=True)
    _drop_unwritten_output()
    return code


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "the memory is not enough for it."
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror or error}."
    text = str(error)
    if text.startswith(_LOST_WORKER):
        return f"{text.strip().rstrip('.')}; where the memory was not enough for it, ask for fewer data.workers."
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:
        # A loader process sends its error with a traceback around it; the sentence is the last line.
        return text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return text


def _wrong_usage(error: Any) -> int:
    """Show a wrong command line as typer does, with nothing in it that a terminal would obey."""
    from typer import rich_utils

    text = printable(error.format_message())
    error.format_message = lambda: text
    rich_utils.rich_format_error(error)
    return error.exit_code


def _end_on(number: signal.Signals) -> None:
    """Let a signal unwind the stack, so that temporary files are removed; the next one ends the process at once."""

    def end(received: int, frame: FrameType | None) -> None:
        signal.signal(received, signal.SIG_DFL)
        sys.exit(128 + received)

    # `nohup` makes a process ignore a hangup, and only the main thread may set handlers.
    if signal.getsignal(number) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(number, end)


def _drop_unwritten_output() -> None:
    """Discard what stdout did not take: Python would write it again at exit, and complain again."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
