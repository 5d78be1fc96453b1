"""Clips: which frames of a video, on which clock, and what is refused."""

import numpy as np
import pytest

from bridge_stg.data import decode_frames, load_clip, probe, write_video
from bridge_stg.errors import VideoError


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "v.mp4"
    frames = np.arange(50, dtype=np.uint8)[:, None, None, None] * 5 + np.zeros((50, 32, 48, 3), dtype=np.uint8)
    write_video(path, frames, fps=25)
    return path


def test_a_clip_is_the_chosen_frames_of_the_video(video):
    clip = load_clip(video, fps=5, max_frames=64)
    assert clip.source_frames.tolist() == list(range(0, 50, 5))
    assert clip.begin == 0 and clip.duration == clip.info.duration == pytest.approx(2)
    np.testing.assert_allclose(clip.times, clip.info.times[clip.source_frames])
    assert (clip.frames == decode_frames(video, clip.source_frames)).all()


def test_a_segment_has_a_clock_of_its_own(video):
    info = probe(video)
    clip = load_clip(info, segment=(10, 35), fps=5, max_frames=64)
    assert clip.info is info
    assert clip.source_frames.tolist() == [10, 15, 20, 25, 30, 30]  # an even count
    assert clip.times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert clip.begin == pytest.approx(0.4) and clip.duration == pytest.approx(1)
    assert load_clip(info, segment=(40, 90), fps=5, max_frames=64).duration == pytest.approx(0.4)  # cut at the end
    assert load_clip(info, segment=(7, 8), fps=5, max_frames=1, multiple=1).source_frames.tolist() == [7]


@pytest.mark.parametrize("segment", [(50, 60), (5, 5), (-1, 4)])
def test_a_segment_without_frames_is_refused(video, segment):
    with pytest.raises(ValueError, match=r"segment must have 0 <= start < end <= 50 \(frames\), got"):
        load_clip(video, segment=segment, fps=5, max_frames=8)


def test_a_shape_that_no_vision_tower_takes_is_refused(tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, np.zeros((2, 2, 2048, 3), dtype=np.uint8), fps=25)
    with pytest.raises(VideoError, match="2048 x 2 pixels; one side may be at most 200 times the other"):
        load_clip(path, fps=5, max_frames=8)
