"""Checkpoints that appear whole or not at all, at whatever moment the run is killed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import OutputError

STAGING = ".incomplete"
"""Folder inside the run's folder where a checkpoint is written; it moves to its name once it is whole."""

_NAME = re.compile(r"checkpoint-(\d+)")


@contextmanager
def saving(what: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of torch, safetensors and the system about a file that cannot be written into one sentence.

    Raises:
        OutputError: `what` cannot be saved, as on a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(sign in str(error) for sign in _TORCH_CANNOT_WRITE):
            raise
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(f"{what} cannot be saved: {reason.rstrip('.')}.") from error


_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos")  # torch has no type for errors of writing


def latest_checkpoint(run: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the highest step in a run's folder, or None."""
    found = [(int(match[1]), entry) for entry in Path(run).iterdir() if (match := _NAME.fullmatch(entry.name))]
    return max(found)[1] if found else None


def clear_staging(run: str | os.PathLike[str]) -> None:
    """Remove the half-written checkpoint that a killed run left."""
    shutil.rmtree(Path(run) / STAGING, ignore_errors=True)


def publish(run: str | os.PathLike[str], keep: int | None) -> None:
    """Move the staged checkpoint to its place, flushed to disk, and remove all but the newest `keep`."""
    run = Path(run)
    for staged in (run / STAGING).iterdir():
        _flush(staged)
        target = run / staged.name
        if target.exists():  # of the same step; rename does not replace a folder with content
            shutil.rmtree(target)
        os.rename(staged, target)
    _flush_folder(run)
    clear_staging(run)
    if keep is not None and keep > 0:
        numbered = sorted((int(match[1]), p) for p in run.iterdir() if (match := _NAME.fullmatch(p.name)))
        for _, old in numbered[:-keep]:
            shutil.rmtree(old)


def publish_files(staged: Path, target: Path) -> None:
    """Move the files of a finished folder into `target`, weights last, as they make it a model folder."""
    _flush(staged)
    files = sorted(staged.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name))
    for file in files:
        os.replace(file, target / file.name)
    staged.rmdir()
    _flush_folder(target)


def _flush(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_folder(Path(parent))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
