"""Helpers of all readers: problems of records and files, checks of values, and the search for videos."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import SampleError
from ..jsonl import read_json, repeated_id
from ..sample import Box, GroundingSample
from ..values import MOST_FRAMES, is_number, is_path, is_unicode, is_whole, shown, shown_list

Convention = Literal["exact", "tubedetr", "stcat"]
CONVENTIONS: tuple[Convention, ...] = ("exact", "tubedetr", "stcat")
MOST_SKIPPED = 200_000  # more than a published dataset has records
VIDEO_SUFFIXES = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".flv", ".ogv", ".wmv"),
        *(".ts", ".m2ts", ".mpg", ".mpeg", ".vob", ".gif", ".jpg", ".jpeg", ".png"),
    )
)


@dataclass(frozen=True)
class Problem:
    """A bad record, or a note on a record that was read.

    Attributes:
        id: of the record: the sample's id, or its place in the file.
        reason: one sentence with the value and the rule.
        skipped: whether the record was left out; else it was read and this is a note.
    """

    id: str
    reason: str
    skipped: bool = True


Item = GroundingSample | Problem


@dataclass(frozen=True)
class Dataset:
    """A whole annotation file.

    Attributes:
        samples: what could be read, in the order of the file.
        skipped: the records left out, with the reason.
        notes: oddities of records that were read.
    """

    samples: tuple[GroundingSample, ...]
    skipped: tuple[Problem, ...]
    notes: tuple[Problem, ...]

    @classmethod
    def collect(cls, items: Iterable[Item]) -> Dataset:
        """All that a reader yields; ids that come twice are skipped the second time."""
        found = list(checked(items))
        problems = [item for item in found if isinstance(item, Problem)]
        return cls(
            samples=tuple(item for item in found if isinstance(item, GroundingSample)),
            skipped=tuple(problem for problem in problems if problem.skipped),
            notes=tuple(problem for problem in problems if not problem.skipped),
        )


def refuse_other_kind(samples: int, skipped: int, last: Problem) -> None:
    """Raises:
    SampleError: 200,000 records were left out, and not one in a hundred was read.
    """
    if skipped >= MOST_SKIPPED and skipped > 100 * samples:
        raise SampleError(
            f"{skipped} of the first {skipped + samples} records cannot be read, so that the file must be of another "
            f"kind; the last one, {shown(last.id)}: {last.reason}"
        )


def checked(items: Iterable[Item]) -> Iterator[Item]:
    """The items, where a sample whose id was already seen becomes a problem.

    Raises:
        SampleError: there are so many problems that the file must be of another kind, see `refuse_other_kind`.
    """
    ids: set[str] = set()
    skipped = 0
    for item in items:
        if isinstance(item, GroundingSample):
            if item.id in ids:
                item = Problem(item.id, repeated_id(item.id))
            else:
                ids.add(item.id)
        yield item
        if isinstance(item, Problem) and item.skipped:
            skipped += 1
            refuse_other_kind(len(ids), skipped, item)


def attempt(name: str, build: Callable[[], GroundingSample]) -> Item:
    """The sample that `build` makes, or why it cannot."""
    try:
        return build()
    except SampleError as error:
        return Problem(name, str(error))


def load_json(path: str | os.PathLike[str], kind: type, what: str) -> Any:
    """Parse a JSON file whose outermost value is a `kind` (list or dict).

    Raises:
        SampleError: `read_json` refuses it, or it holds another kind of value.
    """
    value = read_json(path, what)
    if not isinstance(value, kind):
        expected = "a JSON array" if kind is list else "a JSON object"
        raise SampleError(f"{path} cannot be read as {what}: it must hold {expected}, got {type(value).__name__}.")
    return value


def require(record: Any, keys: Collection[str], what: str) -> Mapping[str, Any]:
    """`record`, once it is an object with `keys`.

    Raises:
        SampleError: it is not.
    """
    if not isinstance(record, Mapping):
        raise SampleError(f"{what} must be a JSON object, got {type(record).__name__}.")
    missing = [key for key in keys if key not in record]
    if missing:
        raise SampleError(f"{what} has no key {', '.join(map(repr, missing))}; it needs {', '.join(keys)}.")
    return record


def unknown_keys(name: str, record: Any, known: Collection[str]) -> Iterator[Problem]:
    """A note where `record` has keys that the published format has not: they are not read."""
    unknown = sorted(str(key) for key in record if key not in known) if isinstance(record, Mapping) else []
    if unknown:
        reason = f"unknown key {shown_list(unknown)} is not read; the format has {', '.join(sorted(known))}."
        yield Problem(name, reason, skipped=False)


def whole(record: Mapping[str, Any], key: str, what: str, least: int = 0) -> int:
    """`record[key]`, once it is a whole number of at least `least`, and small enough to count frames.

    Raises:
        SampleError: it is not.
    """
    value = record.get(key)
    if not is_whole(value) or value < least:
        raise SampleError(f"{key} of {what} must be a whole number of at least {least}, got {shown(value)}.")
    if value >= MOST_FRAMES:
        raise SampleError(f"{key} of {what} must be below {MOST_FRAMES}, got {shown(value)}.")
    return value


def corners(name: str, box: Any) -> Box:
    """The box [x, y, w, h] as (x1, y1, x2, y2).

    Raises:
        SampleError: it is not such a box.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
        raise SampleError(f"{name} must be four numbers [x, y, w, h], got {shown(box)}.")
    x, y, width, height = box
    if width < 0 or height < 0:
        raise SampleError(f"{name} must have w >= 0 and h >= 0, got {shown(box)}.")
    return x, y, x + width, y + height


class VideoFolder:
    """Finds the videos of a dataset by relative path, else by file name anywhere below the folder."""

    def __init__(self, folder: str | os.PathLike[str] | None):
        """Args:
            folder: None keeps names as they are.

        Raises:
            SampleError: it is not a folder.
        """
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not os.path.isdir(self.folder):
            raise SampleError(f"{self.folder} is not a folder; the videos are looked for in it.")
        self._by_stem: dict[str, Path] | None = None

    def find(self, name: str) -> str:
        """Path of the video `name`; where there is none, the path at which it was expected.

        Raises:
            SampleError: no file can have this name.
        """
        if not name.strip() or not is_path(name) or not is_unicode(name):
            raise SampleError(f"a video must have a name that a file can have, got {shown(name)}.")
        if self.folder is None:
            return name
        expected = self.folder / name
        if os.path.isfile(expected):
            return str(expected)
        if self._by_stem is None:
            files = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
            self._by_stem = {path.stem: path for path in reversed(files)}
        return str(self._by_stem.get(Path(name).stem, expected))
