"""Samples of a JSON Lines file that are read one at a time, as a training set's boxes are too many to hold."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..errors import SampleError
from .jsonl import iterate_records, parse_line, unreadable
from .readers.reading import Problem, refuse_other_kind
from .sample import GroundingSample
from .time_base import has_time_base
from .video import MOST_ELONGATED

_KIND = "an annotation file"


class SampleStore(Sequence[GroundingSample]):
    """The usable records of a file, by number; it holds 44 bytes a record, however long the record is.

    Every line is checked when the store is opened, so that a bad record is known in the first minute and not in the
    third hour. The store may be handed to forked or spawned processes: each opens the file for itself. A line that has
    changed since is refused when it is read.

    Args:
        path: JSON Lines as `write_samples` and `bridge-stg data convert` write them; video paths start at its folder.

    Attributes:
        problems: lines that are left out, with the reason.
        widths, heights: int32 `[n]`, pixels.
        frames: int32 `[n]`, frames of the clip: of the segment where there is one, 1 for the task referring.
        rates: float64 `[n]`, frames a second.

    Raises:
        SampleError: the file cannot be read, or holds no usable record.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.problems: list[Problem] = []
        self._open: tuple[int, int] | None = None  # (process, descriptor)
        if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
            raise SampleError(f"{path} is a pipe or a device; samples are read by place, from a regular file.")
        rows: list[tuple[float, ...]] = []
        sums: list[int] = []
        for line, sample in iterate_records(path, _KIND, self._usable, may_be_empty=True):
            if isinstance(sample, SampleError):
                self.problems.append(Problem(f"line {line.number}", str(sample)))
                refuse_other_kind(len(rows), len(self.problems), self.problems[-1])
                continue
            rows.append((line.offset, len(line.data), sample.width, sample.height, _frames(sample), sample.fps))
            sums.append(zlib.crc32(line.data))
        if not rows:
            reason = f": {self.problems[0].id}: {self.problems[0].reason}" if self.problems else "."
            raise SampleError(f"{path} holds no usable record{reason}")
        table = np.array(rows)
        self._offsets, self._lengths = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
        self.widths, self.heights, self.frames = (table[:, i].astype(np.int32) for i in (2, 3, 4))
        self.rates = table[:, 5].copy()
        self._sums = np.array(sums, dtype=np.uint32)

    def _usable(self, record: Any) -> GroundingSample:
        sample = GroundingSample.from_record(record, root=self.path.parent)
        if not has_time_base(sample):
            raise SampleError(
                "its size and rate are not known; `bridge-stg data convert --align` takes them from the video."
            )
        if max(sample.width, sample.height) > MOST_ELONGATED * min(sample.width, sample.height):
            raise SampleError(
                f"one side may be at most {MOST_ELONGATED} times the other, got {sample.width} x {sample.height}."
            )
        return sample

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> GroundingSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[GroundingSample]: ...
    def __getitem__(self, index: int | slice) -> GroundingSample | list[GroundingSample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        try:
            line = os.pread(self._descriptor(), int(self._lengths[index]), int(self._offsets[index]))
        except OSError as error:
            raise unreadable(self.path, _KIND, error) from error
        if zlib.crc32(line) != self._sums[index]:
            raise SampleError(f"{self.path} has changed since it was opened; its record {index} is another.")
        return GroundingSample.from_record(parse_line(line), root=self.path.parent)

    def _descriptor(self) -> int:
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), os.open(self.path, os.O_RDONLY))
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def __del__(self) -> None:
        opened = getattr(self, "_open", None)
        if opened is not None and opened[0] == os.getpid():
            os.close(opened[1])


def _frames(sample: GroundingSample) -> int:
    """Frames of the clip that the sample is about."""
    if sample.task == "referring":
        return 1
    start, end = sample.segment or (0, sample.frame_count)
    return end - start
