"""Grounding a long list of videos: sharded over processes, resumed after any interruption, merged without a loss."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SampleError, VideoError
from .models import GroundingResult
from .parts import Parts, Progress

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
    progress: Progress | None = None,
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
    records = {record.id: record for record in read_manifest(manifest)}
    with Parts(out, list(records), rank=rank, world_size=world_size) as parts:
        done = parts.done()
        for count, name in enumerate(parts.mine):
            if name not in done:
                parts.append(_answer(ground, records[name]))
            if progress is not None:
                progress(count + 1, len(parts.mine))
        merged = parts.merge()
        found = merged or {name: json.loads(line) for name, line in parts.done().items()}
    failed = {name: found[name]["error"] for name in records if "error" in found.get(name, {})}
    return ManifestSummary(len(records), len(found) - len(failed), failed, merged is not None)


def _answer(ground: Ground, record: ManifestRecord) -> dict[str, Any]:
    try:
        return {"id": record.id, **ground(record.video, record.sentence).to_dict()}
    except (VideoError, SampleError) as error:
        return {"id": record.id, "video": record.video, "sentence": record.sentence, "error": str(error)}
