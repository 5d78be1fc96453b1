"""Checks of a dataset before a run uses it: records, videos, boxes, intervals."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .readers import Item, Problem
from .readers.alignment import probe_or_reason
from .sample import GroundingSample
from .time_base import has_time_base
from .video import VideoInfo

_TIME_TOLERANCE = 0.1  # frames; seconds pass through a division
_PIXEL_TOLERANCE = 0.5  # boxes are rounded pixels


@dataclass
class CheckReport:
    """Findings of `check_dataset`, in the order of the file.

    Attributes:
        samples: how many could be read.
        counts: of samples, by task and sentence type, with an interval, with boxes; of boxes; of distinct videos.
        skipped: bad records, `{"id", "reason"}` each.
        notes: oddities of samples that were read, `{"id", "reason"}` each; they break nothing.
        missing_videos: `{"video", "samples"}` each, `samples` being how many refer to it.
        corrupt_videos: `{"video", "samples", "reason"}` each.
        boxes_outside_frame: `{"id", "frames", "first_frame", "pixels"}` each: how many boxes leave the frame by more
            than half a pixel, the first such frame, and by how many pixels the worst does.
        intervals_outside_clip: `{"id", "reason"}` each.
        videos_checked: whether the videos were looked at.
    """

    videos_checked: bool
    samples: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    missing_videos: list[dict[str, Any]] = field(default_factory=list)
    corrupt_videos: list[dict[str, Any]] = field(default_factory=list)
    boxes_outside_frame: list[dict[str, Any]] = field(default_factory=list)
    intervals_outside_clip: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing but notes was found, and at least one sample."""
        found = (self.skipped, self.missing_videos, self.corrupt_videos)
        return self.samples > 0 and not any((*found, self.boxes_outside_frame, self.intervals_outside_clip))

    def to_dict(self) -> dict[str, Any]:
        """The report for `json.dumps`: `ok` and every attribute, by name."""
        return {"ok": self.ok, **vars(self)}


def check_dataset(
    items: Iterable[Item], *, videos: bool = False, progress: Callable[[int], None] | None = None
) -> CheckReport:
    """Check every sample, and every video once.

    Args:
        items: what a reader yields.
        videos: whether to check the videos too: that they exist, that their container and one frame can be read, and
            that length and size are those of the annotation.
        progress: called with the number of items done.
    """
    report = CheckReport(videos_checked=videos)
    counts: Counter[str] = Counter(
        {"declarative": 0, "interrogative": 0, "with_interval": 0, "with_boxes": 0, "boxes": 0}
    )
    seen: dict[str, VideoInfo | str | None] = {}
    users: Counter[str] = Counter()
    compared: set[str] = set()
    for done, item in enumerate(items, start=1):
        if progress is not None:
            progress(done)
        if isinstance(item, Problem):
            (report.skipped if item.skipped else report.notes).append({"id": item.id, "reason": item.reason})
            continue
        report.samples += 1
        counts.update((f"task {item.task}", item.sentence_type))
        counts["with_interval"] += item.interval is not None
        counts["with_boxes"] += bool(item.boxes)
        counts["boxes"] += len(item.boxes)
        users[item.video] += 1
        if videos and item.video not in seen:
            seen[item.video] = _look_at(item.video)
        info = seen.get(item.video)
        readable = info if isinstance(info, VideoInfo) else None
        _check_boxes(item, report)
        _check_interval(item, readable, report)
        if readable is not None and item.video not in compared:
            compared.add(item.video)
            _compare(item, readable, report)
    for video, state in seen.items():
        if state is None:
            report.missing_videos.append({"video": video, "samples": users[video]})
        elif isinstance(state, str):
            report.corrupt_videos.append({"video": video, "samples": users[video], "reason": state})
    report.counts = {"samples": report.samples, **counts, "videos": len(users)}
    return report


def _look_at(video: str) -> VideoInfo | str | None:
    """The video's info without its frame times, the reason why it cannot be read, or None where the file is missing."""
    if not os.path.isfile(video):
        return None
    found = probe_or_reason(video)
    return found if isinstance(found, str) else replace(found, times=np.empty(0), pts=None, keyframes=(), place=None)


def _check_boxes(sample: GroundingSample, report: CheckReport) -> None:
    if not sample.boxes:
        return
    boxes = np.array(list(sample.boxes.values()), dtype=np.float64)
    over = np.concatenate([-boxes, boxes[:, [0, 2]] - sample.width, boxes[:, [1, 3]] - sample.height], axis=1).max(
        axis=1
    )
    outside = over > _PIXEL_TOLERANCE
    if outside.any():
        frames = [frame for frame, beyond in zip(sample.boxes, outside, strict=True) if beyond]
        worst = round(float(over.max()), 1)
        report.boxes_outside_frame.append(
            {"id": sample.id, "frames": len(frames), "first_frame": min(frames), "pixels": worst}
        )


def _check_interval(sample: GroundingSample, info: VideoInfo | None, report: CheckReport) -> None:
    """Report an interval that leaves the segment, the annotated length, or the video where that can be read."""
    if sample.interval is None:
        return
    first, last = sample.segment or (0, sample.frame_count)
    clip = (first / sample.fps, last / sample.fps)
    what = "the clip"
    if info is not None and info.duration < clip[1]:
        clip, what = (clip[0], info.duration), "the video"
    tolerance = _TIME_TOLERANCE / sample.fps
    start, end = sample.interval
    # A video may lack a frame of its announced length at either end without harm.
    slack = tolerance if what == "the clip" else 1.5 / sample.fps
    if start < clip[0] - tolerance or end > clip[1] + slack:
        reason = f"the event lasts from {start:.2f} to {end:.2f} s, {what} from {clip[0]:.2f} to {clip[1]:.2f} s."
        report.intervals_outside_clip.append({"id": sample.id, "reason": reason})


def _compare(sample: GroundingSample, info: VideoInfo, report: CheckReport) -> None:
    """Note a video of another length or size than annotated; `align_to_video` makes up for both."""
    if not has_time_base(sample):
        return
    announced = sample.frame_count / sample.fps
    if sample.frame_count > 1 and abs(info.duration - announced) > max(0.5, 0.02 * announced):
        reason = f"{sample.video} lasts {info.duration:.2f} s, the annotation takes it for {announced:.2f} s."
        report.notes.append({"id": sample.id, "reason": reason})
    if (sample.width, sample.height) != (info.width, info.height):
        size = f"{info.width} x {info.height}"
        reason = f"{sample.video} measures {size}, the annotation takes it for {sample.width} x {sample.height}."
        report.notes.append({"id": sample.id, "reason": reason})
