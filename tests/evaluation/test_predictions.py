"""Predictions: their files, their errors, and how seconds become frames."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.errors import OutputError, SampleError
from bridge_stg.evaluation import Prediction, read_predictions, to_frame_range, write_predictions
from bridge_stg.evaluation.predictions import StillTube

BOX = (1.0, 2.0, 3.5, 4.25)


def test_file_round_trip(tmp_path: Path) -> None:
    predictions = [
        Prediction("a", (3, 5), {4: BOX, 3: BOX}),
        Prediction("b", (0, 0)),
        Prediction("c \u2028 ü", (1, 2), {1: BOX}, oracle_boxes={7: BOX}),
    ]
    path = tmp_path / "new" / "predictions.jsonl"
    write_predictions(path, predictions)
    assert read_predictions(path) == predictions
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert first == {"id": "a", "interval": [3, 5], "boxes": {"3": list(BOX), "4": list(BOX)}}
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]


def test_empty_lines_and_absent_boxes_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"id": "a", "interval": [0, 2]}\n\n')
    assert read_predictions(path) == [Prediction("a", (0, 2))]


def test_numpy_values_become_plain_ones() -> None:
    prediction = Prediction(
        "a",
        (np.int64(1), np.int64(2)),  # type: ignore[arg-type]
        {np.int64(1): np.arange(4, dtype=np.float32)},  # type: ignore[dict-item]
    )
    assert json.loads(json.dumps(prediction.to_record()))["boxes"] == {"1": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"id": "a"', "not JSON that can be read"),
        ("[1]", "must be a JSON object, got list"),
        ('{"id": "a"}', "missing key 'interval'"),
        ('{"id": "a", "interval": [0, 1], "box": {}}', "unknown key 'box'"),
        ('{"id": " ", "interval": [0, 1]}', "id must be a non-empty text"),
        ('{"id": "a", "interval": [0.5, 1]}', "whole frames"),
        ('{"id": "a", "interval": [2, 1]}', "0 <= start <= end"),
        ('{"id": "a", "interval": [-1, 1]}', "0 <= start <= end"),
        ('{"id": "a", "interval": 3}', "whole frames"),
        ('{"id": "a", "interval": [0, 1], "boxes": []}', "boxes must be an object"),
        ('{"id": "a", "interval": [0, 1], "boxes": {"x": [0, 0, 1, 1]}}', "keyed by frame numbers, got 'x'"),
        ('{"id": "a", "interval": [0, 1], "boxes": {"-1": [0, 0, 1, 1]}}', "frames of 0 or more, got -1"),
        (
            '{"id": "a", "interval": [0, 1], "boxes": {"0": [0, 0, 1, 1], "1": [0, 1]}}',
            "four numbers.*frame 1",
        ),
        ('{"id": "a", "interval": [0, 1], "boxes": {"0": ["0", 0, 1, 1]}}', "four numbers.*frame 0"),
        ('{"id": "a", "interval": [0, 1], "boxes": {"0": [true, 0, 1, 1]}}', "four numbers.*frame 0"),
        ('{"id": "a", "interval": [0, 1], "boxes": {"0": [0, 0, NaN, 1]}}', "finite.*frame 0"),
        ('{"id": "a", "interval": [0, 1], "oracle_boxes": {"0": [5, 0, 1, 1]}}', "oracle_boxes.*x2 >= x1"),
        ('{"id": "ok", "interval": [0, 1]}', "'ok' was already used in line 1"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, record: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "ok", "interval": [0, 1]}\n' + record + "\n")
    with pytest.raises(SampleError, match=message) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_unreadable_and_unwritable_files(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="cannot be read as a prediction file"):
        read_predictions(tmp_path / "none.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder cannot be written"):
        write_predictions(tmp_path / "folder", [Prediction("a", (0, 1))])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failing_source_leaves_no_file(tmp_path: Path) -> None:
    def broken():
        yield Prediction("a", (0, 1))
        raise KeyError("gone")

    with pytest.raises(KeyError):
        write_predictions(tmp_path / "p.jsonl", broken())
    assert list(tmp_path.iterdir()) == []


def test_seconds_become_frames() -> None:
    assert to_frame_range((0.5, 2.5), 4.0) == (2, 10)
    assert to_frame_range((3.8, 4.2), 4.0) == (15, 17)  # one decimal of 3.75 and 4.25
    assert to_frame_range((0.30, 0.31), 4.0) == (1, 2)
    assert to_frame_range((-0.2, 0.1), 4.0) == (0, 1)


def test_prediction_from_a_result() -> None:
    @dataclass
    class Entry:
        frame: int
        box: tuple[float, float, float, float]

    @dataclass
    class Result:
        interval: tuple[float, float]
        fps: float
        tube: list[Entry]

    result = Result((0.5, 1.0), 4.0, [Entry(2, BOX), Entry(3, BOX)])
    assert Prediction.from_result("a", result) == Prediction("a", (2, 4), {2: BOX, 3: BOX})
    assert Prediction.from_result("a", result, {9: BOX}).oracle_boxes == {9: BOX}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"id": "a", "interval": [0, 1%s]}' % ("0" * 400), "interval must end before frame 2147483648"),
        ('{"id": "a", "interval": [0, %s]}' % ("9" * 5_000), "it holds an integer of too many digits"),
        ('{"id": "a", "interval": %s}' % ("[" * 100_000), "its brackets are nested too deeply"),
        ('{"id": "x \\ud800", "interval": [0, 1]}', "half a character"),
        ('{"id": "a", "interval": [0, 1], "boxes": {"0": [0, 0, 1e308, 1]}}', "boxes must lie within 1048576 pixels"),
        ('{"id": "a", "interval": [0, 1], "boxes": {"0": [0, 0, 1%s, 1]}}' % ("0" * 400), "four numbers"),
        ('{"id": "a", "interval": [0, 1], "boxes": {"9999999999": [0, 0, 1, 1]}}', "keyed by frames below 2147483648"),
        ('{"id": "a", "interval": [0, 1], "boxes": {"7": [0, 0, 1, 1], "07": [0, 0, 1, 1]}}', "got two of frame 7"),
        ('{"id": "a", "interval": [true, 1]}', "whole frames"),
    ],
    ids=range(9),
)
def test_what_no_prediction_can_be_is_one_short_sentence(tmp_path: Path, record: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\ufeff{"id": "ok", "interval": [0, 1]}\n' + record + "\n", encoding="utf-8")
    with pytest.raises(SampleError, match=message) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}:2: ") and len(str(caught.value)) < 500


def test_one_box_in_every_frame_takes_no_room() -> None:
    tube = StillTube(range(3, 2**31 - 1), BOX)
    prediction = Prediction("a", (3, 2**31 - 1), tube)
    assert prediction.boxes[2**30] == BOX and len(prediction.boxes) == 2**31 - 4
    assert 2 not in prediction.boxes and StillTube(range(3, 5), BOX) == {3: BOX, 4: BOX}
    with pytest.raises(SampleError, match="x2 >= x1"):
        Prediction("a", (0, 1), StillTube(range(9), (5.0, 0.0, 1.0, 1.0)))


def test_seconds_that_are_no_numbers_are_one_sentence() -> None:
    for interval in ((float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(SampleError, match="interval and fps must be finite numbers"):
            to_frame_range(interval, 4.0)
