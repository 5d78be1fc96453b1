"""The loader's memory is measured over every clip, and growth is noticed."""

import pytest

from benchmarks.studies.loader import drift, main, measure, once
from bridge_stg.data import VOCABULARY, SampleStore, write_split
from bridge_stg.models.tiny import tiny_processor
from bridge_stg.training import GroundingStream


def test_every_clip_is_read_once_and_memory_is_that_of_the_processes(tmp_path):
    data = write_split(tmp_path, "train", 16, 0)
    stream = GroundingStream({"clips": SampleStore(data)}, None, tiny_processor(VOCABULARY))
    read = [stream.mixture.pick(place)[1] for batch in once(stream, 16, 4, 8) for place in batch]
    assert sorted(read) == list(range(16))
    found = measure(data, 16, 1, batch=4, every=8)
    assert [clips for clips, _ in found] == [8, 16]
    assert all(size > 100 * 2**20 for _, size in found)  # two Python processes with torch


@pytest.mark.parametrize(
    ("means", "expected"), [([100, 100, 100, 100], 0.0), ([50, 100, 103, 98], 0.03), ([50, 100, 100, 94], 0.06)]
)
def test_drift_is_told_from_the_warm_up_on(means, expected):
    assert drift([(100 * (i + 1), float(mean)) for i, mean in enumerate(means)]) == pytest.approx(expected)


@pytest.mark.parametrize("clips", ["200", "450"])
def test_too_few_clips_to_tell_are_refused(monkeypatch, capsys, clips):
    monkeypatch.setattr("sys.argv", ["loader_memory", "--clips", clips])
    with pytest.raises(SystemExit):
        main()
    assert f"must be a multiple of 100 and at least 400, got {clips}" in capsys.readouterr().err
