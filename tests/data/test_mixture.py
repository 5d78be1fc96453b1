"""A mixed stream is a function of seed and place."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest

from bridge_stg.data import MixtureSampler

SIZES = {"vidstg": 70, "charades": 30, "refcoco": 500}
WEIGHTS = {"vidstg": 5, "charades": 3, "refcoco": 2}


def take(sampler, count):
    return [sampler.pick(place) for place in range(count)]


def test_weights_hold_in_every_block():
    drawn = take(MixtureSampler(SIZES, WEIGHTS, block=100), 500)
    for start in range(0, 500, 100):
        assert Counter(name for name, _ in drawn[start : start + 100]) == {"vidstg": 50, "charades": 30, "refcoco": 20}


def test_shares_are_rounded_to_the_block_and_never_lost():
    drawn = take(MixtureSampler(SIZES, {"vidstg": 1, "charades": 1, "refcoco": 1}, block=100), 100)
    assert sorted(Counter(name for name, _ in drawn).values()) == [33, 33, 34]
    by_size = take(MixtureSampler(SIZES, block=60), 60)
    assert Counter(name for name, _ in by_size) == {"vidstg": 7, "charades": 3, "refcoco": 50}
    with pytest.raises(ValueError, match=r"the weight of 'charades', 1e-06, gives it no place in a block of 1000"):
        MixtureSampler(SIZES, {**WEIGHTS, "charades": 1e-6})


def test_every_item_comes_once_before_any_comes_twice():
    drawn = [item for name, item in take(MixtureSampler(SIZES, WEIGHTS, block=10), 900) if name == "charades"]
    passes = [drawn[start : start + 30] for start in range(0, 270, 30)]
    assert all(sorted(one) == list(range(30)) for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes), "each pass has its own order"


def test_places_are_independent_of_what_was_drawn():
    whole = take(MixtureSampler(SIZES, WEIGHTS, seed=3), 3000)
    fresh = MixtureSampler(SIZES, WEIGHTS, seed=3)
    assert [fresh.pick(place) for place in (2999, 0, 1500)] == [whole[2999], whole[0], whole[1500]]
    assert take(MixtureSampler(SIZES, WEIGHTS, seed=4), 50) != whole[:50]


def test_a_pickled_sampler_is_the_same_stream():
    sampler = MixtureSampler(SIZES, WEIGHTS, seed=3, block=10)
    assert take(pickle.loads(pickle.dumps(sampler)), 50) == take(sampler, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "weights must name the datasets"),
        (({"a": 0},), "must have at least 1 item"),
        (({"a": 1}, {"b": 1}), "weights must name the datasets a, got b"),
        (({"a": 1}, {"a": 0}), "the weight of 'a' must be positive, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixtureSampler(*arguments)
    with pytest.raises(ValueError, match="place must be at least 0"):
        MixtureSampler({"a": 1}).pick(-1)
