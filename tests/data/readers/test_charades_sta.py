"""Charades-STA lines."""

from __future__ import annotations

import pytest

from bridge_stg.data import align_to_video, probe
from bridge_stg.data.readers import Dataset, read_charades_sta
from bridge_stg.data.time_base import has_time_base
from bridge_stg.errors import SampleError

from ..media import encode


def test_lines_become_intervals_and_broken_ones_are_skipped(tmp_path):
    path = tmp_path / "test.txt"
    path.write_text(
        "AO8RW 0.0 6.9##a person is putting a book on a shelf.\n\n"
        "Y6R7T 20.8##person plays.\nY6R7T 30.0 20.8##person plays.\nY6R7T x 3##person plays.\nY6R7T 1 2##\n"
        "Y6R7T 20.8 30.0##person plays.\nY6R7T 0 1_0##person plays.\nY6R7T ١ ٢##person plays.\n",
        encoding="utf-8",
    )
    data = Dataset.collect(read_charades_sta(path))
    assert [(s.id, s.video, s.interval, s.task) for s in data.samples] == [
        ("AO8RW-1", "AO8RW.mp4", (0.0, 6.9), "temporal"),
        ("Y6R7T-7", "Y6R7T.mp4", (20.8, 30.0), "temporal"),
    ]
    assert data.samples[0].interval_frames == (0, 69) and not has_time_base(data.samples[0])
    assert [(p.id, p.reason.split(",")[0]) for p in data.skipped] == [
        ("line 3", "a line must be <video> <start> <end>##<sentence>"),
        ("line 4", "interval must have 0 <= start < end (seconds)"),
        ("line 5", "start and end must be seconds"),
        ("line 6", "sentence must be a non-empty text"),
        ("line 8", "start and end must be seconds"),
        ("line 9", "start and end must be seconds"),
    ]


def test_the_video_brings_the_time_base(tmp_path):
    encode(tmp_path / "AO8RW.mp4", 60)
    path = tmp_path / "a.txt"
    path.write_text("AO8RW 0.5 2.0##a person opens a door.\nAO8RW 0.5 9.0##a person opens a door.\n")
    found, long = Dataset.collect(read_charades_sta(path, tmp_path)).samples
    info = probe(found.video)
    aligned = align_to_video(found, info)
    assert (aligned.fps, aligned.frame_count, aligned.width, aligned.height) == (25.0, 60, 96, 64)
    assert aligned.interval == (0.5, 2.0) and has_time_base(aligned)
    assert align_to_video(long, info).interval == (0.5, pytest.approx(2.4))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(SampleError, match="holds no line"):
        list(read_charades_sta(tmp_path / "empty.txt"))
    with pytest.raises(SampleError, match="No such file"):
        list(read_charades_sta(tmp_path / "none.txt"))
