"""The project's own JSON Lines, read to the end: a broken line is a problem, not the end of the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import SampleError
from ..sample import GroundingSample
from .reading import Item, Problem, VideoFolder


def read_jsonl(annotations: str | os.PathLike[str], videos: str | os.PathLike[str] | None = None) -> Iterator[Item]:
    """Samples of a file that `write_samples` wrote, one line at a time; `read_samples` is the strict form.

    Args:
        annotations: the JSONL file.
        videos: folder that relative video paths start from; None means the folder of the file.

    Yields:
        samples, and a problem for each line that is skipped.

    Raises:
        SampleError: the file cannot be read or holds no line.
    """
    path = Path(annotations)
    folder = None if videos is None else VideoFolder(videos)
    empty = True
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    empty = False
                    yield _item(path, number, line, folder)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SampleError(f"{path} cannot be read as an annotation file: {reason}.") from error
    if empty:
        raise SampleError(f"{path} holds no record; an annotation file needs at least one line.")


def _item(path: Path, number: int, line: str, folder: VideoFolder | None) -> Item:
    name = f"line {number}"
    try:
        record = json.loads(line)
        if folder is None:
            return GroundingSample.from_record(record, root=path.parent)
        if isinstance(record, Mapping) and isinstance(record.get("video"), str) and record["video"].strip():
            record = {**record, "video": folder.find(record["video"])}
        return GroundingSample.from_record(record)
    except json.JSONDecodeError as error:
        return Problem(name, f"not a complete JSON object: {error.msg} (column {error.colno}).")
    except SampleError as error:
        return Problem(name, str(error))
