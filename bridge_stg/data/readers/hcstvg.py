"""HC-STVG, both versions: clips of 20 seconds, one sentence and one tube each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ...errors import SampleError
from ..sample import GroundingSample
from ..values import is_number, shown
from .reading import Convention, Item, Problem, VideoFolder, attempt, corners, load_json, require, unknown_keys, whole

CLIP_SECONDS = 20.0
_TIMES = ("st_time", "ed_time")
_V1 = ("bbox", *_TIMES, "img_num", "caption", "width", "height", "st_frame")
_V2 = ("bbox", *_TIMES, "img_num", "English", "img_size", "st_frame")
_OPTIONAL = frozenset(("Chinese", "ed_frame"))


def read_hcstvg_v1(
    annotations: str | os.PathLike[str],
    videos: str | os.PathLike[str] | None = None,
    convention: Convention = "exact",
) -> Iterator[Item]:
    """Samples of `train.json` or `test.json` of version 1; see `read_hcstvg_v2` for the rest."""
    yield from _read(annotations, _V1, videos, convention)


def read_hcstvg_v2(
    annotations: str | os.PathLike[str],
    videos: str | os.PathLike[str] | None = None,
    convention: Convention = "exact",
) -> Iterator[Item]:
    """Samples of `trainv2.json` or `valv2.json`; the published test part has sentences only and is skipped.

    `st_frame` is 1-based and the tube has one box a frame from there on: it gives the interval, as in all public
    evaluators, and not `st_time` and `ed_time`, which can say up to a second more. The rate is `img_num` / 20. A
    sample's id is the video's file name. Boxes are published as x, y, w, h.

    Args:
        annotations: the published JSON file.
        videos: folder of the videos, looked through by name; None keeps the bare name.
        convention: "exact" is what the annotations say. The others number frames as a public code base does, for
            comparison with its published results: "tubedetr" takes the 1-based start for 0-based and leaves the last
            frame out of the clip; "stcat" takes the last frame of the tube for its exclusive end.

    Yields:
        samples, and a problem for each record that is skipped or odd.

    Raises:
        SampleError: the file is not such a file at all.
    """
    yield from _read(annotations, _V2, videos, convention)


def _read(
    annotations: str | os.PathLike[str],
    needed: tuple[str, ...],
    videos: str | os.PathLike[str] | None,
    convention: Convention,
) -> Iterator[Item]:
    records = load_json(annotations, dict, "HC-STVG annotations")
    folder = VideoFolder(videos)
    known = _OPTIONAL.union(needed, ("width", "height"))
    for name, record in records.items():
        yield from unknown_keys(name, record, known)
        item = attempt(name, partial(_sample, name, record, needed, folder, convention))
        if isinstance(item, GroundingSample):
            yield from _compare_times(name, record, item)
        yield item


def _sample(
    name: str, record: Any, needed: tuple[str, ...], folder: VideoFolder, convention: Convention
) -> GroundingSample:
    record = require(record, needed, "an HC-STVG record")
    width, height = _size(record, needed)
    count = whole(record, "img_num", "an HC-STVG record", 1)
    start = whole(record, "st_frame", "an HC-STVG record", 1) - 1
    tube = record["bbox"]
    if not isinstance(tube, list) or not tube:
        raise SampleError(f"bbox of an HC-STVG record must be an array of boxes [x, y, w, h], got {shown(tube)}.")
    end = start + len(tube)
    if end > count:
        raise SampleError(f"the tube ends at frame {end}, but the clip has {count} frames.")
    if "ed_frame" in record and record["ed_frame"] != end:
        raise SampleError(
            f"ed_frame is {shown(record['ed_frame'])}, but {len(tube)} boxes from {start + 1} end at {end}."
        )
    shift = 1 if convention == "tubedetr" else 0
    boxes = {
        start + shift + index: corners(f"the box of frame {start + 1 + index} (1-based)", box)
        for index, box in enumerate(tube)
    }
    boxes = {frame: box for frame, box in boxes.items() if frame < count}
    interval, segment = (start + shift, min(end + shift, count)), None
    if convention == "tubedetr":
        segment = (0, max(count - 1, 1))
    elif convention == "stcat":
        interval = (start, min(end - 1, count - 1))
    fps = count / CLIP_SECONDS
    sentence = record["English" if "English" in needed else "caption"]
    return GroundingSample(
        id=name,
        video=folder.find(name),
        sentence=sentence.strip() if isinstance(sentence, str) else sentence,
        width=width,
        height=height,
        fps=fps,
        frame_count=count,
        interval=(interval[0] / fps, interval[1] / fps),
        boxes=boxes,
        segment=segment,
    )


def _compare_times(name: str, record: Mapping[str, Any], sample: GroundingSample) -> Iterator[Problem]:
    """A note where the times in seconds and the frames of the tube differ by more than half a second."""
    assert sample.interval is not None
    times = [record[key] for key in _TIMES]
    if not all(is_number(time) for time in times):
        yield Problem(
            name, f"st_time and ed_time must be seconds, got {shown(times[0])} and {shown(times[1])}.", skipped=False
        )
    elif max(abs(a - b) for a, b in zip(times, sample.interval, strict=True)) > 0.5:
        tube, said = ("{:.2f} to {:.2f} s".format(*pair) for pair in (sample.interval, times))
        yield Problem(name, f"the tube says {tube}, st_time and ed_time say {said}; the tube is taken.", skipped=False)


def _size(record: Mapping[str, Any], needed: tuple[str, ...]) -> tuple[Any, Any]:
    if "img_size" not in needed:
        return record["width"], record["height"]
    size = record["img_size"]
    if not isinstance(size, list) or len(size) != 2:
        raise SampleError(f"img_size must be [height, width], got {shown(size)}.")
    return size[1], size[0]
