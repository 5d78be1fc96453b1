"""Files appear whole or not at all: write under a temporary name, then rename."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); rename it to `path` when the block succeeds.

    The parent folder is created. On any error the temporary file is removed and `path` is untouched.

    Raises:
        OutputError: the folder cannot be created or written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    ensure_writable_folder(target.parent)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{target} cannot be written: {reason}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def refuse_source(source: str | os.PathLike[str], *outputs: str | os.PathLike[str]) -> None:
    """Refuse to write an output over the file it is made from, whatever names and links lead there.

    Raises:
        OutputError: an output is the source.
    """
    for output in outputs:
        try:
            same = os.path.samefile(source, output)
        except (OSError, ValueError):  # one of them is not there; whoever reads or writes it says so
            continue
        if same:
            raise OutputError(f"{output} is the file that is read, {source}, and would be replaced; choose another.")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def ensure_writable_folder(folder: str | os.PathLike[str]) -> Path:
    """Create `folder` if needed and check that files can be created in it, before any long work starts.

    Raises:
        OutputError: it is not a folder, cannot be created, or refuses new files.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(4)}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{folder} is not a writable folder: {reason}.") from error
    return folder
