"""How the command line ends: exit codes, one sentence for a failure, and nothing left behind by a signal.

0 done, 1 a failure of input, output or settings, 2 a wrong command line, 128 + n ended by signal n.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import typer
from rich.text import Text

from ..errors import BridgeSTGError
from .console import printable, stderr

# Typer carries a click of its own since 0.20, and exports its exceptions only in part.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_INTERRUPTED = 128 + signal.SIGINT


def run(app: typer.Typer, arguments: Sequence[str], name: str, *, debug: bool) -> int:
    """Run a command line; its exit code.

    Args:
        debug: leave a failure as it is, for its traceback.
    """
    _end_on(signal.SIGTERM)
    _end_on(signal.SIGHUP)
    try:
        code = app(args=list(arguments), prog_name=name, standalone_mode=False) or 0
        if code != _INTERRUPTED:
            return code
        failure, code = "interrupted.", _INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        failure, code = "interrupted.", _INTERRUPTED
    except _UsageError as error:
        return _wrong_usage(error)
    except BrokenPipeError:  # whoever reads stdout has seen enough
        failure, code = "", 1
    except BridgeSTGError as error:
        if debug:
            raise
        failure, code = _sentence(error), 1
    except OSError as error:
        if debug:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        failure, code = f"{place}{error.strerror or error}.", 1
    except MemoryError:
        if debug:
            raise
        failure, code = "the memory is not enough for it.", 1
    if failure:
        with suppress(OSError):  # stderr may be on the same full disk
            stderr.print(Text.assemble(("error:", "red"), f" {printable(failure)}"), soft_wrap=True)
    _forget_unwritten_output()
    return code


def _sentence(error: BridgeSTGError) -> str:
    """A loader process sends its error with a traceback around it; the sentence is the last line."""
    text = str(error)
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:
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
    """Have a signal unwind the stack, so that temporary files go; the next one ends the process at once."""

    def end(received: int, frame: FrameType | None) -> None:
        signal.signal(received, signal.SIG_DFL)
        sys.exit(128 + received)

    # `nohup` has a hangup ignored, and only the main thread may set handlers.
    if signal.getsignal(number) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(number, end)


def _forget_unwritten_output() -> None:
    """What stdout did not take it would be given again at exit, which would complain again."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
