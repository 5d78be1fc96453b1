"""Metric values, by hand and against an implementation that counts frames and pixels one by one."""

from __future__ import annotations

import json
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_stg.data import GroundingSample
from bridge_stg.errors import SampleError
from bridge_stg.evaluation import (
    METRICS,
    MetricProtocol,
    Prediction,
    SampleScore,
    box_iou,
    evaluate,
    score_sample,
    summarise,
    temporal_iou,
)

from .samples import make_sample

TRUE_BOX = (10.0, 20.0, 50.0, 60.0)
HALF_BOX = (10.0, 20.0, 50.0, 40.0)  # the upper half: IoU 0.5


def test_temporal_iou_by_hand() -> None:
    assert temporal_iou((0, 10), (0, 10)) == 1
    assert temporal_iou((0, 10), (5, 15)) == pytest.approx(1 / 3)
    assert temporal_iou((2.0, 4.0), (3.0, 3.5)) == pytest.approx(0.25)
    assert temporal_iou((0, 10), (10, 20)) == 0
    assert temporal_iou((0, 1), (7, 9)) == 0
    assert temporal_iou((3, 3), (3, 3)) == 0


def test_box_iou_by_hand() -> None:
    box = [0.0, 0.0, 4.0, 4.0]
    others = [box, [2.0, 2.0, 6.0, 6.0], [4.0, 0.0, 8.0, 4.0], [1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]]
    np.testing.assert_allclose(box_iou(box, others), [1, 4 / 28, 0, 4 / 16, 0])
    assert box_iou([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]) == 0


def test_scores_by_hand() -> None:
    sample = make_sample((10, 20))
    # Frames 15..25 predicted: 5 shared, 15 in the union; half a box in the shared ones.
    score = score_sample(sample, Prediction("a", (15, 25), dict.fromkeys(range(15, 25), HALF_BOX)))
    assert score.tIoU == pytest.approx(5 / 15)
    assert score.vIoU == pytest.approx(5 * 0.5 / 15)
    assert score.gt_vIoU == pytest.approx(5 * 0.5 / 10)


def test_oracle_boxes_measure_where_alone() -> None:
    sample = make_sample((10, 20))
    oracle = dict.fromkeys(range(10, 20), HALF_BOX)
    score = score_sample(sample, Prediction("a", (30, 35), dict.fromkeys(range(30, 35), TRUE_BOX), oracle))
    assert (score.tIoU, score.vIoU) == (0, 0)
    assert score.gt_vIoU == pytest.approx(0.5)


def test_missing_boxes_count_zero() -> None:
    sample = make_sample((10, 20))
    some = dict.fromkeys(range(10, 14), TRUE_BOX)
    score = score_sample(sample, Prediction("a", (10, 20), some))
    assert (score.tIoU, score.vIoU, score.gt_vIoU) == pytest.approx((1, 0.4, 0.4))
    unannotated = make_sample((10, 20), boxes=some)
    score = score_sample(unannotated, Prediction("a", (10, 20), dict.fromkeys(range(10, 20), TRUE_BOX)))
    assert (score.tIoU, score.vIoU, score.gt_vIoU) == pytest.approx((1, 0.4, 0.4))


def test_boxes_outside_the_predicted_interval_do_not_count() -> None:
    sample = make_sample((10, 20))
    everywhere = dict.fromkeys(range(40), TRUE_BOX)
    assert score_sample(sample, Prediction("a", (10, 15), everywhere)).vIoU == pytest.approx(0.5)


def test_samples_without_boxes_have_temporal_scores_only() -> None:
    sample = make_sample((10, 20), task="temporal", boxes={})
    score = score_sample(sample, Prediction("a", (10, 20)))
    assert (score.tIoU, score.vIoU, score.gt_vIoU) == (1, None, None)
    row = summarise([score])["all"]
    assert row["m_tIoU"] == 1
    assert row["m_vIoU"] is row["vIoU@0.3"] is row["gt_vIoU"] is None


def test_scoring_the_wrong_things_is_refused() -> None:
    with pytest.raises(SampleError, match="'b' cannot be scored on sample 'a'"):
        score_sample(make_sample((1, 2)), Prediction("b", (1, 2)))
    with pytest.raises(SampleError, match="'a' has no interval"):
        score_sample(make_sample(None), Prediction("a", (1, 2)))
    with pytest.raises(SampleError, match="'a' has no interval"):
        evaluate([make_sample(None)], [])


intervals = st.tuples(st.integers(0, 19), st.integers(1, 20)).map(lambda v: (v[0], max(v[0] + 1, v[1])))
whole = st.integers(0, 11)
whole_boxes = st.tuples(whole, whole, st.integers(0, 12), st.integers(0, 12)).map(
    lambda v: (float(v[0]), float(v[1]), float(max(v[0], v[2])), float(max(v[1], v[3])))
)
tubes = st.dictionaries(st.integers(0, 19), whole_boxes, max_size=20)


def _count_iou(a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> float:
    """IoU of whole-pixel boxes by counting pixels."""
    if a is None or b is None:
        return 0.0
    pixels = [{(x, y) for x in range(int(c[0]), int(c[2])) for y in range(int(c[1]), int(c[3]))} for c in (a, b)]
    union = len(pixels[0] | pixels[1])
    return len(pixels[0] & pixels[1]) / union if union else 0.0


@settings(max_examples=60, deadline=None)
@given(intervals, intervals, tubes, tubes, st.none() | tubes)
def test_scores_against_counting(
    true: tuple[int, int], predicted: tuple[int, int], truth: dict, boxes: dict, oracle: dict | None
) -> None:
    sample = GroundingSample(
        id="a",
        video="v",
        sentence="s",
        width=12,
        height=12,
        fps=5.0,
        frame_count=20,
        interval=(true[0] / 5, true[1] / 5),
        boxes=truth,
    )
    score = score_sample(sample, Prediction("a", predicted, boxes, oracle))
    union, both = set(range(*true)) | set(range(*predicted)), set(range(*true)) & set(range(*predicted))
    assert score.tIoU == pytest.approx(len(both) / len(union))
    if not truth:
        assert score.vIoU is score.gt_vIoU is None
        return
    assert score.vIoU == pytest.approx(sum(_count_iou(truth.get(f), boxes.get(f)) for f in both) / len(union))
    given_time = boxes if oracle is None else oracle
    expected = [_count_iou(truth.get(f), given_time.get(f)) for f in range(*true)]
    assert score.gt_vIoU == pytest.approx(sum(expected) / len(expected))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=8, max_size=8))
def test_box_iou_is_symmetric_and_bounded(values: list[float]) -> None:
    x, y = np.sort(np.reshape(values, (2, 2, 2)), axis=-1)
    a, b = np.stack([x[0], y[0]], -1).ravel(), np.stack([x[1], y[1]], -1).ravel()
    assert box_iou(a, b) == box_iou(b, a)
    assert 0 <= box_iou(a, b) <= 1 + 1e-9


def _score(id: str, viou: float, sentence_type: str = "declarative", tier: str | None = None) -> SampleScore:
    return SampleScore(id, viou, viou, viou, sentence_type, tier)  # type: ignore[arg-type]


def test_summary_means_and_strict_thresholds() -> None:
    scores = [
        _score("a", 0.3, tier="single"),
        _score("b", 0.5, tier="twins"),
        _score("c", 0.7, "interrogative", tier="twins"),
    ]
    summary = summarise(scores)
    assert list(summary) == ["all", "declarative", "interrogative", "type_mean", "tiers"]
    row = summary["all"]
    assert list(row) == ["count", *METRICS]
    assert METRICS == ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5", "gt_vIoU")
    assert row == pytest.approx(
        {"count": 3, "m_tIoU": 0.5, "m_vIoU": 0.5, "vIoU@0.3": 2 / 3, "vIoU@0.5": 1 / 3, "gt_vIoU": 0.5}
    )
    assert summary["declarative"]["m_vIoU"] == pytest.approx(0.4)
    assert summary["interrogative"]["m_vIoU"] == pytest.approx(0.7)
    assert summary["type_mean"]["m_vIoU"] == pytest.approx(0.55)
    assert summary["tiers"]["single"]["count"] == 1
    assert summary["tiers"]["twins"]["m_tIoU"] == pytest.approx(0.6)


def test_summary_of_one_sentence_type_keeps_its_keys_and_is_json() -> None:
    summary = summarise([_score("a", 0.4)])
    assert summary["interrogative"] == {"count": 0} | dict.fromkeys(METRICS)
    assert summary["type_mean"]["m_vIoU"] is None
    assert "tiers" not in summary
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summarise([])["all"]["m_tIoU"] is None


def test_evaluate_lists_what_is_missing_and_unexpected() -> None:
    samples = [make_sample((10, 20), "a"), make_sample((10, 20), "b"), make_sample((10, 20), "c", boxes={})]
    done = evaluate(
        samples, [Prediction("z", (0, 1)), Prediction("b", (10, 20), dict.fromkeys(range(10, 20), TRUE_BOX))]
    )
    assert [score.id for score in done.scores] == ["a", "b", "c"]
    assert done.missing == ("a", "c")
    assert done.unexpected == ("z",)
    assert [score.tIoU for score in done.scores] == [0, 1, 0]
    assert [score.vIoU for score in done.scores] == [0, 1, None]
    assert done.summary["all"]["m_tIoU"] == pytest.approx(1 / 3)
    assert done.summary["all"]["m_vIoU"] == pytest.approx(1 / 2)


def test_ids_must_be_unique() -> None:
    sample, prediction = make_sample((10, 20)), Prediction("a", (10, 20))
    with pytest.raises(SampleError, match="sample 'a' comes twice"):
        evaluate([sample, sample], [prediction])
    with pytest.raises(SampleError, match="prediction 'a' comes twice"):
        evaluate([sample], [prediction, prediction])


def test_another_protocol_slots_in() -> None:
    def score_in_time_only(sample: GroundingSample, prediction: Prediction) -> SampleScore:
        return SampleScore(sample.id, 0.5, 0.5, None)

    protocol = MetricProtocol("half", score_in_time_only, operator.ge)
    summary = evaluate([make_sample((10, 20))], [Prediction("a", (0, 1))], protocol).summary
    assert summary["all"]["vIoU@0.5"] == 1
    assert summary["all"]["gt_vIoU"] is None
