"""VidSTG: `*_annotations.json` for the sentences and times, VidOR for the boxes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import SampleError
from ..sample import Box, GroundingSample, SentenceType
from ..values import is_key, is_number, shown
from .reading import Convention, Item, Problem, VideoFolder, load_json, require, unknown_keys, whole
from .vidor import VidORBoxes, VidORVideo

_NEEDED = ("vid", "fps", "frame_count", "width", "height", "used_segment", "temporal_gt", "captions", "questions")
_KNOWN = frozenset((*_NEEDED, "subject/objects", "used_relation"))
_SENTENCES: tuple[tuple[str, str, SentenceType], ...] = (
    ("captions", "caption", "declarative"),
    ("questions", "question", "interrogative"),
)


def read_vidstg(
    annotations: str | os.PathLike[str],
    boxes: str | os.PathLike[str] | None = None,
    videos: str | os.PathLike[str] | None = None,
    convention: Convention = "exact",
) -> Iterator[Item]:
    """One sample a sentence, in the order of the file, captions before questions.

    `used_segment.end_fid` is the last frame of the clip, `temporal_gt.end_fid` the first after the event. Frames are
    0-based frames of the VidOR video. A sample's id is `<vid>-<record>-caption-<i>` or `...-question-<i>`.

    Args:
        annotations: the published JSON file.
        boxes: folder of VidOR annotations; None leaves the boxes out.
        videos: folder of the videos; None names them as VidOR does.
        convention: "exact" is what the annotations say. The others number frames as a public code base does, for
            comparison with its published results: "tubedetr" ends the clip one frame early; "stcat" ends an event
            that runs to the end of the clip one frame early, counts a box at the event's end as part of the tube and
            drops the records that STCAT drops.

    Yields:
        samples, and a problem for each record or sentence that is skipped or odd.

    Raises:
        SampleError: the file is not such a file at all.
    """
    records = load_json(annotations, list, "VidSTG annotations")
    source = None if boxes is None else VidORBoxes(boxes)
    folder = VideoFolder(videos)
    for number, record in enumerate(records):
        name = f"record {number}"
        if isinstance(record, Mapping) and isinstance(record.get("vid"), str):
            name = f"{record['vid']}-{number}"
        yield from unknown_keys(name, record, _KNOWN)
        try:
            yield from _read_record(name, record, source, folder, convention)
        except SampleError as error:
            yield Problem(name, str(error))


def _read_record(
    name: str, record: Any, source: VidORBoxes | None, folder: VideoFolder, convention: Convention
) -> Iterator[Item]:
    record = require(record, _NEEDED, "a VidSTG record")
    vid = record["vid"]
    if not isinstance(vid, str) or not vid.strip():
        raise SampleError(f"vid of a VidSTG record must be a non-empty text, got {shown(vid)}.")
    count = whole(record, "frame_count", "a VidSTG record", 1)
    first, last = _frames(record, "used_segment")
    start, end = _frames(record, "temporal_gt")
    if not first <= last < count:
        raise SampleError(f"used_segment must lie in frames 0..{count - 1} of {vid}, got {first}..{last}.")
    if not start < end <= count:
        raise SampleError(f"temporal_gt must have begin < end <= {count} frames of {vid}, got {start}..{end}.")
    if start > last or end <= first:
        raise SampleError(f"temporal_gt {start}..{end} of {vid} lies outside its used_segment {first}..{last}.")
    segment, event, tube_end = (first, last + 1), (start, end), end
    if convention == "tubedetr":
        segment = (first, max(last, first + 1))
    elif convention == "stcat":
        if min(end + 1, count) != min(end, last) + 1:
            raise SampleError(f"STCAT leaves this record of {vid} out: its tube ends at {end}, its clip at {last}.")
        event, tube_end = (start, min(end, last)), min(end, last) + 1
        if event[1] <= event[0]:
            raise SampleError(f"by STCAT's rule the event {event[0]}..{event[1]} of {vid} is empty.")
    annotated = None if source is None else source.video(vid)
    video = folder.find((annotated.video_path if annotated is not None else None) or f"{vid}.mp4")
    tubes: dict[Any, dict[int, Box]] = {}
    for key, label, sentence_type in _SENTENCES:
        for index, sentence in enumerate(_list(record, key)):
            id = f"{name}-{label}-{index}"
            try:
                sentence = require(sentence, ("description", "target_id"), f"a sentence in {key}")
                target = sentence["target_id"]
                if not is_key(target):
                    raise SampleError(f"target_id of a sentence must be a number or a text, got {shown(target)}.")
                if annotated is not None and target not in tubes:
                    tubes[target] = _tube(annotated, target, range(start, tube_end), convention)
                tube = tubes.get(target, {})
                if annotated is not None and not tube:
                    raise SampleError(
                        f"VidOR has no box of trajectory {shown(target)} in frames {start}..{end} of {vid}."
                    )
                description = sentence["description"]
                sample = GroundingSample(
                    id=id,
                    video=video,
                    sentence=description.strip() if isinstance(description, str) else description,
                    width=record["width"],
                    height=record["height"],
                    fps=record["fps"],
                    frame_count=count,
                    sentence_type=sentence_type,
                    interval=_seconds(event, record["fps"]),
                    boxes=tube,
                    segment=segment,
                )
            except SampleError as error:
                yield Problem(id, str(error))
                continue
            if tube and len(tube) < tube_end - start:
                reason = f"{tube_end - start - len(tube)} of the {tube_end - start} frames of the event have no box."
                yield Problem(id, reason, skipped=False)
            yield sample


def _tube(annotated: VidORVideo, target: Any, frames: range, convention: Convention) -> dict[int, Box]:
    tube = annotated.tube(target, frames)
    if convention == "stcat" and frames[-1] not in tube and frames[-1] - 1 in tube:
        tube[frames[-1]] = tube[frames[-1] - 1]
    return tube


def _frames(record: Mapping[str, Any], key: str) -> tuple[int, int]:
    span = require(record[key], ("begin_fid", "end_fid"), key)
    return whole(span, "begin_fid", key), whole(span, "end_fid", key)


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(record[key], list):
        raise SampleError(f"{key} of a VidSTG record must be an array, got {type(record[key]).__name__}.")
    return record[key]


def _seconds(frames: tuple[int, int], fps: Any) -> tuple[float, float]:
    if not is_number(fps) or fps <= 0:
        raise SampleError(f"fps must be a positive number (frames per second), got {shown(fps)}.")
    return frames[0] / fps, frames[1] / fps
