"""Predictions, which are what is scored: an interval and a tube in source frames; and their JSON Lines file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..data.jsonl import read_records
from ..data.sample import Box, parse_frames, to_frame_range
from ..data.values import FARTHEST, MOST_FRAMES, is_unicode, shown, shown_list
from ..errors import SampleError
from ..files import atomic_path

_KEYS = ("id", "interval", "boxes", "oracle_boxes")


class _TubeEntry(Protocol):
    @property
    def frame(self) -> int: ...

    @property
    def box(self) -> Box: ...


class _Grounding(Protocol):
    """The fields of a grounding result that are scored; evaluation knows no class of the model."""

    @property
    def interval(self) -> tuple[float, float]: ...

    @property
    def fps(self) -> float: ...

    @property
    def tube(self) -> Sequence[_TubeEntry]: ...


@dataclass(frozen=True, eq=False)  # equal to any mapping of the same items
class StillTube(Mapping[int, Box]):
    """The same box in every frame of a range, however many there are."""

    frames: range
    box: Box

    def __getitem__(self, frame: int) -> Box:
        if frame not in self.frames:
            raise KeyError(frame)
        return self.box

    def __iter__(self) -> Iterator[int]:
        return iter(self.frames)

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class Prediction:
    """When and where, for one sample.

    Attributes:
        id: of the sample it answers.
        interval: frames [start, end) of the source video; start == end says that nothing was found.
        boxes: {frame: (x1, y1, x2, y2)} in original pixels, for the predicted interval.
        oracle_boxes: boxes predicted for the true interval, for gt_vIoU; None where that was not run.

    Raises:
        SampleError: a value is out of its range.
    """

    id: str
    interval: tuple[int, int]
    boxes: Mapping[int, Box] = field(default_factory=dict)
    oracle_boxes: Mapping[int, Box] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id.strip():
            raise SampleError(f"id must be a non-empty text, got {shown(self.id)}.")
        if not is_unicode(self.id):
            raise SampleError(f"id holds half a character, which UTF-8 cannot hold: {shown(self.id)}.")
        interval = self.interval
        if (
            not isinstance(interval, list | tuple)
            or len(interval) != 2
            or not all(_is_frame(frame) for frame in interval)
            or interval[1] < interval[0]
        ):
            got = shown(interval)
            raise SampleError(f"interval must be whole frames [start, end) with 0 <= start <= end, got {got}.")
        if interval[1] > MOST_FRAMES:
            raise SampleError(f"interval must end before frame {MOST_FRAMES}, got {shown(interval)}.")
        object.__setattr__(self, "interval", (int(interval[0]), int(interval[1])))
        object.__setattr__(self, "boxes", _check_boxes("boxes", self.boxes))
        if self.oracle_boxes is not None:
            object.__setattr__(self, "oracle_boxes", _check_boxes("oracle_boxes", self.oracle_boxes))

    @property
    def boxes_in_truth(self) -> Mapping[int, Box]:
        """The boxes that gt_vIoU scores: those for the true interval where there are any, else `boxes`."""
        return self.boxes if self.oracle_boxes is None else self.oracle_boxes

    @classmethod
    def from_result(cls, id: str, result: _Grounding, oracle_boxes: Mapping[int, Box] | None = None) -> Prediction:
        """Turn a grounding result into frames: its seconds by its `fps`, with the boxes of its tube.

        Frames count from the first one, so that a result's `start_time` is subtracted from its seconds.
        """
        begin = getattr(result, "start_time", 0.0)
        interval = (result.interval[0] - begin, result.interval[1] - begin)
        return cls(
            id=id,
            interval=to_frame_range(interval, result.fps, getattr(result, "frame_count", None)),
            boxes={entry.frame: entry.box for entry in result.tube},
            oracle_boxes=oracle_boxes,
        )

    def to_record(self) -> dict[str, Any]:
        """The JSON form; boxes are keyed by the frame as text, `oracle_boxes` is absent where it is None."""
        record: dict[str, Any] = {
            "id": self.id,
            "interval": list(self.interval),
            "boxes": {str(frame): list(box) for frame, box in sorted(self.boxes.items())},
        }
        if self.oracle_boxes is not None:
            record["oracle_boxes"] = {str(frame): list(box) for frame, box in sorted(self.oracle_boxes.items())}
        return record

    @classmethod
    def from_record(cls, record: Any) -> Prediction:
        """Inverse of `to_record`.

        Raises:
            SampleError: an unknown or missing key, or a value out of its range.
        """
        if not isinstance(record, Mapping):
            raise SampleError(f"a prediction must be a JSON object, got {type(record).__name__}.")
        unknown = sorted(set(record) - set(_KEYS))
        if unknown:
            raise SampleError(f"unknown key {shown_list(unknown)}; allowed are {', '.join(_KEYS)}.")
        missing = [key for key in ("id", "interval") if key not in record]
        if missing:
            raise SampleError(f"missing key {', '.join(map(repr, missing))}; every prediction needs id and interval.")
        oracle = record.get("oracle_boxes")
        return cls(
            id=record["id"],
            interval=record["interval"],
            boxes=parse_frames("boxes", record.get("boxes", {})),
            oracle_boxes=None if oracle is None else parse_frames("oracle_boxes", oracle),
        )


def read_predictions(path: str | os.PathLike[str]) -> list[Prediction]:
    """Read JSON Lines, each `{"id", "interval": [start, end], "boxes": {"<frame>": [x1, y1, x2, y2]}}`.

    Raises:
        SampleError: the file cannot be read, a line breaks the schema, or an id comes twice (names the line).
    """
    return read_records(path, "a prediction file", Prediction.from_record, may_be_empty=True)


def write_predictions(path: str | os.PathLike[str], predictions: Iterable[Prediction]) -> None:
    """Write JSON Lines atomically, in the order given.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(prediction.to_record(), ensure_ascii=False, allow_nan=False) + "\n")


def _is_frame(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def _check_boxes(name: str, boxes: Mapping[int, Any]) -> Mapping[int, Box]:
    if not isinstance(boxes, Mapping):
        raise SampleError(f"{name} must be {{frame: (x1, y1, x2, y2)}}, got {shown(boxes)}.")
    if not boxes:
        return {}
    if isinstance(boxes, StillTube):
        _check_boxes(name, {boxes.frames[0]: boxes.box, boxes.frames[-1]: boxes.box})
        return boxes
    wrong = next((frame for frame in boxes if not _is_frame(frame)), None)
    if wrong is not None:
        raise SampleError(f"{name} must be keyed by frames of 0 or more, got {shown(wrong)}.")
    if max(boxes) >= MOST_FRAMES:
        raise SampleError(f"{name} must be keyed by frames below {MOST_FRAMES}, got {shown(max(boxes))}.")
    try:
        values = np.asarray(list(boxes.values()))
    except (ValueError, OverflowError):  # boxes of unequal length
        values = np.zeros(0)
    # A bool among numbers has become one.
    mixed = any(isinstance(v, bool | np.bool_) for box in boxes.values() if isinstance(box, list | tuple) for v in box)
    if mixed or values.shape != (len(boxes), 4) or values.dtype.kind not in "iuf":
        frame, box = next(((f, b) for f, b in boxes.items() if not _is_four_numbers(b)), next(iter(boxes.items())))
        raise SampleError(f"{name} must hold four numbers [x1, y1, x2, y2] a frame, got {shown(box)} in frame {frame}.")
    values = values.astype(np.float64)
    inverted = ~np.isfinite(values).all(axis=1) | (values[:, 2:] < values[:, :2]).any(axis=1)
    far = (np.abs(values) > FARTHEST).any(axis=1)
    for bad, rule in ((inverted, "be finite with x2 >= x1 and y2 >= y1"), (far, f"lie within {FARTHEST} pixels")):
        if bad.any():
            row = int(bad.argmax())
            raise SampleError(f"{name} must {rule}, got {values[row].tolist()} in frame {list(boxes)[row]}.")
    return {int(frame): (box[0], box[1], box[2], box[3]) for frame, box in zip(boxes, values.tolist(), strict=True)}


def _is_four_numbers(box: Any) -> bool:
    return (
        isinstance(box, list | tuple | np.ndarray)
        and len(box) == 4
        and all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in box)
    )
