"""Grounding a long list of videos: shared by ranks, resumed after any interruption, merged without a loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..data.jsonl import read_records
from ..errors import BridgeSTGError, SampleError
from ..files import refuse_source
from ..json_text import dump_json
from ..models import GroundingResult
from .fingerprints import digest
from .outcome import Outcome, answer_together
from .resumable_jsonl import Progress, ResumableJsonl

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
        merged: whether all records are done and this rank has written the output.
    """

    records: int
    grounded: int
    failed: dict[str, str]
    merged: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for `json.dumps`."""
        return asdict(self) | {"failed": [{"id": name, "reason": reason} for name, reason in self.failed.items()]}


def read_manifest(path: str | os.PathLike[str]) -> list[ManifestRecord]:
    """Records of a JSON Lines file with `id`, `video` (relative to the file) and `sentence`; other keys are ignored.

    Raises:
        SampleError: the file is missing or empty, a line is not such a record, or an id occurs twice; names the line.
    """
    folder = Path(path).parent

    def build(value: Any) -> ManifestRecord:
        keys = ("id", "video", "sentence")
        if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in keys):
            raise SampleError("a record must be an object with the texts id, video and sentence.")
        video = value["video"] if "://" in value["video"] else str(folder / value["video"])
        return ManifestRecord(value["id"], video, value["sentence"])

    return read_records(path, "a manifest", build)


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
    """Ground this rank's share of a manifest; call again, with as many ranks or others, to go on.

    Each output line is `{"id", ...}` with the fields of `GroundingResult`, or `{"id", "video", "sentence", "error"}`
    where the record cannot be grounded: its video or sentence cannot be used, its result is not finite, or anything
    else happens to it, which is logged at DEBUG. A failure is an outcome too, and not tried again.

    What made the outcomes is kept beside them, in `out` with `.run` behind it: outcomes of another manifest or made
    with something else are never continued, and refused until they are removed.

    Args:
        ground: such as `model.ground_batch`.
        made_with: what a result depends on beside the manifest: model, options.
        batch_size: consecutive records given to `ground` at once; all their frames are in memory.
        rank, world_size: this rank takes the batches whose place modulo `world_size` is `rank`.
        progress: called with (records of this rank done, all of this rank).

    Raises:
        SampleError: the manifest cannot be used, or the output holds ids that it does not have.
        OutputError: the output cannot be written, is the manifest, or was made with something else.
    """
    records = {record.id: record for record in read_manifest(manifest)}
    refuse_source(manifest, out)
    folder = os.path.dirname(manifest) or "."  # a manifest asks for the same wherever it lies
    asked = digest(dump_json([r.id, os.path.relpath(r.video, folder), r.sentence]) for r in records.values())

    def answer(batch: Sequence[ManifestRecord]) -> list[dict[str, Any]]:
        results = ground([record.video for record in batch], [record.sentence for record in batch])
        return [_finite(result) for result in results]

    def ground_records(names: list[str]) -> Iterator[Outcome[dict[str, Any]]]:
        for outcome in answer_together([records[name] for name in names], answer):
            record = records[outcome.id]
            request = {"video": record.video, "sentence": record.sentence}
            yield outcome if outcome.reason is None else replace(outcome, request=request)

    with ResumableJsonl(
        out,
        list(records),
        made_with={"manifest": asked, **(made_with or {})},
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    ) as output:
        merged = output.work(ground_records, progress)
        reasons = {outcome.id: outcome.reason for outcome in output.outcomes()}
    failed = {name: reason for name, reason in reasons.items() if reason is not None}
    return ManifestSummary(len(records), len(reasons) - len(failed), failed, merged)


def _finite(result: GroundingResult) -> dict[str, Any]:
    try:
        return result.to_dict()
    except ValueError as error:
        raise BridgeSTGError(f"The result cannot be used: {error}; the model's weights may not be finite.") from error
