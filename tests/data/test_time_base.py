"""Annotated frames and decoded frames meet in time."""

from __future__ import annotations

import numpy as np
import pytest

from bridge_stg.data import GroundingSample, VideoInfo, align_to_video
from bridge_stg.errors import SampleError


def video(times, width=704, height=480):
    times = np.asarray(times, dtype=np.float64)
    fps = (len(times) - 1) / times[-1] if len(times) > 1 else 1.0
    return VideoInfo("v.mp4", width, height, fps, len(times), float(times[-1]) + 1 / fps, times)


def sample(**changes):
    """HC-STVG's idea of a 20-s clip at 30.05 frames a second; frame f's box begins at x = f."""
    values = {"id": "a", "video": "v.mp4", "sentence": "a man", "width": 704, "height": 480, "fps": 601 / 20}
    values |= {"frame_count": 601, "interval": (100 * 20 / 601, 160 * 20 / 601)}
    values |= {"boxes": {f: (float(f), 0.0, f + 9.0, 9.0) for f in range(100, 160)}}
    return GroundingSample(**(values | changes))


def test_599_frames_decoded_of_601_announced():
    aligned = align_to_video(sample(), video(np.arange(599) / 29.97))
    assert (aligned.frame_count, round(aligned.fps, 2)) == (599, 29.97)
    assert aligned.interval == sample().interval
    for frame, box in aligned.boxes.items():
        assert abs(box[0] / (601 / 20) - frame / 29.97) <= 0.5 / (601 / 20) + 1e-9
    start, end = aligned.interval_frames
    assert set(range(start + 1, end - 1)) <= set(aligned.boxes) <= set(range(start - 1, end + 1))


def test_half_and_double_rate():
    half = align_to_video(sample(fps=30.0, interval=(100 / 30, 160 / 30)), video(np.arange(300) / 15))
    assert sorted(half.boxes) == list(range(50, 80)) and half.boxes[50][0] == 100.0
    double = align_to_video(sample(fps=30.0, interval=(100 / 30, 160 / 30)), video(np.arange(1200) / 60))
    assert double.interval_frames == (200, 320)
    assert set(range(200, 319)) <= set(double.boxes)


def test_uneven_frame_times():
    times = np.cumsum([0.0, *([0.02] * 100), *([0.08] * 100)])
    aligned = align_to_video(sample(fps=25.0, frame_count=250, interval=(4.0, 6.4)), video(times))
    for frame, box in aligned.boxes.items():
        assert abs(box[0] / 25.0 - times[frame]) <= 0.02 + 1e-9


def test_segments_move_and_sizes_scale():
    aligned = align_to_video(sample(fps=30.0, segment=(90, 180)), video(np.arange(300) / 15, 352, 240))
    assert aligned.segment == (45, 90)
    assert aligned.boxes[50] == (50.0, 0.0, 54.5, 4.5)
    assert (aligned.width, aligned.height) == (352, 240)


def test_a_short_video_cuts_the_event_or_refuses_it():
    short = video(np.arange(120) / 30)
    aligned = align_to_video(sample(fps=30.0, interval=(100 / 30, 160 / 30)), short)
    assert aligned.interval == (100 / 30, pytest.approx(4.0)) and max(aligned.boxes) == 119
    with pytest.raises(SampleError, match=r"the event begins at 5\.00 s, but the video v\.mp4 ends at 4\.00 s\."):
        align_to_video(sample(fps=30.0, interval=(5.0, 6.0), boxes={}), short)
    with pytest.raises(SampleError, match=r"the segment begins at 6\.67 s"):
        align_to_video(sample(fps=30.0, interval=(1.0, 2.0), segment=(200, 300), boxes={}), short)


def test_an_image_keeps_its_frame():
    still = sample(task="referring", fps=1.0, frame_count=1, interval=None, boxes={0: (0.0, 0.0, 70.4, 48.0)})
    aligned = align_to_video(still, video([0.0], 1408, 960))
    assert aligned.boxes == {0: (0.0, 0.0, 140.8, 96.0)} and aligned.fps == 1.0
