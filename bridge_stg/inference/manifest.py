"""Grounding a long list of videos: sharded over processes, resumed after any interruption, merged without a loss."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BridgeSTGError, SampleError, reason_of
from ..files import refuse_source
from ..json_text import dump_json, parse_json
from ..models import GroundingResult
from .resumable_jsonl import Parts, Progress

GroundBatch = Callable[[Sequence[str], Sequence[str]], Sequence[GroundingResult]]
"""(videos, sentences) -> results."""


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
        failed: id to reason, for those that could not be grounded.
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
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # others break lines at signs that a sentence may hold
    except (OSError, UnicodeDecodeError) as error:
        raise SampleError(f"{path} cannot be read as a manifest: {error}.") from error
    records: dict[str, ManifestRecord] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = parse_json(line)
        except ValueError as error:
            raise SampleError(f"{path}:{number} is not JSON that can be read: {error}.") from error
        for key in ("id", "video", "sentence"):
            if not isinstance(found, Mapping) or not isinstance(found.get(key), str):
                raise SampleError(f"{path}:{number} must be an object with the texts id, video and sentence.")
        if found["id"] in records:
            raise SampleError(f"{path}:{number} repeats the id {found['id']!r}; ids must be unique.")
        video = found["video"] if "://" in found["video"] else str(path.parent / found["video"])
        records[found["id"]] = ManifestRecord(found["id"], video, found["sentence"])
    if not records:
        raise SampleError(f"{path} holds no record; a manifest needs at least one.")
    return list(records.values())


def ground_manifest(
    ground: GroundBatch,
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    made_with: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> ManifestSummary:
    """Ground this process's share of a manifest; call again, with as many processes or others, to go on.

    Each output line is `{"id", ...}` with the fields of `GroundingResult`, or `{"id", "video", "sentence", "error"}`
    where the record cannot be grounded: its video or sentence cannot be used, its result is not finite, or anything
    else happens to it, which is logged at DEBUG. A failure is a result, and not tried again.

    What made the results is kept beside them, in `out` with `.run` behind it: results of another manifest or made with
    something else are never continued, and refused until they are removed.

    Args:
        ground: such as `model.ground_batch`.
        made_with: what a result depends on beside the manifest: model, options.
        batch_size: consecutive records given to `ground` at once; all their frames are in memory.
        rank, world_size: this process takes the batches whose place modulo `world_size` is `rank`.
        progress: called with (records of this process done, all of this process).

    Raises:
        SampleError: the manifest cannot be used, or the parts hold ids that it does not have.
        OutputError: the output cannot be written, is the manifest, or was made with something else.
    """
    records = {record.id: record for record in read_manifest(manifest)}
    refuse_source(manifest, out)
    facts = {"manifest": _fingerprint(manifest, records.values()), **(made_with or {})}
    with Parts(out, list(records), rank=rank, world_size=world_size, batch_size=batch_size, made_with=facts) as parts:
        merged = parts.work(lambda names: _answers(ground, [records[name] for name in names]), progress)
        done, failed = 0, {}
        for record in parts.results():
            done += 1
            if "error" in record:
                failed[record["id"]] = record["error"]
    return ManifestSummary(len(records), done - len(failed), failed, merged)


def _fingerprint(manifest: str | os.PathLike[str], records: Iterable[ManifestRecord]) -> str:
    """Sixteen hex digits of what a manifest asks for, wherever it lies."""
    digest, folder = hashlib.sha256(), os.path.dirname(manifest)
    for record in records:
        digest.update(dump_json([record.id, os.path.relpath(record.video, folder or "."), record.sentence]).encode())
    return digest.hexdigest()[:16]


def _answers(ground: GroundBatch, records: Sequence[ManifestRecord]) -> list[dict[str, Any]]:
    """One for each record; a batch with a record that cannot be grounded is halved until that one is alone."""
    try:
        results = ground([record.video for record in records], [record.sentence for record in records])
        return [_line(*each) for each in zip(records, results, strict=True)]
    except Exception as error:  # of whatever kind: it is this batch's, and must not end the others
        reason = reason_of(error, records[0].id)
    if len(records) == 1:
        (record,) = records
        return [{"id": record.id, "video": record.video, "sentence": record.sentence, "error": reason}]
    middle = len(records) // 2  # out of the handler, so that nothing of the failed batch is kept alive
    return [*_answers(ground, records[:middle]), *_answers(ground, records[middle:])]


def _line(record: ManifestRecord, result: GroundingResult) -> dict[str, Any]:
    try:
        return {"id": record.id, **result.to_dict()}
    except ValueError as error:
        raise BridgeSTGError(f"The result cannot be used: {error}; the model's weights may not be finite.") from error
