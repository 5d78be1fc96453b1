"""VidSTG with VidOR boxes."""

from __future__ import annotations

import pytest

from bridge_stg.data.readers import Dataset, VidORBoxes, read_vidstg
from bridge_stg.errors import SampleError

from .published import moving, vidor_video, vidstg_record, write_json

FULL = {0: moving(range(50)), 1: moving(range(5, 45))}


def read(tmp_path, *records, tracks=FULL, **options):
    path = write_json(tmp_path / "test_annotations.json", list(records))
    boxes = None
    if tracks is not None:
        write_json(tmp_path / "vidor" / "1001" / "7771650716.json", vidor_video(tracks))
        boxes = tmp_path / "vidor"
    return Dataset.collect(read_vidstg(path, boxes, **options))


def test_a_sentence_is_a_sample(tmp_path):
    data = read(tmp_path, vidstg_record())
    assert not data.skipped and not data.notes
    assert [s.id for s in data.samples] == [
        f"7771650716-0-{name}" for name in ("caption-0", "question-0", "question-1")
    ]
    assert [s.sentence_type for s in data.samples] == ["declarative", "interrogative", "interrogative"]
    first = data.samples[0]
    assert first.sentence == "a dog watches a man."
    assert first.video == "1001/7771650716.mp4"
    # used_segment ends inclusive, temporal_gt exclusive.
    assert first.segment == (10, 40)
    assert first.interval_frames == (15, 25) and first.interval == (0.6, 1.0)
    assert list(first.boxes) == list(range(15, 25))
    assert first.boxes[15] == (15, 20, 45, 60)
    assert (first.width, first.height, first.fps, first.frame_count) == (640, 360, 25, 50)


def test_without_boxes_the_times_remain(tmp_path):
    data = read(tmp_path, vidstg_record(), tracks=None)
    assert len(data.samples) == 3 and not any(s.boxes for s in data.samples)
    assert data.samples[0].video == "7771650716.mp4"


def test_videos_are_found_by_path_or_by_name(tmp_path):
    (tmp_path / "videos" / "elsewhere").mkdir(parents=True)
    (tmp_path / "videos" / "elsewhere" / "7771650716.mkv").touch()
    data = read(tmp_path, vidstg_record(), videos=tmp_path / "videos")
    assert data.samples[0].video == str(tmp_path / "videos" / "elsewhere" / "7771650716.mkv")
    (tmp_path / "videos" / "1001").mkdir()
    (tmp_path / "videos" / "1001" / "7771650716.mp4").touch()
    data = read(tmp_path, vidstg_record(), videos=tmp_path / "videos")
    assert data.samples[0].video == str(tmp_path / "videos" / "1001" / "7771650716.mp4")


def test_conventions_of_public_code(tmp_path):
    tubedetr = read(tmp_path, vidstg_record(), convention="tubedetr").samples[0]
    assert tubedetr.segment == (10, 39) and tubedetr.interval_frames == (15, 25) and max(tubedetr.boxes) == 24
    stcat = read(tmp_path, vidstg_record(), convention="stcat").samples[0]
    assert stcat.interval_frames == (15, 25) and max(stcat.boxes) == 25
    # An event up to the clip's last frame, which is the video's last too: STCAT's is one frame short.
    late = vidstg_record(
        used_segment={"begin_fid": 10, "end_fid": 49}, temporal_gt={"begin_fid": 40, "end_fid": 50}, questions=[]
    )
    stcat = read(tmp_path, late, convention="stcat").samples[0]
    assert stcat.interval_frames == (40, 49) and max(stcat.boxes) == 49
    # The same where the video goes on: STCAT finds one box too many and drops the record.
    spoiled = vidstg_record(temporal_gt={"begin_fid": 30, "end_fid": 40}, questions=[])
    data = read(tmp_path, spoiled, convention="stcat")
    assert not data.samples and "STCAT leaves this record" in data.skipped[0].reason
    # A trajectory that stops at the event's end: STCAT repeats its last box.
    stcat = read(tmp_path, vidstg_record(questions=[]), tracks={0: moving(range(25))}, convention="stcat").samples[0]
    assert stcat.boxes[25] == stcat.boxes[24]


def test_a_tube_with_holes_is_noted(tmp_path):
    data = read(tmp_path, vidstg_record(questions=[]), tracks={0: moving(range(18, 50))})
    assert list(data.samples[0].boxes) == list(range(18, 25))
    assert data.notes[0].reason == "3 of the 10 frames of the event have no box."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"temporal_gt": {"begin_fid": 15, "end_fid": 51}}, "temporal_gt must have begin < end <= 50 frames"),
        ({"temporal_gt": {"begin_fid": 25, "end_fid": 25}}, "temporal_gt must have begin < end"),
        ({"temporal_gt": {"begin_fid": 40, "end_fid": 45}}, "lies outside its used_segment 10..39"),
        ({"temporal_gt": {"begin_fid": 15}}, "temporal_gt has no key 'end_fid'; it needs begin_fid, end_fid."),
        ({"used_segment": {"begin_fid": 10, "end_fid": 50}}, "used_segment must lie in frames 0..49"),
        ({"used_segment": {"begin_fid": -1, "end_fid": 9}}, "begin_fid of used_segment must be a whole number"),
        ({"used_segment": None}, "used_segment must be a JSON object, got NoneType."),
        ({"fps": 0}, "fps must be a positive number"),
        ({"width": "640"}, "width must be a whole number of at least 1, got '640'."),
        ({"frame_count": None}, "frame_count of a VidSTG record must be a whole number of at least 1, got None."),
        ({"vid": 5}, "vid of a VidSTG record must be a non-empty text, got 5."),
        ({"vid": "1"}, "has no VidOR file of video '1', so its boxes are unknown."),
        ({"captions": "a dog"}, "captions of a VidSTG record must be an array, got str."),
        ({"captions": [{"description": "x"}]}, "a sentence in captions has no key 'target_id'"),
        ({"captions": [{"description": " ", "target_id": 0}]}, "sentence must be a non-empty text"),
        ({"captions": [{"description": 3, "target_id": 0}]}, "sentence must be a non-empty text, got 3"),
        ({"captions": [{"description": "x", "target_id": 9}]}, "VidOR has no box of trajectory 9 in frames 15..25"),
    ],
)
def test_broken_records_are_skipped_with_a_reason(tmp_path, change, reason):
    good = vidstg_record()
    data = read(tmp_path, vidstg_record(questions=[], **change), good)
    assert [sample.id.split("-")[1] for sample in data.samples] == ["1", "1", "1"]
    assert len(data.skipped) == 1
    assert reason in data.skipped[0].reason
    assert data.skipped[0].reason.endswith(".")


def test_a_box_of_negative_size_is_one_sentence(tmp_path):
    tracks = {0: {**moving(range(50)), 17: (30, 20, 10, 60)}}
    data = read(tmp_path, vidstg_record(questions=[]), tracks=tracks)
    assert "the box of frame 17 must have x2 >= x1 and y2 >= y1, got (30, 20, 10, 60)." in data.skipped[0].reason


def test_unknown_keys_are_noted_and_missing_ones_skip(tmp_path):
    record = vidstg_record(weather="rain")
    del record["fps"]
    data = read(tmp_path, record, vidstg_record(mood="good"))
    assert len(data.samples) == 3
    assert data.notes[0].reason.startswith("unknown key 'weather' is not read; the format has captions, fps")
    assert data.notes[1].reason.startswith("unknown key 'mood'")
    assert data.skipped[0].reason.startswith("a VidSTG record has no key 'fps'; it needs vid, fps")


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text('[{"vid": "1", ')
    with pytest.raises(SampleError, match=r"cut\.json cannot be read as VidSTG annotations: .*\(column"):
        list(read_vidstg(path))
    with pytest.raises(
        SampleError, match=r"cannot be read as VidSTG annotations: it must hold a JSON array, got dict\."
    ):
        list(read_vidstg(write_json(tmp_path / "v1.json", {})))
    with pytest.raises(SampleError, match="No such file"):
        list(read_vidstg(tmp_path / "none.json"))
    with pytest.raises(SampleError, match="does not exist; VidOR boxes are a folder"):
        VidORBoxes(tmp_path / "none")
    with pytest.raises(SampleError, match="none is not a folder; the videos are looked for in it"):
        read(tmp_path, vidstg_record(), videos=tmp_path / "none")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"video_id": "1"}, "has no key 'trajectories'"),
        ({"trajectories": {}}, "must be an array with one entry a frame"),
        ({"trajectories": [[{"tid": 0}]]}, "an object in frame 0 of .* has no key 'bbox'"),
        ({"trajectories": [[{"tid": 0, "bbox": {"xmin": 1}}]]}, "a box in frame 0 of .* has no key 'ymin'"),
    ],
)
def test_broken_vidor_files(tmp_path, value, reason):
    boxes = VidORBoxes(write_json(tmp_path / "7771650716.json", value))
    with pytest.raises(SampleError, match=reason):
        boxes.video("7771650716")
