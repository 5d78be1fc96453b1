"""The protocols on cases small enough for pencil and paper, and where they differ."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_stg.data import GroundingSample
from bridge_stg.errors import SampleError
from bridge_stg.evaluation import PROTOCOLS, Prediction, evaluate, protocol_report, score_files
from bridge_stg.evaluation.protocols.ptd import sampled_frames
from bridge_stg.evaluation.protocols.stcat import interpolate_boxes
from bridge_stg.evaluation.protocols.tubedetr import grid_frames

BOX = (0.0, 0.0, 40.0, 40.0)
HALF = (0.0, 0.0, 40.0, 20.0)  # IoU 1/2 with BOX


def make(interval, *, fps=25.0, frame_count=100, segment=None, boxes=None, **changes):
    """A 100 x 100 clip whose target stands in `BOX` during the event."""
    tube = dict.fromkeys(range(*interval), BOX) if boxes is None else boxes
    values = {"id": "a", "video": "v.mp4", "sentence": "a dog", "width": 100, "height": 100, "fps": fps}
    values |= {"frame_count": frame_count, "segment": segment, "boxes": tube}
    return GroundingSample(interval=(interval[0] / fps, interval[1] / fps), **(values | changes))


def score(name, sample, prediction):
    found = PROTOCOLS[name].score(sample, prediction)
    return found.tIoU, found.vIoU, found.gt_vIoU


def answer(interval, boxes, **changes):
    return Prediction("a", interval, boxes, **changes)


def everywhere(box, frames=range(100)):
    return dict.fromkeys(frames, box)


def test_a_perfect_answer_scores_one_in_every_protocol():
    for name in PROTOCOLS:
        assert score(name, make((10, 60)), answer((10, 60), everywhere(BOX))) == (1.0, 1.0, 1.0), name


def test_half_the_box_and_half_the_time():
    """Event 20..60, answer 40..80, half the box: 20 of 60 frames; the grid of fifths has 4 of its 12."""
    sample, prediction = make((20, 60)), answer((40, 80), everywhere(HALF))
    for name in ("every_frame", "stcat", "tubedetr", "hcstvg_official"):
        assert score(name, sample, prediction) == pytest.approx((20 / 60, 10 / 60, 0.5)), name
    # 8 sampled frames 0 14 28 42 57 71 85 99: the event holds 28 42 57, the answer 42 57 71.
    assert score("ptd", sample, prediction) == pytest.approx((2 / 4, 1 / 4, 0.5))


def test_the_grid_of_tubedetr():
    assert grid_frames(make((0, 10))) == list(range(0, 100, 5))
    # Fifths are counted from the video's start: the clip's first frame is in, then 15, 20, ...
    assert grid_frames(make((20, 30), segment=(12, 31))) == [12, 15, 20, 25, 30]
    assert grid_frames(make((0, 3), fps=4.0, frame_count=6)) == [0, 1, 2, 3, 4, 5]
    thinned = grid_frames(make((0, 10), frame_count=1500))  # 300 on the grid
    assert len(thinned) == 200 and thinned[:4] == [0, 5, 15, 20]


def test_an_event_between_two_grid_frames_scores_in_time_only():
    assert score("tubedetr", make((11, 14)), answer((11, 14), everywhere(BOX))) == (1.0, 0.0, 0.0)


def test_a_missing_box_counts_zero_and_stcat_interpolates():
    sample = make((0, 20))
    sparse = {0: BOX, 10: BOX, 19: BOX}
    assert score("stcat", sample, answer((0, 20), sparse)) == (1.0, 1.0, 1.0)
    assert score("every_frame", sample, answer((0, 20), sparse)) == pytest.approx((1.0, 3 / 20, 3 / 20))
    assert score("hcstvg_official", sample, answer((0, 20), sparse)) == pytest.approx((3 / 20, 3 / 20, 3 / 20))
    assert score("tubedetr", sample, answer((0, 20), sparse)) == pytest.approx((1.0, 2 / 4, 2 / 4))
    # Nothing is guessed outside the boxes given.
    assert score("stcat", sample, answer((0, 20), {5: BOX, 9: BOX})) == pytest.approx((1.0, 5 / 20, 5 / 20))


def test_interpolation_is_linear_between_neighbours():
    boxes = {2: (0.0, 0.0, 10.0, 10.0), 6: (4.0, 8.0, 30.0, 10.0), 7: (0.0, 0.0, 1.0, 1.0)}
    found = interpolate_boxes(boxes, range(10))
    assert sorted(found) == [2, 3, 4, 5, 6, 7]
    assert found[3] == pytest.approx((1.0, 2.0, 15.0, 10.0))
    assert interpolate_boxes({}, range(3)) == {}


def test_boxes_outside_the_answer_serve_oracle_time_only():
    sample = make((20, 60))
    for name in PROTOCOLS:
        t_iou, v_iou, gt = score(name, sample, answer((70, 90), everywhere(BOX)))
        assert (t_iou, v_iou, gt) == (0.0, 0.0, 1.0), name


def test_oracle_boxes_take_precedence_in_oracle_time():
    sample = make((20, 60))
    prediction = answer((20, 60), everywhere(BOX), oracle_boxes=everywhere(HALF))
    for name in PROTOCOLS:
        assert score(name, sample, prediction) == pytest.approx((1.0, 1.0, 0.5)), name


def test_an_inclusive_last_box_counts_in_oracle_time_of_stcat_only():
    """Frames 10..19 and a box at 20: with no box predicted at 20, oracle time misses one of eleven."""
    sample = make((10, 20), boxes=everywhere(BOX, range(10, 21)))
    prediction = answer((10, 20), everywhere(BOX, range(10, 20)))
    assert score("stcat", sample, prediction) == pytest.approx((1.0, 1.0, 10 / 11))
    assert score("every_frame", sample, prediction) == (1.0, 1.0, 1.0)
    beyond = make((10, 20), boxes=everywhere(BOX))
    assert score("stcat", beyond, prediction) == (1.0, 1.0, 1.0)


def test_frames_of_ptd():
    assert sampled_frames(make((0, 10))) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert sampled_frames(make((0, 3), frame_count=10)) == [0, 3, 6, 9]
    assert sampled_frames(make((0, 1), frame_count=1)) == [0]
    assert sampled_frames(make((20, 24), segment=(20, 23))) == [20, 21, 22]
    assert len(sampled_frames(make((0, 9), frame_count=3000))) == 64


def test_ptd_quantises_to_thousandths_within_the_frame():
    sample = make((0, 100), width=3, height=3, boxes=everywhere((0.0, 0.0, 1.0, 3.0)))
    # 1/3 of the frame becomes 333; the answer reaches out of the frame and is cut to it.
    found = score("ptd", sample, answer((0, 100), everywhere((-2.0, 0.0, 1.002, 9.0))))
    assert found == pytest.approx((1.0, 333 / 334, 333 / 334))


def test_ptd_asks_at_least_and_the_others_more_than():
    sample = make((0, 100))
    prediction = answer((0, 100), everywhere(HALF))
    for name, passed in (("ptd", 1.0), ("stcat", 0.0), ("tubedetr", 0.0), ("hcstvg_official", 0.0)):
        assert evaluate([sample], [prediction], PROTOCOLS[name]).summary["all"]["vIoU@0.5"] == passed, name


def test_ptd_drops_an_event_that_no_sampled_frame_shows_unless_it_has_a_segment():
    whole, part = make((15, 20)), make((15, 20), segment=(0, 100), id="b")
    report = protocol_report(evaluate([whole, part], [], PROTOCOLS["ptd"]), PROTOCOLS["ptd"])
    assert report["left_out"] == ["a"]
    assert report["missing"] == ["b"]
    assert report["counts"]["all"] == 1 and report["all"]["m_tIoU"] == 0.0
    found = evaluate([whole], [answer((15, 20), everywhere(BOX))], PROTOCOLS["ptd"])
    assert found.left_out == ("a",) and found.unexpected == () and found.summary["all"]["m_tIoU"] is None


def test_ptd_without_boxes_is_scored_in_time():
    sample = make((20, 60), boxes={})
    assert score("ptd", sample, answer((40, 80), {})) == (0.5, None, None)


def test_an_empty_answer_scores_zero():
    for name in PROTOCOLS:
        assert score(name, make((20, 60)), answer((30, 30), {}))[:2] == (0.0, 0.0), name


def test_the_report_has_every_key_and_lists_what_is_missing(tmp_path):
    dataset, answers = tmp_path / "d.jsonl", tmp_path / "p.jsonl"
    records = [{**make((20, 60)).to_record(), "id": name} for name in "abc"]
    records[1]["sentence_type"] = "interrogative"
    dataset.write_text("\n".join(map(json.dumps, records)))
    answers.write_text(json.dumps({"id": "a", "interval": [20, 60], "boxes": records[0]["boxes"]}) + "\n")
    report = score_files(dataset, answers, PROTOCOLS["tubedetr"])
    assert report["protocol"] == "tubedetr"
    assert report["missing"] == ["b", "c"]
    metrics = ["m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5", "gt_vIoU"]
    assert report["all"] == {metric: pytest.approx(1 / 3) for metric in metrics}
    assert report["declarative"] == dict.fromkeys(metrics, 0.5)
    assert report["interrogative"] == dict.fromkeys(metrics, 0.0)
    assert report["type_mean"] == dict.fromkeys(metrics, 0.25)
    assert report["counts"] == {"all": 3, "declarative": 2, "interrogative": 1}


def test_duplicate_ids_are_one_sentence(tmp_path):
    dataset, answers = tmp_path / "d.jsonl", tmp_path / "p.jsonl"
    dataset.write_text(json.dumps(make((20, 60)).to_record()))
    answers.write_text('{"id": "a", "interval": [1, 2]}\n{"id": "a", "interval": [1, 2]}\n')
    with pytest.raises(SampleError, match=r"p\.jsonl:2: id 'a' was already used in line 1; ids must be unique\."):
        score_files(dataset, answers, PROTOCOLS["stcat"])


def test_the_command_needs_neither_a_model_nor_transformers(tmp_path):
    dataset, answers = tmp_path / "d.jsonl", tmp_path / "p.jsonl"
    dataset.write_text(json.dumps(make((20, 60)).to_record()))
    answers.write_text('{"id": "z", "interval": [1, 2]}\n')
    code = f"""
import sys
sys.modules["transformers"] = None
from bridge_stg.cli import app
app(["evaluate", "--dataset", {str(dataset)!r}, "--predictions", {str(answers)!r}, "--protocol", "stcat", "--json"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["protocol"] == "stcat" and report["missing"] == ["a"] and report["unexpected"] == ["z"]
    assert "have no prediction and score 0" in done.stderr


def grid_by_looking_at_every_frame(sample):
    start, end = sample.segment or (0, sample.frame_count)
    ticks = [int(frame * (5 / sample.fps)) for frame in range(start, end)]
    kept = [start + i for i in range(end - start) if i == 0 or ticks[i] > ticks[i - 1]]
    return [kept[place * len(kept) // 200] for place in range(200)] if len(kept) > 200 else kept


@given(
    fps=st.floats(0.5, 300) | st.sampled_from([5.0, 25.0, 30000 / 1001, 24000 / 1001, 4.999999, 5.01]),
    start=st.integers(0, 100_000),
    length=st.integers(1, 6_000),
)
@settings(deadline=None, max_examples=200)
def test_the_grid_is_that_of_a_walk_over_every_frame(fps, start, length):
    end = start + length
    sample = make((0, 1), fps=fps, frame_count=end, segment=(start, end), boxes={})
    assert grid_frames(sample) == grid_by_looking_at_every_frame(sample)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_event_in_the_last_frame_can_be_hit(name):
    """Two frames a second, so that `ptd` looks at every one of them."""
    sample = make((9.8, 10), fps=2.0, frame_count=10, boxes={9: BOX})
    prediction = answer((9, 10), {9: BOX})
    assert score(name, sample, prediction) == (1.0, 1.0, 1.0)
