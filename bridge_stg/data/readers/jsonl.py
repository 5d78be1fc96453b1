"""The project's own JSON Lines, read to the end: a broken line is a problem, not the end of the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import SampleError
from ..jsonl import numbered_lines, parse_line
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
    for number, line in numbered_lines(path, "an annotation file"):
        empty = False
        yield _item(path, number, line, folder)
    if empty:
        raise SampleError(f"{path} holds no record; an annotation file needs at least one line.")


def _item(path: Path, number: int, line: bytes, folder: VideoFolder | None) -> Item:
    name = f"line {number}"
    try:
        record = parse_line(line)
        if folder is None:
            return GroundingSample.from_record(record, root=path.parent)
        if isinstance(record, Mapping) and isinstance(record.get("video"), str) and record["video"].strip():
            record = {**record, "video": folder.find(record["video"])}
        return GroundingSample.from_record(record)
    except SampleError as error:
        return Problem(name, str(error))
