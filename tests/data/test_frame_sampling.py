from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_stg.data import sample_spatial_frames, uniform_frame_index


def test_native_rate_takes_every_frame():
    np.testing.assert_array_equal(uniform_frame_index(np.arange(24) / 4, 4, 32), np.arange(24))


def test_lower_rate_takes_the_frames_on_the_grid():
    np.testing.assert_array_equal(uniform_frame_index(np.arange(250) / 25, 5, 64), np.arange(0, 250, 5))


def test_higher_rate_takes_each_frame_once():
    np.testing.assert_array_equal(uniform_frame_index(np.arange(6) / 2, 10, 64), np.arange(6))


def test_long_video_is_thinned_evenly_and_keeps_its_ends():
    index = uniform_frame_index(np.arange(3001) / 25, 1, 33)
    assert len(index) == 32
    assert (index[0], index[-1]) == (0, 3000)
    assert set(np.diff(index).tolist()) <= {75, 100, 125}


def test_odd_count_repeats_the_last_frame():
    assert uniform_frame_index([0.0], 2, 8).tolist() == [0, 0]
    assert uniform_frame_index(np.arange(5) / 4, 4, 8).tolist() == [0, 1, 2, 3, 4, 4]
    assert uniform_frame_index(np.arange(5) / 4, 4, 8, multiple=4).tolist() == [0, 1, 2, 3, 4, 4, 4, 4]


def test_variable_rate_follows_time():
    assert uniform_frame_index([0.0, 0.01, 0.02, 1.0, 1.9, 2.1], 1, 8, multiple=1).tolist() == [0, 3, 4]


@given(
    gaps=st.lists(st.floats(0.01, 2.0), max_size=60),
    fps=st.floats(0.1, 60),
    multiple=st.integers(1, 4),
    extra=st.integers(0, 40),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_index_is_ascending_bounded_and_aligned(gaps, fps, multiple, extra):
    times = np.cumsum([5.0, *gaps])
    index = uniform_frame_index(times, fps, multiple + extra, multiple)
    assert index.dtype == np.int64
    assert index[0] == 0
    assert index.max() < len(times)
    assert len(index) % multiple == 0
    assert len(index) <= multiple + extra
    distinct = np.unique(index)
    np.testing.assert_array_equal(index[: len(distinct)], distinct)
    assert (index[len(distinct) :] == distinct[-1]).all()
    assert len(index) - len(distinct) < multiple


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (([], 2, 8), "times must be one ascending list"),
        (([0.0, 0.0], 2, 8), "ascending"),
        (([0.0, 1.0], 0, 8), "fps must be positive"),
        (([0.0, 1.0], 2, 1), r"multiple must be in 1\.\.max_frames"),
    ],
)
def test_uniform_misuse(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        uniform_frame_index(*arguments)


def _split(index, interval):
    inside = (index >= interval[0]) & (index < interval[1])
    return index[inside], index[~inside]


@pytest.mark.parametrize("negatives", ["uniform", "boundary"])
def test_half_inside_half_outside(negatives):
    rng = np.random.default_rng(0)
    for _ in range(20):
        index = sample_spatial_frames(24, (5, 15), 16, negatives=negatives, rng=rng)
        inside, outside = _split(index, (5, 15))
        assert (len(inside), len(outside)) == (8, 8)
        assert len(set(index.tolist())) == 16
        assert (np.diff(index) > 0).all()


@pytest.mark.parametrize(
    ("frame_count", "interval", "count", "positives", "distinct"),
    [
        (24, (3, 7), 16, 4, 16),  # short event: more negatives
        (24, (1, 23), 16, 14, 16),  # few negatives: more positives
        (24, (0, 24), 16, 16, 16),  # no negatives
        (10, (2, 5), 16, 9, 10),  # short clip: positives repeat
        (1, (0, 1), 4, 4, 1),
    ],
)
def test_scarce_frames(frame_count, interval, count, positives, distinct):
    index = sample_spatial_frames(frame_count, interval, count, rng=np.random.default_rng(1))
    assert len(index) == count
    assert len(_split(index, interval)[0]) == positives
    assert len(set(index.tolist())) == distinct


def test_positive_ratio():
    draw = {r: sample_spatial_frames(60, (20, 40), 10, r, rng=np.random.default_rng(0)) for r in (0, 0.3, 1)}
    assert {r: len(_split(index, (20, 40))[0]) for r, index in draw.items()} == {0: 1, 0.3: 3, 1: 10}


def test_boundary_negatives_are_nearer():
    def distance(negatives):
        rng = np.random.default_rng(0)
        drawn = [sample_spatial_frames(100, (45, 55), 8, negatives=negatives, rng=rng) for _ in range(50)]
        outside = np.concatenate([_split(index, (45, 55))[1] for index in drawn])
        return np.abs(outside - 49.5).mean()

    assert distance("boundary") < 0.75 * distance("uniform")


def test_seeded_draws_repeat():
    one, two = (sample_spatial_frames(50, (10, 20), 16, rng=np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"interval": (5, 5)}, "interval must have 0 <= start < end <= 24"),
        ({"interval": (5, 25)}, "interval must have"),
        ({"count": 0}, "count must be at least 1"),
        ({"positive_ratio": 1.5}, r"positive_ratio must be in 0\.\.1"),
        ({"negatives": "near"}, "negatives must be uniform or boundary"),
    ],
)
def test_spatial_misuse(changes, rule):
    with pytest.raises(ValueError, match=rule):
        sample_spatial_frames(**{"frame_count": 24, "interval": (5, 10), "count": 8, **changes})
