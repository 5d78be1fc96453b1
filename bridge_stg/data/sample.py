"""One sample type for every task, and its JSON Lines form."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import SampleError
from ..files import atomic_path
from .jsonl import read_records
from .values import FARTHEST, LONGEST_SIDE, MOST_FRAMES, is_number, is_path, is_unicode, is_whole, shown, shown_list

Task = Literal["stvg", "temporal", "referring", "qa"]
SentenceType = Literal["declarative", "interrogative"]
Box = tuple[float, float, float, float]

_REQUIRED = ("id", "video", "width", "height", "fps", "frame_count", "sentence")
_OPTIONAL = ("task", "sentence_type", "tier", "segment", "interval", "boxes", "answer")
_FRAME = re.compile(r"-?[0-9]{1,18}")
_SLOWEST, _FASTEST = 1e-6, 1e6  # frames a second


@dataclass(frozen=True)
class GroundingSample:
    """A video, a sentence, and what is known of when and where it happens.

    Attributes:
        id: unique in its file.
        video: path of the video or image.
        sentence: what to find, or the question.
        width, height: of the video, in pixels; at most 16384.
        fps: mean frame rate; frames and seconds convert by it.
        frame_count: frames in the video; below 2^31, as is every frame of the interval.
        task: "stvg" (tube), "temporal" (interval only), "referring" (one image, one box), "qa" (text only).
        sentence_type: "declarative" or "interrogative".
        interval: (start, end) of the event in seconds, end exclusive.
        boxes: {frame: (x1, y1, x2, y2)} in original pixels, x2 and y2 exclusive edges; empty where unknown.
        segment: frames [start, end) of the video that form the clip; None means all of it.
        answer: text answer of a "qa" sample.
        tier: difficulty of a synthetic clip.

    Raises:
        SampleError: a value is out of its range.
    """

    id: str
    video: str
    sentence: str
    width: int
    height: int
    fps: float
    frame_count: int
    task: Task = "stvg"
    sentence_type: SentenceType = "declarative"
    interval: tuple[float, float] | None = None
    boxes: Mapping[int, Box] = field(default_factory=dict)
    segment: tuple[int, int] | None = None
    answer: str | None = None
    tier: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "video", "sentence"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise SampleError(f"{name} must be a non-empty text, got {shown(value)}.")
        if not is_path(self.video):
            raise SampleError(f"video must be a path that a file can have, got {shown(self.video)}.")
        for name in ("width", "height", "frame_count"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise SampleError(f"{name} must be a whole number of at least 1, got {shown(value)}.")
        if max(self.width, self.height) > LONGEST_SIDE:
            size = f"{shown(self.width)} x {shown(self.height)}"
            raise SampleError(f"width and height must be at most {LONGEST_SIDE}, got {size}.")
        if self.frame_count >= MOST_FRAMES:
            raise SampleError(f"frame_count must be below {MOST_FRAMES}, got {shown(self.frame_count)}.")
        _check_fps(self.fps)
        _check_choice("task", self.task, get_args(Task))
        _check_choice("sentence_type", self.sentence_type, get_args(SentenceType))
        for name in ("answer", "tier"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise SampleError(f"{name} must be a text, got {shown(value)}.")
        for name in ("id", "sentence", "answer", "tier"):
            value = getattr(self, name)
            if value is not None and not is_unicode(value):
                raise SampleError(f"{name} holds half a character, which UTF-8 cannot hold: {shown(value)}.")
        if self.interval is not None:
            start, end = _pair("interval", self.interval)
            if start < 0 or end <= start:
                raise SampleError(f"interval must have 0 <= start < end (seconds), got ({start}, {end}).")
            if end * self.fps > MOST_FRAMES:
                raise SampleError(
                    f"interval must end before frame {MOST_FRAMES}, got {end:g} s at {self.fps:g} frames a second."
                )
        if self.segment is not None:
            start, end = _pair("segment", self.segment)
            if not (is_whole(start) and is_whole(end) and 0 <= start < end <= self.frame_count):
                raise SampleError(
                    f"segment must have 0 <= start < end <= {self.frame_count} (frames), got {shown(self.segment)}."
                )
        for frame, box in self.boxes.items():
            _check_box(frame, box, self.frame_count)

    @property
    def interval_frames(self) -> tuple[int, int] | None:
        """The interval as frames [start, end), rounded, at least one frame long."""
        if self.interval is None:
            return None
        return to_frame_range(self.interval, self.fps, self.frame_count)

    def to_record(self) -> dict[str, Any]:
        """The JSON form: interval and segment in frames, boxes keyed by frame as text, None left out."""
        record: dict[str, Any] = {
            "id": self.id,
            "video": self.video,
            "width": self.width,
            "height": self.height,
            "fps": self.fps,
            "frame_count": self.frame_count,
            "task": self.task,
            "sentence": self.sentence,
            "sentence_type": self.sentence_type,
            "tier": self.tier,
            "segment": list(self.segment) if self.segment is not None else None,
            "interval": list(self.interval_frames) if self.interval_frames is not None else None,
            "boxes": {str(frame): list(box) for frame, box in sorted(self.boxes.items())} or None,
            "answer": self.answer,
        }
        return {key: value for key, value in record.items() if value is not None}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], root: str | os.PathLike[str] | None = None) -> GroundingSample:
        """Inverse of `to_record`; a relative video path is taken from `root`.

        Raises:
            SampleError: an unknown or missing key, or a value out of its range.
        """
        if not isinstance(record, Mapping):
            raise SampleError(f"a record must be a JSON object, got {type(record).__name__}.")
        unknown = sorted(set(record) - set(_REQUIRED) - set(_OPTIONAL))
        if unknown:
            allowed = ", ".join((*_REQUIRED, *_OPTIONAL))
            raise SampleError(f"unknown key {shown_list(unknown)}; allowed are {allowed}.")
        missing = [key for key in _REQUIRED if key not in record]
        if missing:
            needed = ", ".join(_REQUIRED)
            raise SampleError(f"missing key {', '.join(map(repr, missing))}; every record needs {needed}.")
        values = {key: value for key, value in record.items() if value is not None or key in _REQUIRED}
        if root is not None and isinstance(values.get("video"), str) and values["video"].strip():
            values["video"] = str(Path(root) / values["video"])
        if "segment" in values:
            values["segment"] = _pair("segment", values["segment"])
        if "interval" in values:
            fps: Any = values.get("fps")
            _check_fps(fps)
            values["interval"] = tuple(frame / fps for frame in _pair("interval", values["interval"]))
        if "boxes" in values:
            frames = parse_frames("boxes", values["boxes"])
            values["boxes"] = {frame: tuple(box) if isinstance(box, list) else box for frame, box in frames.items()}
        return cls(**values)


def to_frame_range(interval: tuple[float, float], fps: float, frame_count: int | None = None) -> tuple[int, int]:
    """Seconds [start, end) as frames [start, end), both rounded; at least one frame remains.

    Of a video of `frame_count` frames, an event that begins within half a frame of its end takes the last one.

    Raises:
        SampleError: a second or the rate is not a finite number.
    """
    if not all(map(is_number, (*interval, fps))):
        raise SampleError(f"interval and fps must be finite numbers, got {shown(interval)} and {shown(fps)}.")
    start = max(round(interval[0] * fps), 0)
    if frame_count is not None and start == frame_count and interval[0] * fps < frame_count:
        start -= 1
    return start, max(round(interval[1] * fps), start + 1)


def read_samples(path: str | os.PathLike[str]) -> list[GroundingSample]:
    """Read a JSON Lines file, one record a line; video paths are relative to the file's folder.

    Raises:
        SampleError: the file cannot be read or holds no record, or a line breaks the schema; names the line.
    """
    return read_records(path, "an annotation file", partial(GroundingSample.from_record, root=Path(path).parent))


def write_samples(path: str | os.PathLike[str], samples: Iterable[GroundingSample]) -> None:
    """Write JSON Lines atomically; video paths become relative to the file's folder, or absolute outside it.

    Raises:
        OutputError: the file cannot be written.
        SampleError: a video's path is not Unicode, so that JSON cannot hold it.
    """
    path = Path(path)
    folder = path.parent.absolute()
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for sample in samples:
            record = sample.to_record()
            video = Path(sample.video).absolute()
            inside = video.is_relative_to(folder)
            record["video"] = video.relative_to(folder).as_posix() if inside else str(video)
            if not is_unicode(record["video"]):
                raise SampleError(
                    f"the path of the video of {shown(sample.id)} is not UTF-8: {shown(record['video'])}."
                )
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _check_fps(value: Any) -> None:
    if not is_number(value) or value <= 0:
        raise SampleError(f"fps must be a positive number (frames per second), got {shown(value)}.")
    if not _SLOWEST <= value <= _FASTEST:
        raise SampleError(f"fps must be in {_SLOWEST:g}..{_FASTEST:g} (frames per second), got {value:g}.")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SampleError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}.")


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(is_number(v) for v in value):
        raise SampleError(f"{name} must be two numbers [start, end], got {shown(value)}.")
    return value[0], value[1]


def _check_box(frame: Any, box: Any, frame_count: int) -> None:
    if not is_whole(frame) or not 0 <= frame < frame_count:
        raise SampleError(f"boxes must be keyed by frames in 0..{frame_count - 1}, got {shown(frame)}.")
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(is_number(v) for v in box):
        raise SampleError(f"the box of frame {frame} must be four numbers [x1, y1, x2, y2], got {shown(box)}.")
    if box[2] < box[0] or box[3] < box[1]:
        raise SampleError(f"the box of frame {frame} must have x2 >= x1 and y2 >= y1, got {shown(tuple(box))}.")
    if max(map(abs, box)) > FARTHEST:
        raise SampleError(f"the box of frame {frame} must lie within {FARTHEST} pixels, got {shown(tuple(box))}.")


def parse_frames(name: str, value: Any) -> dict[int, Any]:
    """A JSON object keyed by frames as one keyed by numbers; what it holds is not looked at.

    Raises:
        SampleError: it is not an object, a key is not a whole number in decimal digits, or two keys are equal.
    """
    if not isinstance(value, Mapping):
        raise SampleError(f"{name} must be an object {{frame: [x1, y1, x2, y2]}}, got {type(value).__name__}.")
    frames: dict[int, Any] = {}
    for key, held in value.items():
        if not _FRAME.fullmatch(str(key)):
            raise SampleError(f"{name} must be keyed by frame numbers, got {shown(key)}.")
        if int(key) in frames:
            raise SampleError(f"{name} must have one box a frame, got two of frame {int(key)}.")
        frames[int(key)] = held
    return frames
