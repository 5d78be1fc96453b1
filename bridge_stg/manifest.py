"""Grounding a long list of videos: sharded over processes, resumed after any interruption, merged without a loss.

Every process appends each finished record to a part of its own beside the output. A record counts as done when its
line stands whole in any part, whoever wrote it; the process that finds all of them done merges the parts into the
output in the order of the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import SampleError, VideoError
from .files import atomic_path, ensure_writable_folder
from .models import GroundingResult

Ground = Callable[[str, str], GroundingResult]


@dataclass(frozen=True)
class ManifestRecord:
    """One request: which video, which sentence."""

    id: str
    video: str
    sentence: str


@dataclass(frozen=True)
class ManifestSummary:
    """How a manifest stands.

    Attributes:
        records: in the manifest.
        grounded: with a result.
        failed: id to reason, for those whose video or sentence could not be used.
        merged: whether all records are done and the output is written.
    """

    records: int
    grounded: int
    failed: dict[str, str]
    merged: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "grounded": self.grounded,
            "failed": [{"id": name, "reason": reason} for name, reason in self.failed.items()],
            "merged": self.merged,
        }


def read_manifest(path: str | os.PathLike[str]) -> list[ManifestRecord]:
    """Records of a JSON Lines file with `id`, `video` (relative to the file) and `sentence`; other keys are ignored.

    Raises:
        SampleError: the file is missing or empty, a line is no such record, or an id occurs twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SampleError(f"{path} cannot be read as a manifest: {error}.") from error
    records: dict[str, ManifestRecord] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise SampleError(f"{path}:{number} is not JSON: {error.msg}.") from error
        for key in ("id", "video", "sentence"):
            if not isinstance(found, Mapping) or not isinstance(found.get(key), str):
                raise SampleError(f"{path}:{number} must be an object with the texts id, video and sentence.")
        if found["id"] in records:
            raise SampleError(f"{path}:{number} repeats the id {found['id']!r}; ids must be unique.")
        records[found["id"]] = ManifestRecord(found["id"], str(path.parent / found["video"]), found["sentence"])
    if not records:
        raise SampleError(f"{path} holds no record; a manifest needs at least one.")
    return list(records.values())


def ground_manifest(
    ground: Ground,
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ManifestSummary:
    """Ground this process's share of a manifest; call again, with as many processes or others, to go on.

    Each output line is `{"id", ...}` with the fields of `GroundingResult`, or `{"id", "video", "sentence", "error"}`
    where the video or the sentence cannot be used. An error of the program itself is not caught.

    Args:
        ground: (video, sentence) -> result, such as `model.ground`.
        rank, world_size: this process takes the records whose place modulo `world_size` is `rank`.
        progress: called with (records of this process done, all of this process).

    Raises:
        SampleError: the manifest cannot be used, or the parts hold ids that it does not have.
        OutputError: the output cannot be written.
    """
    records = read_manifest(manifest)
    out = Path(out)
    parts = ensure_writable_folder(out.with_name(f"{out.name}.parts"))
    done = _finished(out, parts, records)
    mine = records[rank::world_size]
    with closing(_Part(parts / f"{rank}-of-{world_size}.jsonl")) as part:
        for count, record in enumerate(mine):
            if record.id not in done:
                part.append(_answer(ground, record))
            if progress is not None:
                progress(count + 1, len(mine))
    return _merge(out, parts, records)


def _answer(ground: Ground, record: ManifestRecord) -> dict[str, Any]:
    try:
        return {"id": record.id, **ground(record.video, record.sentence).to_dict()}
    except (VideoError, SampleError) as error:
        return {"id": record.id, "video": record.video, "sentence": record.sentence, "error": str(error)}


class _Part:
    """A file to append records to, made at the first of them; a line that an interruption cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO | None = None

    def append(self, record: dict[str, Any]) -> None:
        if self.file is None:
            self.file = open(self.path, "ab+")  # noqa: SIM115 - closed by close
            self.file.seek(0)
            self.file.truncate(self.file.read().rfind(b"\n") + 1)
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(id, line) of the whole lines of a part or an output; a part that another process has merged away is empty."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    for line in text[: text.rfind(b"\n") + 1].decode().splitlines():
        yield json.loads(line)["id"], line


def _finished(out: Path, parts: Path, records: list[ManifestRecord]) -> dict[str, str]:
    """Line of every record that is done. The first found of an id is kept."""
    done: dict[str, str] = {}
    for path in (out, *sorted(parts.glob("*.jsonl"))):
        for name, line in _lines(path):
            done.setdefault(name, line)
    if foreign := sorted(done.keys() - {record.id for record in records}):
        raise SampleError(
            f"{out} or its parts hold {foreign[0]!r}, which is not in the manifest: they belong to another one."
        )
    return done


def _merge(out: Path, parts: Path, records: list[ManifestRecord]) -> ManifestSummary:
    done = _finished(out, parts, records)
    errors = {name: json.loads(line).get("error") for name, line in done.items()}
    failed = {record.id: errors[record.id] for record in records if errors.get(record.id)}
    merged = len(done) == len(records)
    if merged:
        with atomic_path(out) as temporary:
            temporary.write_text("".join(done[record.id] + "\n" for record in records), encoding="utf-8")
        for path in parts.glob("*.jsonl"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # another process may be merging the same lines
            parts.rmdir()
    return ManifestSummary(len(records), len(done) - len(failed), failed, merged)
