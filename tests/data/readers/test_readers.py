"""Own JSON Lines, and what holds for every format."""

from __future__ import annotations

import json

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
        ("line 2", "not a complete JSON object: Expecting ',' delimiter"),
        ("line 3", "unknown key 'colour'"),
        ("line 4", "boxes must be keyed by frames in 0..59, got 60."),
        ("line 5", "the box of frame 6 must have x2 >= x1 and y2 >= y1, got"),
        ("a", "id 'a' was already used"),
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
