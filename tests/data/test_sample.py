from __future__ import annotations

import json

import pytest

from bridge_stg.data import GroundingSample, read_samples, write_samples
from bridge_stg.errors import OutputError, SampleError

RECORD = {
    "id": "a",
    "video": "clips/a.mp4",
    "width": 64,
    "height": 48,
    "fps": 4.0,
    "frame_count": 24,
    "task": "stvg",
    "sentence": "the red circle that moves left",
    "sentence_type": "declarative",
    "tier": "twins",
    "segment": [2, 20],
    "interval": [4, 10],
    "boxes": {"4": [1.0, 2.0, 30.5, 40.0], "5": [2.0, 2.0, 31.5, 40.0]},
}


def test_record_round_trip():
    sample = GroundingSample.from_record(RECORD)
    assert sample.interval == (1.0, 2.5)
    assert sample.interval_frames == (4, 10)
    assert sample.segment == (2, 20)
    assert sample.boxes[5] == (2.0, 2.0, 31.5, 40.0)
    assert sample.to_record() == RECORD


def test_a_line_ends_where_json_lines_end(tmp_path):
    sample = GroundingSample.from_record(RECORD | {"sentence": "one\u2028two\x85three"}, root=tmp_path)
    write_samples(tmp_path / "a.jsonl", [sample])
    assert read_samples(tmp_path / "a.jsonl") == [sample]


def test_absent_labels_are_absent_keys():
    sample = GroundingSample("q", "v.mp4", "what is it?", 8, 8, 5.0, 3, task="qa", answer="a dog")
    record = sample.to_record()
    assert record["answer"] == "a dog"
    assert not {"interval", "boxes", "segment", "tier"} & set(record)
    assert GroundingSample.from_record(record) == sample


def test_interval_shorter_than_a_frame_keeps_one_frame():
    sample = GroundingSample("t", "v.mp4", "it jumps", 8, 8, 1.0, 30, task="temporal", interval=(3.1, 3.3))
    assert sample.interval_frames == (3, 4)
    assert GroundingSample.from_record(sample.to_record()).interval == (3.0, 4.0)


def test_files_round_trip_with_relative_videos(tmp_path):
    inside = GroundingSample.from_record(RECORD, root=tmp_path)
    elsewhere = GroundingSample.from_record({**RECORD, "id": "b", "video": "/somewhere/else.mp4"})
    path = tmp_path / "test.jsonl"
    write_samples(path, [inside, elsewhere])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["video"] for line in lines] == ["clips/a.mp4", "/somewhere/else.mp4"]
    assert read_samples(path) == [inside, elsewhere]
    assert read_samples(path)[0].video == str(tmp_path / "clips" / "a.mp4")


def test_blank_lines_and_other_alphabets_are_fine(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("\n" + json.dumps({**RECORD, "sentence": "красный круг"}, ensure_ascii=False) + "\n\n", "utf-8")
    assert read_samples(path)[0].sentence == "красный круг"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"sentence": "  "}, "sentence must be a non-empty text, got '  '"),
        ({"video": ""}, "video must be a non-empty text"),
        ({"id": 3}, "id must be a non-empty text, got 3"),
        ({"colour": 1, "boxs": {}}, "unknown key 'boxs', 'colour'; allowed are id, video"),
        ({"interval": [10, 10]}, r"interval must have 0 <= start < end \(seconds\), got \(2\.5, 2\.5\)"),
        ({"interval": [-1, 10]}, "interval must have 0 <= start"),
        ({"interval": [1, 2, 3]}, r"interval must be two numbers \[start, end\]"),
        ({"interval": [1, float("nan")]}, "interval must be two numbers"),
        ({"segment": [3, 25]}, r"segment must have 0 <= start < end <= 24 \(frames\), got \(3, 25\)"),
        ({"boxes": {"4": [9, 9, 5, 20]}}, "the box of frame 4 must have x2 >= x1 and y2 >= y1"),
        ({"boxes": {"4": [9, 9, 5]}}, "the box of frame 4 must be four numbers"),
        ({"boxes": {"24": [0, 0, 1, 1]}}, r"boxes must be keyed by frames in 0\.\.23, got 24"),
        ({"boxes": {"four": [0, 0, 1, 1]}}, "boxes must be keyed by frame numbers, got 'four'"),
        ({"boxes": [[0, 0, 1, 1]]}, "boxes must be an object"),
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"frame_count": 2.5}, "frame_count must be a whole number"),
        ({"fps": 0}, "fps must be a positive number"),
        ({"fps": "4"}, "fps must be a positive number"),
        ({"task": "tracking"}, "task must be one of stvg, temporal, referring, qa, got 'tracking'"),
        ({"sentence_type": "imperative"}, "sentence_type must be one of declarative, interrogative"),
        ({"answer": 7}, "answer must be a text, got 7"),
    ],
)
def test_broken_records_name_file_line_and_rule(tmp_path, change, rule):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + json.dumps({**RECORD, "id": "b", **change}) + "\n")
    with pytest.raises(SampleError, match=rule) as caught:
        read_samples(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            json.dumps(RECORD) + "\n" + json.dumps(RECORD)[:-20],
            r":2: not JSON that can be read: .+\(column \d+\)",
        ),
        (json.dumps(RECORD) + "\n" + json.dumps(RECORD), ":2: id 'a' was already used in line 1"),
        ("[1, 2]", ":1: a record must be a JSON object, got list"),
        (json.dumps({"id": "a", "video": "a.mp4"}), ":1: missing key 'width', 'height', 'fps'"),
        ("\n\n", "holds no record"),
    ],
)
def test_broken_files(tmp_path, text, rule):
    path = tmp_path / "test.jsonl"
    path.write_text(text)
    with pytest.raises(SampleError, match=rule):
        read_samples(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(SampleError, match="cannot be read as an annotation file: No such file"):
        read_samples(tmp_path / "missing.jsonl")
    with pytest.raises(SampleError, match="cannot be read as an annotation file: Is a directory"):
        read_samples(tmp_path)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SampleError, match=r"binary\.jsonl:1: not UTF-8 text"):
        read_samples(tmp_path / "binary.jsonl")


def test_unwritable_target(tmp_path):
    (tmp_path / "test.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"test\.jsonl cannot be written"):
        write_samples(tmp_path / "test.jsonl", [GroundingSample.from_record(RECORD)])
    assert [item.name for item in tmp_path.iterdir()] == ["test.jsonl"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"id": None}, "id must be a non-empty text, got None"),
        ({"width": 10**9}, "width and height must be at most 16384, got 1000000000 x 48"),
        ({"frame_count": 10**18}, "frame_count must be below 2147483648, got 1000000000000000000"),
        ({"fps": 1e-300}, r"fps must be in 1e-06\.\.1e\+06 \(frames per second\), got 1e-300"),
        ({"fps": 1e300}, r"fps must be in 1e-06\.\.1e\+06"),
        ({"fps": 10**400}, r"fps must be a positive number .* got 1000"),
        ({"interval": [0, 10**12]}, r"interval must end before frame 2147483648, got 2\.5e\+11 s at 4 frames a second"),
        ({"interval": [True, 10]}, "interval must be two numbers"),
        ({"boxes": {"4": [0, 0, 1e308, 1e308]}}, "the box of frame 4 must lie within 1048576 pixels"),
        ({"boxes": {"4": [0, 0, 1, 1], "04": [0, 0, 1, 1]}}, "boxes must have one box a frame, got two of frame 4"),
        ({"boxes": {"1_0": [0, 0, 1, 1]}}, "boxes must be keyed by frame numbers, got '1_0'"),
        ({"video": "a\0b"}, "video must be a path that a file can have"),
    ],
)
def test_numbers_that_no_clip_has(change, rule):
    with pytest.raises(SampleError, match=rule):
        GroundingSample.from_record({**RECORD, **change}, root="/videos")


def test_half_a_character_is_no_text():
    with pytest.raises(SampleError, match=r"sentence holds half a character, which UTF-8 cannot hold: 'x \\ud800'\."):
        GroundingSample("a", "v.mp4", "x \ud800", 8, 8, 5.0, 3)


def test_a_video_whose_folder_is_not_utf_8(tmp_path):
    """Inside such a folder paths are relative and can be written; from elsewhere JSON cannot hold them."""
    folder = tmp_path / "caf\udce9"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    sample = GroundingSample.from_record(RECORD, root=folder)
    write_samples(folder / "a.jsonl", [sample])
    assert read_samples(folder / "a.jsonl") == [sample]
    with pytest.raises(SampleError, match=r"the path of the video of 'a' is not UTF-8: .*udce9"):
        write_samples(tmp_path / "a.jsonl", [sample])
    assert not (tmp_path / "a.jsonl").exists()


def test_an_event_in_the_last_half_frame_is_the_last_frame():
    sample = GroundingSample("t", "v.mp4", "it jumps", 8, 8, 4.0, 24, interval=(5.9, 6.0))
    assert sample.interval_frames == (23, 24)
    beyond = GroundingSample("t", "v.mp4", "it jumps", 8, 8, 4.0, 24, interval=(6.0, 6.25))
    assert beyond.interval_frames == (24, 25)  # not in the video at all, which `check_dataset` reports
