"""Clips with a moving square, and groundings of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.data import Box, GroundingSample, write_video
from bridge_stg.models.result import GroundingResult, KeptTokens, PresencePoint, TubeEntry


@dataclass(frozen=True)
class Clip:
    """A video, its truth, and an answer that is one frame late and two pixels off."""

    video: Path
    sample: GroundingSample
    result: GroundingResult


def box_at(frame: int, width: int, height: int) -> Box:
    side = min(width, height) // 3
    left = 4 + frame * (width - side - 8) // 16
    return (float(left), height / 2 - side // 2, float(left + side), height / 2 - side // 2 + side)


def make_clip_in(
    folder: Path,
    width: int = 96,
    height: int = 64,
    count: int = 16,
    sentence: str = "the red square moves right",
    times: np.ndarray | None = None,
) -> Clip:
    video = folder / f"source-{width}x{height}-{count}.mp4"
    pictures = []
    for frame in range(count):
        picture = np.full((height, width, 3), (70, 90, 80), dtype=np.uint8)
        x1, y1, x2, y2 = (round(v) for v in box_at(frame, width, height))
        picture[y1:y2, x1:x2] = (200, 40, 40)
        pictures.append(picture)
    if times is None:
        write_video(video, pictures, fps=4.0)
        times = np.arange(count) / 4
    else:
        write_video(video, pictures, times=times)
    start, end = count // 4, count // 4 + max(1, count // 2)
    sample = GroundingSample(
        id="a",
        video=str(video),
        sentence=sentence,
        width=width,
        height=height,
        fps=4.0,
        frame_count=count,
        interval=(start / 4, end / 4),
        boxes={frame: box_at(frame, width, height) for frame in range(count)},
    )
    late = [frame for frame in range(start + 1, end + 1) if frame < count] or [start]
    tube = tuple(
        TubeEntry(
            frame=frame,
            time=float(times[frame]),
            box=tuple(v + 2 for v in box_at(frame, width, height)),  # type: ignore[arg-type]
            presence=0.8,
            interpolated=(frame - late[0]) % 2 == 1,
        )
        for frame in late
    )
    result = GroundingResult(
        video=str(video),
        sentence=sentence,
        interval=(late[0] / 4, (late[-1] + 1) / 4),
        interval_source="text",
        confidence=0.8,
        answer=f"From {late[0] / 4:.1f} s to {(late[-1] + 1) / 4:.1f} s.",
        fps=4.0,
        width=width,
        height=height,
        frame_count=count,
        tube=tube,
        presence=tuple(PresencePoint(f, float(times[f]), 0.9 if f in late else 0.1) for f in range(0, count, 2)),
        kept_tokens=tuple(
            KeptTokens(entry.frame, (4, 6), (3, 8, 9, 20), (0.1, 2.0, -1.5, 0.4))
            for entry in tube
            if not entry.interpolated
        ),
    )
    return Clip(video, sample, result)


@pytest.fixture
def make_clip(tmp_path: Path) -> Callable[..., Clip]:
    """`make_clip_in` the folder of the test."""
    return partial(make_clip_in, tmp_path)
