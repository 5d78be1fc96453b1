"""The trivial baselines: best, seeded, and worth what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_stg.errors import SampleError
from bridge_stg.evaluation import ConstantFloor, evaluate, random_floor, temporal_iou

from .samples import make_sample


def test_constant_floor_by_hand() -> None:
    # [10, 20) scores 1, 1 and 1/3: more than any other answer.
    samples = [make_sample((10, 20), "a"), make_sample((10, 20), "b"), make_sample((15, 25), "c")]
    floor = ConstantFloor.fit(samples)
    assert floor.interval == (0.25, 0.5)
    assert floor.box_size == pytest.approx((0.4, 0.5))
    predictions = floor.predict(samples)
    assert [prediction.interval for prediction in predictions] == [(10, 20)] * 3
    assert predictions[0].boxes == dict.fromkeys(range(10, 20), pytest.approx((30, 20, 70, 60)))
    row = evaluate(samples, predictions).summary["all"]
    assert row["m_tIoU"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    iou = 20 * 40 / (40 * 40 * 2 - 20 * 40)
    assert row["gt_vIoU"] == pytest.approx(iou)
    assert row["m_vIoU"] == pytest.approx(iou * row["m_tIoU"])


def test_constant_floor_scales_to_other_clips() -> None:
    floor = ConstantFloor.fit([make_sample((10, 20))])
    other = make_sample((0, 1), width=200, height=160, frame_count=80, segment=(40, 80), boxes={})
    (prediction,) = floor.predict([other])
    assert prediction.interval == (50, 60)
    assert prediction.boxes[50] == pytest.approx((60, 40, 140, 120))
    assert set(prediction.oracle_boxes or ()) == {0}


def test_constant_floor_without_boxes_or_samples() -> None:
    assert ConstantFloor.fit([make_sample((10, 20), boxes={})]).box_size == (1.0, 1.0)
    with pytest.raises(SampleError, match="0 samples"):
        ConstantFloor.fit([])


intervals = st.tuples(st.integers(0, 39), st.integers(1, 40)).map(lambda v: (v[0], max(v[0] + 1, v[1])))


@settings(max_examples=25, deadline=None)
@given(st.lists(intervals, min_size=1, max_size=6))
def test_no_other_constant_interval_is_better(true: list[tuple[int, int]]) -> None:
    start, end = ConstantFloor.fit([make_sample(interval) for interval in true]).interval
    found = np.mean([temporal_iou((start * 40, end * 40), interval) for interval in true])
    every = [(s / 2, e / 2) for s in range(80) for e in range(s + 1, 81)]
    inside = np.arange(80) / 2  # half frames
    masks = np.array([(inside >= s) & (inside < e) for s, e in every])
    truth = np.array([(inside >= s) & (inside < e) for s, e in true])
    overlap = (masks[:, None] & truth).sum(-1)
    means = (overlap / (masks[:, None] | truth).sum(-1)).mean(-1)
    assert found == pytest.approx(means.max())


def test_constant_floor_of_many_lengths_stays_near_the_best() -> None:
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 3000, 200)
    samples = [
        make_sample((int(s), int(s + rng.integers(200, 900))), str(i), frame_count=4000, boxes={})
        for i, s in enumerate(starts)
    ]
    true = [sample.interval_frames for sample in samples]
    start, end = ConstantFloor.fit(samples).interval
    found = np.mean([temporal_iou((start * 4000, end * 4000), t) for t in true if t is not None])
    grid = range(0, 4001, 100)
    best = max(np.mean([temporal_iou((s, e), t) for t in true if t is not None]) for s in grid for e in grid if e > s)
    assert found >= best - 0.005


def test_random_floor_is_seeded_by_sample() -> None:
    samples = [make_sample((10, 20), str(i)) for i in range(30)]
    first = random_floor(samples, seed=3)
    assert random_floor(samples[::-1], seed=3)[::-1] == first
    assert random_floor(samples, seed=4) != first
    for prediction in first:
        start, end = prediction.interval
        assert 0 <= start < end <= 40
        assert set(prediction.boxes) == set(range(start, end))
        assert set(prediction.oracle_boxes or ()) == set(range(10, 20))
        x1, y1, x2, y2 = prediction.boxes[start]
        assert 0 <= x1 <= x2 <= 100
        assert 0 <= y1 <= y2 <= 80
    assert len({prediction.interval for prediction in first}) > 20
    row = evaluate(samples, first).summary["all"]
    assert 0 < row["m_vIoU"] < row["m_tIoU"] < 0.5


def test_random_floor_on_one_frame() -> None:
    (prediction,) = random_floor([make_sample((0, 1), frame_count=1, boxes={0: (0, 0, 1, 1)})])
    assert prediction.interval == (0, 1)
