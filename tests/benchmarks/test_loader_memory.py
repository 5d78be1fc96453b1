"""The loader's memory is measured over every clip, and growth is noticed."""

import pytest

from benchmarks.loader_memory import drift, measure
from bridge_stg.data import write_split


def test_every_clip_is_read_once_and_memory_is_that_of_the_processes(tmp_path):
    found = measure(write_split(tmp_path, "train", 16, 0), 16, 1, batch=4, every=8)
    assert [clips for clips, _ in found] == [8, 16]
    assert all(size > 100 * 2**20 for _, size in found)  # two Python processes with torch


@pytest.mark.parametrize(
    ("means", "expected"), [([100, 100, 100, 100], 0.0), ([50, 100, 103, 98], 0.03), ([50, 100, 100, 94], 0.06)]
)
def test_drift_is_told_from_the_warm_up_on(means, expected):
    assert drift([(100 * (i + 1), float(mean)) for i, mean in enumerate(means)]) == pytest.approx(expected)
