"""Small samples for the tests of evaluation."""

from __future__ import annotations

from typing import Any

from bridge_stg.data import GroundingSample


def make_sample(interval: tuple[int, int] | None, id: str = "a", **changes: Any) -> GroundingSample:
    """A 100 x 80 clip of 40 frames at 4 a second; `interval` in frames, one box in all of them."""
    values: dict[str, Any] = {
        "id": id,
        "video": "clip.mp4",
        "sentence": "the red circle moves left",
        "width": 100,
        "height": 80,
        "fps": 4.0,
        "frame_count": 40,
        "interval": None if interval is None else (interval[0] / 4, interval[1] / 4),
        "boxes": dict.fromkeys(range(40), (10.0, 20.0, 50.0, 60.0)),
    }
    return GroundingSample(**(values | changes))
