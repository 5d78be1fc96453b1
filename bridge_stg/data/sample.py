"""One sample type for every task, and its JSON Lines form."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import SampleError
from ..files import atomic_path

Task = Literal["stvg", "temporal", "referring", "qa"]
SentenceType = Literal["declarative", "interrogative"]
Box = tuple[float, float, float, float]

_REQUIRED = ("id", "video", "width", "height", "fps", "frame_count", "sentence")
_OPTIONAL = ("task", "sentence_type", "tier", "segment", "interval", "boxes", "answer")


@dataclass(frozen=True)
class GroundingSample:
    """A video, a sentence, and what is known of when and where it happens.

    Attributes:
        id: unique in its file.
        video: path of the video or image.
        sentence: what to find, or the question.
        width, height: of the video, in pixels.
        fps: mean frame rate; frames and seconds convert by it.
        frame_count: frames in the video.
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
                raise SampleError(f"{name} must be a non-empty text, got {value!r}.")
        for name in ("width", "height", "frame_count"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise SampleError(f"{name} must be a whole number of at least 1, got {value!r}.")
        _check_fps(self.fps)
        _check_choice("task", self.task, get_args(Task))
        _check_choice("sentence_type", self.sentence_type, get_args(SentenceType))
        for name in ("answer", "tier"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise SampleError(f"{name} must be a text, got {value!r}.")
        if self.interval is not None:
            start, end = _pair("interval", self.interval)
            if start < 0 or end <= start:
                raise SampleError(f"interval must have 0 <= start < end (seconds), got ({start}, {end}).")
        if self.segment is not None:
            start, end = _pair("segment", self.segment)
            if not (_is_int(start) and _is_int(end) and 0 <= start < end <= self.frame_count):
                raise SampleError(
                    f"segment must have 0 <= start < end <= {self.frame_count} (frames), got {self.segment}."
                )
        for frame, box in self.boxes.items():
            _check_box(frame, box, self.frame_count)

    @property
    def interval_frames(self) -> tuple[int, int] | None:
        """The interval as frames [start, end), rounded, at least one frame long."""
        if self.interval is None:
            return None
        start, end = (round(second * self.fps) for second in self.interval)
        return start, max(end, start + 1)

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
            raise SampleError(f"unknown key {', '.join(map(repr, unknown))}; allowed are {allowed}.")
        missing = [key for key in _REQUIRED if key not in record]
        if missing:
            needed = ", ".join(_REQUIRED)
            raise SampleError(f"missing key {', '.join(map(repr, missing))}; every record needs {needed}.")
        values = {key: value for key, value in record.items() if value is not None}
        if root is not None and isinstance(values.get("video"), str) and values["video"].strip():
            values["video"] = str(Path(root) / values["video"])
        if "segment" in values:
            values["segment"] = _pair("segment", values["segment"])
        if "interval" in values:
            fps: Any = values.get("fps")
            _check_fps(fps)
            values["interval"] = tuple(frame / fps for frame in _pair("interval", values["interval"]))
        if "boxes" in values:
            values["boxes"] = _parse_boxes(values["boxes"])
        return cls(**values)


def read_samples(path: str | os.PathLike[str]) -> list[GroundingSample]:
    """Read a JSON Lines file, one record a line; video paths are relative to the file's folder.

    Raises:
        SampleError: the file cannot be read or holds no record, or a line breaks the schema; names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # others break lines at signs that a sentence may hold
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SampleError(f"{path} cannot be read as an annotation file: {reason}.") from error
    samples: list[GroundingSample] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sample = GroundingSample.from_record(json.loads(line), root=path.parent)
        except json.JSONDecodeError as error:
            raise SampleError(
                f"{path}:{number}: not a complete JSON object: {error.msg} (column {error.colno})."
            ) from error
        except SampleError as error:
            raise SampleError(f"{path}:{number}: {error}") from error
        if sample.id in seen:
            raise SampleError(
                f"{path}:{number}: id {sample.id!r} is already in line {seen[sample.id]}; ids must be unique."
            )
        seen[sample.id] = number
        samples.append(sample)
    if not samples:
        raise SampleError(f"{path} holds no record; an annotation file needs at least one line.")
    return samples


def write_samples(path: str | os.PathLike[str], samples: Iterable[GroundingSample]) -> None:
    """Write JSON Lines atomically; video paths become relative to the file's folder, or absolute outside it.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    folder = path.parent.absolute()
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for sample in samples:
            record = sample.to_record()
            video = Path(sample.video).absolute()
            inside = video.is_relative_to(folder)
            record["video"] = video.relative_to(folder).as_posix() if inside else str(video)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_fps(value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise SampleError(f"fps must be a positive number (frames per second), got {value!r}.")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SampleError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(_is_number(v) for v in value):
        raise SampleError(f"{name} must be two numbers [start, end], got {value!r}.")
    return value[0], value[1]


def _check_box(frame: Any, box: Any, frame_count: int) -> None:
    if not _is_int(frame) or not 0 <= frame < frame_count:
        raise SampleError(f"boxes must be keyed by frames in 0..{frame_count - 1}, got {frame!r}.")
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(v) for v in box):
        raise SampleError(f"the box of frame {frame} must be four numbers [x1, y1, x2, y2], got {box!r}.")
    if box[2] < box[0] or box[3] < box[1]:
        raise SampleError(f"the box of frame {frame} must have x2 >= x1 and y2 >= y1, got {tuple(box)}.")


def _parse_boxes(value: Any) -> dict[int, Box]:
    if not isinstance(value, Mapping):
        raise SampleError(f"boxes must be an object {{frame: [x1, y1, x2, y2]}}, got {type(value).__name__}.")
    boxes = {}
    for key, box in value.items():
        try:
            frame = int(key)
        except (TypeError, ValueError) as error:
            raise SampleError(f"boxes must be keyed by frame numbers, got {key!r}.") from error
        boxes[frame] = tuple(box) if isinstance(box, list) else box
    return boxes
