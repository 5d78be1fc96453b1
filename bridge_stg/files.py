"""Files appear whole or not at all: write under a temporary name, then rename. Only regular files are replaced."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

_LONGEST_NAME = 255  # bytes, of the usual file systems
_LONGEST_SUFFIX = 16


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); rename it to `path` when the block succeeds.

    The parent folder is created. On any error, and when the process is told to end, the temporary file is removed and
    `path` is untouched. A link is followed.

    Raises:
        OutputError: the folder cannot be created or written, or `path` is there and no regular file.
    """
    target = replaceable(path)
    suffix = target.suffix if len(os.fsencode(target.suffix)) <= _LONGEST_SUFFIX else ""
    temporary = target.with_name(f".{secrets.token_hex(6)}{suffix}")
    ensure_writable_folder(target.parent)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder in `folder`; move the files in it to `folder` when the block succeeds, else none.

    Raises:
        OutputError: the folder cannot be created or written, or what a file would replace is not a regular file.
    """
    folder = ensure_writable_folder(folder)
    staged = folder / f".{secrets.token_hex(6)}"
    try:
        staged.mkdir()
        yield staged
        targets = {file: replaceable(folder / file.name) for file in sorted(staged.iterdir())}
        for file, target in targets.items():
            if target.parent == folder.resolve():
                os.replace(file, target)
            else:  # a link, perhaps to another file system
                with atomic_path(target) as temporary:
                    shutil.copyfile(file, temporary)
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def replaceable(path: str | os.PathLike[str]) -> Path:
    """The file that writing to `path` replaces or makes: `path` itself, or what it links to.

    Raises:
        OutputError: there is something else than a regular file, such as a folder or a device.
    """
    try:
        target = Path(path).resolve()  # which fails in a folder that was removed
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            return target
    except (OSError, RuntimeError) as error:  # links that lead in a circle are a RuntimeError before Python 3.13
        raise unwritable(path, error) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
        raise OutputError(f"{path} cannot be written: it is {kind}, and only a regular file is replaced.")
    return target


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


def beside(path: Path, suffix: str) -> Path:
    """`path` with `suffix` behind its name; a name that is too long for that is cut and marked with its digest."""
    name = os.fsencode(path.name)
    if len(name) + len(suffix) > _LONGEST_NAME:
        mark = hashlib.sha256(name).hexdigest()[:8]
        kept = name[: _LONGEST_NAME - len(suffix) - len(mark) - 1].decode(errors="ignore")
        return path.with_name(f"{kept}~{mark}{suffix}")
    return path.with_name(f"{path.name}{suffix}")


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


def unwritable(path: str | os.PathLike[str], error: Exception) -> OutputError:
    """The sentence about an output that the system refuses."""
    return OutputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.")
