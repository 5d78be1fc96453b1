"""Own JSON Lines, and what holds for every format."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from bridge_stg.data import read_samples
from bridge_stg.data.readers import FORMATS, Problem, iterate_dataset, read_dataset
from bridge_stg.errors import SampleError

from .published import hcstvg_record, refcoco_instances, refcoco_refs, vidstg_record, write_json

RECORD = {
    "id": "a",
    "video": "clips/a.mp4",
    "width": 96,
    "height": 64,
    "fps": 25.0,
    "frame_count": 60,
    "sentence": "the dog jumps",
    "interval": [10, 20],
    "boxes": {"10": [1, 2, 30, 40]},
}


def test_a_broken_line_is_skipped_and_the_rest_is_read(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [
        json.dumps(RECORD),
        json.dumps(RECORD)[:-1],
        json.dumps({**RECORD, "id": "b", "colour": 1}),
        json.dumps({**RECORD, "id": "c", "boxes": {"60": [1, 2, 3, 4]}}),
        json.dumps({**RECORD, "id": "d", "boxes": {"6": [9, 2, 3, 4]}}),
        json.dumps(RECORD),
        json.dumps({**RECORD, "id": "z"}),
    ]
    path.write_text("\n".join(lines))
    data = read_dataset(path, "jsonl")
    assert [s.id for s in data.samples] == ["a", "z"]
    assert data.samples[0].video == str(tmp_path / "clips" / "a.mp4")
    assert [(p.id, p.reason.split(";")[0].split("(")[0].strip()) for p in data.skipped] == [
        ("line 2", "not JSON that can be read: Expecting ',' delimiter"),
        ("line 3", "unknown key 'colour'"),
        ("line 4", "boxes must be keyed by frames in 0..59, got 60."),
        ("line 5", "the box of frame 6 must have x2 >= x1 and y2 >= y1, got"),
        ("line 6", "id 'a' was already used in line 1"),
    ]


def test_videos_may_lie_elsewhere(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(RECORD))
    videos = tmp_path / "videos"
    (videos / "x").mkdir(parents=True)
    (videos / "x" / "a.webm").touch()
    assert read_dataset(path, "jsonl", videos=videos).samples[0].video == str(videos / "x" / "a.webm")


def test_every_format_streams(tmp_path):
    (tmp_path / "c.txt").write_text("A 0.0 6.9##a person sits.")
    (tmp_path / "d.jsonl").write_text(json.dumps(RECORD))
    write_json(tmp_path / "instances.json", refcoco_instances())
    sources = {
        "vidstg": write_json(tmp_path / "v.json", [vidstg_record()]),
        "hcstvg-v1": write_json(tmp_path / "1.json", {"a.mp4": hcstvg_record(1)}),
        "hcstvg-v2": write_json(tmp_path / "2.json", {"a.mp4": hcstvg_record(2)}),
        "charades-sta": tmp_path / "c.txt",
        "refcoco": write_json(tmp_path / "refs.json", refcoco_refs()),
        "jsonl": tmp_path / "d.jsonl",
    }
    assert tuple(sources) == FORMATS
    for name, source in sources.items():
        items = list(iterate_dataset(source, name))
        assert items and not any(isinstance(item, Problem) for item in items), name


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("coco", {}, "format must be one of vidstg, hcstvg-v1"),
        ("hcstvg-v1", {"boxes": "b"}, "boxes are a file of their own in vidstg and refcoco only"),
        ("vidstg", {"split": "val"}, "split is for refcoco only"),
        ("jsonl", {"convention": "stcat"}, "convention 'stcat' is for vidstg and hcstvg only"),
        ("vidstg", {"convention": "mine"}, "convention must be one of exact, tubedetr, stcat"),
    ],
)
def test_options_that_do_not_fit(tmp_path, format, options, message):
    with pytest.raises(SampleError, match=message):
        read_dataset(tmp_path, format, **options)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(SampleError, match="holds no record"):
        read_dataset(tmp_path / "d.jsonl", "jsonl")
    with pytest.raises(SampleError, match="No such file"):
        read_dataset(tmp_path / "e.jsonl", "jsonl")
    with pytest.raises(SampleError, match="No such file"):
        read_samples(tmp_path / "e.jsonl")


CHARADES = "AO8RW 0.0 6.9##a person walks.\nAO8RX 1.0 2.0##a person\u2028sits\x0cdown\x85again.\n"


def documents():
    jsonl = json.dumps(RECORD) + "\n" + json.dumps(RECORD | {"id": "b"}) + "\n"
    return {
        "vidstg": json.dumps([vidstg_record()]),
        "hcstvg-v1": json.dumps({"1_a.mp4": hcstvg_record(1)}),
        "hcstvg-v2": json.dumps({"1_a.mp4": hcstvg_record(2)}),
        "charades-sta": CHARADES,
        "refcoco": json.dumps(refcoco_refs()),
        "jsonl": jsonl,
    }


@pytest.mark.parametrize("format", FORMATS)
def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(tmp_path, format):
    write_json(tmp_path / "instances.json", refcoco_instances())
    path, text = tmp_path / "refs.json", documents()[format]
    found = []
    for head, end in (("", "\n"), ("\ufeff", "\r\n")):
        path.write_bytes((head + text.replace("\n", end)).encode())
        found.append(read_dataset(path, format))
    assert found[0] == found[1]
    assert found[0].samples and not found[0].skipped


def test_a_sentence_may_hold_any_separator(tmp_path):
    path = tmp_path / "charades.txt"
    path.write_text(CHARADES, encoding="utf-8")
    found = read_dataset(path, "charades-sta")
    assert [sample.sentence for sample in found.samples] == ["a person walks.", "a person\u2028sits\x0cdown\x85again."]


@pytest.mark.parametrize("format", ["charades-sta", "jsonl"])
def test_a_line_that_is_not_text_is_its_own_problem(tmp_path, format):
    path = tmp_path / "a.txt"
    lines = documents()[format].encode().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\xff\xfe", lines[1]]))
    found = read_dataset(path, format)
    assert len(found.samples) == 2
    assert [problem.id for problem in found.skipped] == ["line 2"]
    assert found.skipped[0].reason == "not UTF-8 text: invalid start byte at byte 0."


@pytest.mark.parametrize("format", ["vidstg", "refcoco"])
def test_millions_of_values_that_are_no_records_end_early(tmp_path, format):
    write_json(tmp_path / "instances.json", refcoco_instances())
    path = write_json(tmp_path / "refs.json", ["a"] * 1_000_000)
    items = iterate_dataset(path, format)
    assert all(isinstance(item, Problem) for item in islice(items, 200_000))
    with pytest.raises(SampleError, match=r"200000 of the first 200000 records cannot be read, .* of another kind"):
        next(items)


def test_names_that_no_file_can_have(tmp_path):
    for name, skipped in (("x" * 300, False), ("a\0b", True), ("\ud800", True)):
        path = write_json(tmp_path / "a.json", {name: hcstvg_record(1), "1_b.mp4": hcstvg_record(1)})
        found = read_dataset(path, "hcstvg-v1", videos=tmp_path)
        assert [sample.id for sample in found.samples] == ["1_b.mp4"] if skipped else [name, "1_b.mp4"]
        assert all("a name that a file can have" in problem.reason for problem in found.skipped)
        assert len(found.skipped) == skipped


def test_a_number_of_thousands_of_digits_is_one_record_of_the_file(tmp_path):
    text = json.dumps({"1_a.mp4": hcstvg_record(1, img_num="@@"), "1_b.mp4": hcstvg_record(1)})
    (tmp_path / "a.json").write_text(text.replace('"@@"', "9" * 5_000))
    found = read_dataset(tmp_path / "a.json", "hcstvg-v1")
    assert [sample.id for sample in found.samples] == ["1_b.mp4"]
    assert found.skipped[0].reason == "img_num of an HC-STVG record must be a whole number of at least 1, got inf."
