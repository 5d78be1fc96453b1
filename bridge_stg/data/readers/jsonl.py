"""The project's own JSON Lines, read to the end: a bad line is a problem, not the end of the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import SampleError
from ..jsonl import iterate_records
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
    root = Path(annotations).parent if videos is None else None
    folder = VideoFolder(videos)

    def build(record: Any) -> GroundingSample:
        video = record.get("video") if root is None and isinstance(record, Mapping) else None
        if isinstance(video, str) and video.strip():
            record = {**record, "video": folder.find(video)}
        return GroundingSample.from_record(record, root)

    for line, item in iterate_records(annotations, "an annotation file", build):
        yield Problem(f"line {line.number}", str(item)) if isinstance(item, SampleError) else item
