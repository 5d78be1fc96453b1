"""Annotated videos: frame for frame the source, with the boxes on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.data import decode_frames, probe
from bridge_stg.errors import OutputError, VideoError
from bridge_stg.visualization import annotate_video
from bridge_stg.visualization.drawing import PREDICTED, TRUE, draw_caption, load_font, render_frame, wrap_text


def _near(image: np.ndarray, color: tuple[int, int, int], reach: int = 60) -> np.ndarray:
    return np.abs(image.astype(int) - color).max(axis=-1) < reach


@pytest.mark.parametrize("size", [(96, 64), (128, 128), (97, 63), (64, 160)])
def test_frame_count_size_and_times_are_those_of_the_source(
    make_clip: Callable, tmp_path: Path, size: tuple[int, int]
) -> None:
    clip = make_clip(*size)
    seen: list[tuple[int, int]] = []
    out = annotate_video(
        clip.video, clip.result, tmp_path / "out" / "a.mp4", clip.sample, lambda *step: seen.append(step)
    )
    made, source = probe(out), probe(clip.video)
    assert (made.frame_count, made.width, made.height) == (16, *size)
    np.testing.assert_allclose(made.times, source.times, atol=1e-3)
    assert seen == [(done, 16) for done in range(1, 17)]
    assert [path.name for path in out.parent.iterdir()] == ["a.mp4"]


def test_variable_frame_rate_is_kept(make_clip: Callable, tmp_path: Path) -> None:
    times = np.cumsum([0, *[0.1, 0.4, 0.25] * 5])
    clip = make_clip(times=times)
    out = annotate_video(clip.video, clip.result, tmp_path / "a.mp4")
    np.testing.assert_allclose(probe(out).times, times, atol=1e-3)


def test_one_frame_video(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip(count=1)
    assert probe(annotate_video(clip.video, clip.result, tmp_path / "a.mp4", clip.sample)).frame_count == 1


def test_boxes_are_drawn_inside_the_interval_only(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip(192, 128)
    out = annotate_video(clip.video, clip.result, tmp_path / "a.mp4")
    source, drawn = decode_frames(clip.video, range(16)).numpy(), decode_frames(out, range(16)).numpy()
    first = clip.result.tube[0]
    x1, y1, x2, y2 = (round(v) for v in first.box)
    changed = np.abs(drawn[first.frame].astype(int) - source[first.frame]).max(axis=-1) > 40
    assert changed[y1:y2, x1].mean() > 0.9  # the left edge
    assert changed[y1, x1:x2].mean() > 0.9  # the top edge
    middle = slice(y1 + 8, y2 - 8), slice(x1 + 8, x2 - 8)
    assert not changed[middle].any()
    before = np.abs(drawn[0].astype(int) - source[0]).max(axis=-1) > 40
    assert not before[40:100].any()


def test_the_time_bar_shows_both_intervals_and_the_present(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip(192, 128)
    out = annotate_video(clip.video, clip.result, tmp_path / "a.mp4", clip.sample)
    bar = decode_frames(out, [0]).numpy()[0, -7:].astype(int)
    # Predicted 1.25-3.25 s, true 1-3 s, of 4 s over 192 pixels; chroma has half the resolution.
    inside, outside = bar[:, 70:140], bar[:, 175:]
    assert inside.max() - outside.max() > 80
    assert bar[:, 0].min() > 150  # the present
    assert bar[:, 20:40].max() < 100


def test_solid_dashed_and_corners(make_clip: Callable) -> None:
    clip = make_clip()
    frame = np.full((64, 96, 3), 128, dtype=np.uint8)
    decoded, between = clip.result.tube[:2]
    solid, dashed = render_frame(frame, decoded, None), render_frame(frame, between, None)
    corners = render_frame(frame, None, decoded.box)
    count = [
        int(_near(image, color, 5).sum()) for image, color in ((solid, PREDICTED), (dashed, PREDICTED), (corners, TRUE))
    ]
    x1, y1, x2, y2 = decoded.box
    assert count[0] == 2 * (x2 - x1) + 2 * (y2 - y1) - 4
    assert 0.4 * count[0] < count[1] < 0.8 * count[0]
    assert 0.4 * count[0] < count[2] < 0.8 * count[0]
    assert (frame == 128).all()


def test_boxes_beyond_the_frame_are_clipped() -> None:
    frame = np.zeros((20, 30, 3), dtype=np.uint8)
    drawn = render_frame(frame, None, (-10.0, -10.0, 50.0, 50.0))
    assert _near(drawn, TRUE, 5)[0, 0]
    assert _near(drawn, TRUE, 5)[-1, -1]
    assert render_frame(frame, None, (40.0, 5.0, 60.0, 5.0)).shape == frame.shape


def test_caption_keeps_to_the_other_half(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip(128, 128)
    high = replace(clip.result, tube=tuple(replace(entry, box=(10.0, 5.0, 40.0, 35.0)) for entry in clip.result.tube))
    low = replace(high, tube=tuple(replace(entry, box=(10.0, 90.0, 40.0, 120.0)) for entry in high.tube))
    for result, dark in ((high, slice(96, 118)), (low, slice(0, 22))):
        drawn = decode_frames(annotate_video(clip.video, result, tmp_path / "a.mp4"), [0]).numpy()[0]
        assert np.median(drawn[dark]) < 60
        assert np.median(drawn[40:90]) > 60


def test_text_is_wrapped_and_cut() -> None:
    font = load_font(10)
    assert wrap_text("one two", font, 1000, 2) == ["one two"]
    lines = wrap_text("the quick brown fox jumps over the lazy dog again and again", font, 100, 2)
    assert len(lines) == 2
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 100 for line in lines)
    unbroken = wrap_text("x" * 100, font, 100, 3)
    assert len(unbroken) == 3
    assert all(font.getlength(line) <= 100 for line in unbroken)
    assert draw_caption("a sentence", 24, 24, margin=4) is None
    band = draw_caption("a sentence of several words", 128, 128, margin=4)
    assert band is not None
    assert band.shape[1:] == (128, 4)
    assert len(band) < 40


def test_errors(make_clip: Callable, tmp_path: Path) -> None:
    clip = make_clip()
    with pytest.raises(VideoError):
        annotate_video(tmp_path / "none.mp4", clip.result, tmp_path / "a.mp4")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        annotate_video(clip.video, clip.result, tmp_path / "folder")
