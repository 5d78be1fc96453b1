"""The result of `BridgeSTGForVideoGrounding.ground`: when, where, and how sure; it serialises to JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..json_text import dump_json

IntervalSource = Literal["text", "presence"]


@dataclass(frozen=True)
class TubeEntry:
    """One source frame of the tube.

    Attributes:
        frame: 0-based source frame.
        time: its time in seconds on the file's own clock.
        box: (x1, y1, x2, y2) in original pixels.
        presence: probability in [0, 1] that the event is on in this frame.
        interpolated: True when the frame was not decoded and the box lies between two that were.
    """

    frame: int
    time: float
    box: tuple[float, float, float, float]
    presence: float
    interpolated: bool


@dataclass(frozen=True)
class PresencePoint:
    """Presence probability at one decoded frame of the whole clip."""

    frame: int
    time: float
    value: float


@dataclass(frozen=True)
class KeptTokens:
    """Visual tokens the pruner kept in one decoded frame.

    Attributes:
        frame: 0-based source frame.
        grid: (rows, columns) of the token grid over the frame.
        index: kept tokens, ascending, row-major in `grid`.
        score: pruning score of each kept token, same order.
    """

    frame: int
    grid: tuple[int, int]
    index: tuple[int, ...]
    score: tuple[float, ...]


@dataclass(frozen=True)
class GroundingResult:
    """When and where a sentence happens in a video.

    All times are on the file's own clock, as players show them: where the sound begins before the picture, the first
    frame is not at 0. Frames are counted from the first one.

    Attributes:
        video, sentence: what was asked.
        interval: (start, end) in seconds, end exclusive.
        interval_source: "text" when the generated answer gave the interval, "presence" when the presence curve did.
        confidence: mean presence over the interval, in [0, 1].
        answer: the generated text; its times count from the first frame.
        fps, width, height, frame_count: of the source video (mean frame rate).
        tube: one entry per source frame inside the interval, ascending.
        presence: the presence curve over the decoded frames of the whole clip.
        kept_tokens: what the pruner kept, per decoded frame in the interval; empty when pruning is off.
        start_time: seconds of the first frame on the file's own clock; annotations count from that frame.
    """

    video: str
    sentence: str
    interval: tuple[float, float]
    interval_source: IntervalSource
    confidence: float
    answer: str
    fps: float
    width: int
    height: int
    frame_count: int
    tube: tuple[TubeEntry, ...]
    presence: tuple[PresencePoint, ...] = ()
    kept_tokens: tuple[KeptTokens, ...] = field(default=(), repr=False)
    start_time: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The result as plain lists, numbers and strings, ready for `json.dumps`.

        Raises:
            ValueError: a number is NaN or infinite.
        """
        return json.loads(dump_json(asdict(self)))

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON that every strict parser accepts.

        Raises:
            ValueError: a number is NaN or infinite, which cannot be in a result of `ground`.
        """
        return dump_json(asdict(self), indent=indent)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> GroundingResult:
        """Build a result from what `to_dict` returned."""
        values = dict(record)
        values["interval"] = tuple(values["interval"])
        values["tube"] = tuple(TubeEntry(**{**e, "box": tuple(e["box"])}) for e in values["tube"])
        values["presence"] = tuple(PresencePoint(**p) for p in values["presence"])
        values["kept_tokens"] = tuple(
            KeptTokens(k["frame"], tuple(k["grid"]), tuple(k["index"]), tuple(k["score"]))
            for k in values["kept_tokens"]
        )
        return cls(**values)
