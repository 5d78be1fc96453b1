from __future__ import annotations

import numpy as np
import pytest
import torch

from bridge_stg.data import decode_frames, probe, write_video
from bridge_stg.errors import OutputError

from .media import numbered_frame, read_numbers


@pytest.mark.parametrize("size", [(64, 96), (63, 95), (1, 1)])
def test_size_and_count_survive(tmp_path, size):
    path = tmp_path / "clip.mp4"
    pictures = [np.full((*size, 3), 20 * number, np.uint8) for number in range(7)]
    assert write_video(path, iter(pictures), fps=30000 / 1001) == 7
    info = probe(path)
    assert (info.height, info.width, info.frame_count) == (*size, 7)
    assert info.fps == pytest.approx(30000 / 1001)
    decoded = decode_frames(info, range(7)).float().mean((1, 2, 3))
    assert torch.allclose(decoded, 20.0 * torch.arange(7), atol=3)


def test_variable_times_survive(tmp_path):
    times = np.array([3.0, 3.04, 3.5, 3.51, 6.0])
    write_video(tmp_path / "clip.mp4", (torch.from_numpy(numbered_frame(n)) for n in range(5)), times=times)
    info = probe(tmp_path / "clip.mp4")
    np.testing.assert_allclose(info.times, times - 3.0, atol=1e-4)
    assert read_numbers(decode_frames(info, range(5))) == list(range(5))


def test_output_is_the_same_every_time(tmp_path):
    pictures = [numbered_frame(number) for number in range(10)]
    write_video(tmp_path / "a.mp4", pictures, fps=4)
    write_video(tmp_path / "b.mp4", pictures, fps=4)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("pictures", "clock", "rule"),
    [
        ([numbered_frame(0)], {}, "exactly one of fps and times"),
        ([numbered_frame(0)], {"fps": 4, "times": [0.0]}, "exactly one of fps and times"),
        ([], {"fps": 4}, "at least one frame"),
        ([numbered_frame(0)], {"fps": 0}, "fps must be positive"),
        ([numbered_frame(0)] * 2, {"times": [0.0]}, "a value for each frame"),
        ([numbered_frame(0)] * 2, {"times": [1.0, 1.0]}, "ascending"),
        ([numbered_frame(0), numbered_frame(0)[:32]], {"fps": 4}, "of one size"),
        ([numbered_frame(0).astype(np.float32)], {"fps": 4}, "uint8"),
        ([numbered_frame(0)[..., 0]], {"fps": 4}, "uint8"),
    ],
)
def test_misuse_leaves_nothing_behind(tmp_path, pictures, clock, rule):
    with pytest.raises(ValueError, match=rule):
        write_video(tmp_path / "clip.mp4", pictures, **clock)
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("old")

    def broken():
        yield numbered_frame(0)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_video(path, broken(), fps=4)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["clip.mp4"]


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OutputError, match=r"folder\.mp4 cannot be written"):
        write_video(tmp_path / "folder.mp4", [numbered_frame(0)], fps=4)
    with pytest.raises(OutputError, match=r"wide\.mp4 cannot be encoded as H\.264"):
        write_video(tmp_path / "wide.mp4", [np.zeros((16, 20000, 3), np.uint8)], fps=4)
    assert [item.name for item in tmp_path.iterdir()] == ["folder.mp4"]
