"""What `data check` and `data stats` find."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from bridge_stg.data import GroundingSample, check_dataset
from bridge_stg.data.readers import Problem
from bridge_stg.data.statistics import measure_dataset

from .media import cut, encode


def make(id="a", **changes):
    values = {"id": id, "video": "v.mp4", "sentence": "the dog jumps", "width": 96, "height": 64, "fps": 25.0}
    values |= {"frame_count": 60, "interval": (0.4, 0.8), "boxes": dict.fromkeys(range(10, 20), (1.0, 2.0, 31.0, 34.0))}
    return GroundingSample(**(values | changes))


def test_a_sound_dataset(tmp_path):
    video = str(encode(tmp_path / "v.mp4", 60))
    report = check_dataset([make(video=video), make("b", video=video, sentence_type="interrogative")], videos=True)
    assert report.ok and report.notes == []
    found = report.to_dict()
    assert found == json.loads(json.dumps(found))
    assert found["counts"] == {
        "samples": 2,
        "declarative": 1,
        "interrogative": 1,
        "with_interval": 2,
        "with_boxes": 2,
        "boxes": 20,
        "task stvg": 2,
        "videos": 1,
    }


def test_every_kind_of_finding(tmp_path):
    whole = encode(tmp_path / "v.mp4", 60)
    broken = str(cut(whole, tmp_path / "cut.mp4"))
    (tmp_path / "empty.mp4").touch()
    gone, video = str(tmp_path / "gone.mp4"), str(whole)
    items = [
        Problem("record 0", "it is broken."),
        Problem("x", "odd.", skipped=False),
        make("a", video=gone),
        make("b", video=gone),
        make("c", video=broken),
        make("d", video=str(tmp_path / "empty.mp4")),
        make("e", video=video, boxes={3: (0.0, 0.0, 9.0, 9.0), 5: (-4.0, 0.0, 9.0, 70.0), 7: (0.0, 0.0, 96.4, 9.0)}),
        make("f", video=video, interval=(1.0, 2.5)),
        make("g", video=video, segment=(15, 40)),
    ]
    report = check_dataset(items, videos=True)
    assert not report.ok
    assert report.skipped == [{"id": "record 0", "reason": "it is broken."}]
    assert report.notes == [{"id": "x", "reason": "odd."}]
    assert report.missing_videos == [{"video": gone, "samples": 2}]
    assert [(entry["video"], entry["samples"]) for entry in report.corrupt_videos] == [
        (broken, 1),
        (str(tmp_path / "empty.mp4"), 1),
    ]
    assert "cut.mp4" in report.corrupt_videos[0]["reason"]
    # Half a pixel is rounding; the worst box leaves the frame by 6 pixels at the bottom.
    assert report.boxes_outside_frame == [{"id": "e", "frames": 1, "first_frame": 5, "pixels": 6.0}]
    assert report.intervals_outside_clip == [
        {"id": "f", "reason": "the event lasts from 1.00 to 2.50 s, the clip from 0.00 to 2.40 s."},
        {"id": "g", "reason": "the event lasts from 0.40 to 0.80 s, the clip from 0.60 to 1.60 s."},
    ]
    assert report.samples == 7 and report.counts["videos"] == 4


def test_a_video_that_is_not_what_the_annotation_says(tmp_path):
    video = str(encode(tmp_path / "v.mp4", 60))
    sample = make(video=video, frame_count=100, width=192, height=128, interval=(1.0, 3.0))
    report = check_dataset([sample], videos=True)
    assert [note["reason"].split("mp4 ")[1] for note in report.notes] == [
        "lasts 2.40 s, the annotation takes it for 4.00 s.",
        "measures 96 x 64, the annotation takes it for 192 x 128.",
    ]
    assert report.intervals_outside_clip[0]["reason"].endswith("the video from 0.00 to 2.40 s.")
    # A frame or two less than announced break nothing.
    close = make(video=video, fps=30.05, frame_count=73, interval=(1.0, 73 / 30.05))
    assert check_dataset([close], videos=True).ok


def test_videos_are_not_looked_at_unless_asked():
    report = check_dataset([make()])
    assert report.ok and not report.videos_checked
    assert not check_dataset([]).ok


def test_measures():
    statistics = measure_dataset(
        [
            make(segment=(10, 35), boxes={12: (0.0, 0.0, 48.0, 64.0)}),
            make("b", sentence="dog", sentence_type="interrogative", interval=None, boxes={}),
            Problem("x", "broken."),
            make("c", width=1, height=1, interval=(2.0, 6.0), boxes={}, task="temporal"),
        ]
    )
    assert statistics.counts == {
        "samples": 3,
        "skipped": 1,
        "declarative": 2,
        "interrogative": 1,
        "task stvg": 2,
        "task temporal": 1,
        "videos": 1,
    }
    np.testing.assert_allclose(statistics.values["clip_seconds"], [1.0, 2.4])
    np.testing.assert_allclose(statistics.values["event_seconds"], [0.4, 4.0])
    np.testing.assert_allclose(statistics.values["event_share"], [0.4])
    np.testing.assert_allclose(statistics.values["event_start"], [0.0])
    np.testing.assert_allclose(statistics.values["box_share"], [0.5])
    summary = statistics.to_dict()["measures"]
    assert summary["words"] == {
        "count": 3,
        "mean": 2.3333,
        "median": 3.0,
        "p5": 1.2,
        "p95": 3.0,
        "min": 1.0,
        "max": 3.0,
    }


def test_charts(tmp_path):
    from bridge_stg.visualization.dataset_charts import draw_statistics

    draw_statistics(measure_dataset([make(), make("b")]), tmp_path / "s.png", "made")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"a chart must be a \.png, \.svg or \.pdf, got 's\.txt'"):
        draw_statistics(measure_dataset([]), "s.txt")


@pytest.mark.parametrize(
    "title", ["$x^$", "50$ or 60$", "\\frac{", "中文 \U0001f600", "a\x00\x1b[31m\n\ud800", "x" * 5_000]
)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_title_is_drawn_as_it_is(tmp_path, title, suffix):
    from bridge_stg.visualization.dataset_charts import draw_statistics

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_statistics(measure_dataset([make()]), tmp_path / f"s.{suffix}", title)
    assert (tmp_path / f"s.{suffix}").stat().st_size > 1_000


def test_the_farthest_values_are_measured_and_drawn(tmp_path):
    from bridge_stg.visualization.dataset_charts import draw_statistics

    far = GroundingSample(
        "a", "v.mp4", "w " * 200_000, 2, 16384, 25.0, 2**31 - 1, interval=(1e7, 8e7), boxes={0: (-1e6, -1e6, 1e6, 1e6)}
    )
    found = measure_dataset([far])
    json.dumps(found.to_dict(), allow_nan=False)
    draw_statistics(found, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1_000
