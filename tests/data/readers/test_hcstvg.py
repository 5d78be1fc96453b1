"""HC-STVG, versions 1 and 2."""

from __future__ import annotations

import pytest

from bridge_stg.data.readers import Dataset, read_hcstvg_v1, read_hcstvg_v2
from bridge_stg.errors import SampleError

from .published import hcstvg_record, write_json

READERS = {1: read_hcstvg_v1, 2: read_hcstvg_v2}


def read(tmp_path, record, version=1, **options):
    return Dataset.collect(READERS[version](write_json(tmp_path / "a.json", {"55_a.mp4": record}), **options))


@pytest.mark.parametrize("version", [1, 2])
def test_a_record_is_a_sample(tmp_path, version):
    data = read(tmp_path, hcstvg_record(version), version)
    assert not data.skipped and not data.notes
    (sample,) = data.samples
    assert (sample.id, sample.video) == ("55_a.mp4", "55_a.mp4")
    assert sample.sentence == "The man stands up and raises his hand."
    assert (sample.width, sample.height, sample.fps, sample.frame_count) == (704, 480, 25.0, 500)
    # st_frame is 1-based: the 61st frame is frame 60.
    assert sample.interval_frames == (60, 110) and sample.interval == (2.4, 4.4)
    assert list(sample.boxes) == list(range(60, 110))
    assert sample.boxes[60] == (100, 40, 250, 340)
    assert sample.segment is None and sample.sentence_type == "declarative"


def test_conventions_of_public_code(tmp_path):
    tubedetr = read(tmp_path, hcstvg_record(), convention="tubedetr").samples[0]
    assert tubedetr.interval_frames == (61, 111) and min(tubedetr.boxes) == 61 and tubedetr.segment == (0, 499)
    stcat = read(tmp_path, hcstvg_record(), convention="stcat").samples[0]
    assert stcat.interval_frames == (60, 109) and max(stcat.boxes) == 109 and stcat.segment is None
    last = hcstvg_record(st_frame=451, st_time=18.0, ed_time=20.0)
    assert read(tmp_path, last).samples[0].interval_frames == (450, 500)
    assert read(tmp_path, last, convention="tubedetr").samples[0].interval_frames == (451, 500)


def test_times_that_disagree_with_the_tube_are_noted(tmp_path):
    data = read(tmp_path, hcstvg_record(ed_time=5.3))
    assert data.samples[0].interval == (2.4, 4.4)
    assert data.notes[0].reason.startswith("the tube says 2.40 to 4.40 s, st_time and ed_time say 2.40 to 5.30 s")
    assert "must be seconds" in read(tmp_path, hcstvg_record(ed_time=None)).notes[0].reason


def test_an_end_frame_of_version_2_is_checked(tmp_path):
    assert read(tmp_path, hcstvg_record(2, ed_frame=110), 2).samples
    data = read(tmp_path, hcstvg_record(2, ed_frame=112), 2)
    assert data.skipped[0].reason == "ed_frame is 112, but 50 boxes from 61 end at 110."


@pytest.mark.parametrize(
    ("version", "change", "reason"),
    [
        (1, {"bbox": []}, "bbox of an HC-STVG record must be an array of boxes [x, y, w, h], got []."),
        (1, {"bbox": [[1, 2, 3]]}, "the box of frame 61 (1-based) must be four numbers [x, y, w, h], got [1, 2, 3]."),
        (1, {"bbox": [[1, 2, 3, 4], [1, 2, -3, 4]]}, "the box of frame 62 (1-based) must have w >= 0 and h >= 0"),
        (1, {"bbox": [[1, 2, None, 4]]}, "must be four numbers"),
        (1, {"st_frame": 0}, "st_frame of an HC-STVG record must be a whole number of at least 1, got 0."),
        (1, {"st_frame": 460}, "the tube ends at frame 509, but the clip has 500 frames."),
        (1, {"img_num": 0}, "img_num of an HC-STVG record must be a whole number of at least 1, got 0."),
        (1, {"caption": ""}, "sentence must be a non-empty text"),
        (1, {"height": None}, "height must be a whole number of at least 1, got None."),
        (2, {"img_size": 480}, "img_size must be [height, width], got 480."),
    ],
)
def test_broken_records_are_skipped_with_a_reason(tmp_path, version, change, reason):
    data = read(tmp_path, hcstvg_record(version, **change), version)
    assert not data.samples
    assert reason in data.skipped[0].reason and data.skipped[0].id == "55_a.mp4"


def test_queries_without_boxes_and_the_other_version(tmp_path):
    queries = read(tmp_path, {"English": "a man", "Chinese": ""}, 2)
    assert queries.skipped[0].reason.startswith("an HC-STVG record has no key 'bbox', 'st_time'")
    other = read(tmp_path, hcstvg_record(2), 1)
    assert "no key 'caption', 'width', 'height'" in other.skipped[0].reason
    assert read(tmp_path, 5).skipped[0].reason == "an HC-STVG record must be a JSON object, got int."
    assert "unknown key 'mood'" in read(tmp_path, hcstvg_record(mood=1)).notes[0].reason
    with pytest.raises(SampleError, match="it must hold a JSON object, got list"):
        list(read_hcstvg_v1(write_json(tmp_path / "b.json", [])))
