"""The picture strip: a PNG of known geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridge_stg.visualization import draw_strip
from bridge_stg.visualization.drawing import PREDICTED, TRUE
from bridge_stg.visualization.strip import STRIP_WIDTH, pick_frames


def _count(image: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((np.abs(image.astype(int) - color).max(axis=-1) < 6).sum())


def test_strip_with_and_without_truth(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip(128, 128)
    pictures = {}
    for name, sample in (("plain", None), ("truth", clip.sample)):
        out = draw_strip(clip.video, clip.result, tmp_path / f"{name}.png", sample)
        assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pictures[name] = np.asarray(Image.open(out).convert("RGB"))
        assert pictures[name].shape[1] == STRIP_WIDTH
    assert len(pictures["truth"]) == len(pictures["plain"]) + 52  # one more row in the time line
    assert _count(pictures["plain"], PREDICTED) > 1000
    assert _count(pictures["plain"], TRUE) == 0
    assert _count(pictures["truth"], TRUE) > 1000
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["plain.png", "truth.png"]


def test_height_follows_the_frames(make_clip: Callable, tmp_path: Path) -> None:
    wide, tall = make_clip(160, 64), make_clip(64, 160)
    heights = [
        Image.open(draw_strip(clip.video, clip.result, tmp_path / "s.png", columns=4)).height for clip in (wide, tall)
    ]
    column = (STRIP_WIDTH - 2 * 44 - 3 * 14) // 4
    assert heights[1] - heights[0] == pytest.approx(column * (160 / 64 - 64 / 160), abs=2)


def test_any_sentence_and_no_curves(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip(sentence="what costs $5 or $6_x$ & <b>more</b> \\frac{1 than " + "very " * 60 + "little?")
    bare = replace(clip.result, presence=(), kept_tokens=())
    assert draw_strip(clip.video, bare, tmp_path / "s.png").exists()


def test_one_frame(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip(count=1)
    assert draw_strip(clip.video, clip.result, tmp_path / "s.png", clip.sample).exists()


def test_columns_must_be_positive(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip()
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        draw_strip(clip.video, clip.result, tmp_path / "s.png", columns=0)


def test_picked_frames() -> None:
    assert pick_frames(60, list(range(10, 40)), 6) == [5, 15, 25, 35, 45, 55]
    short = pick_frames(100, [50, 51, 52, 53], 6)
    assert short == sorted(set(short))
    assert len(short) == 6
    assert sum(50 <= frame < 54 for frame in short) == 3
    assert pick_frames(100, [7], 4).count(7) == 1
    assert pick_frames(3, [1], 6) == [0, 1, 2]
    assert pick_frames(100, list(range(100)), 2) == [25, 75]
    assert pick_frames(8, list(range(1, 8)), 4) == [1, 3, 5, 7]
