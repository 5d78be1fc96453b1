"""A store reads what was written, lists what it cannot use, and can be shared with other processes."""

import json
import multiprocessing
import os
import pickle

import pytest

from bridge_stg.data import GroundingSample, SampleStore, write_samples
from bridge_stg.errors import SampleError


def sample(i, **changes):
    values = {
        "id": f"s{i}",
        "video": f"clip{i}.mp4",
        "sentence": "a dog runs",
        "width": 640,
        "height": 360,
        "fps": 25.0,
        "frame_count": 100,
        "interval": (1.0, 2.0),
        "boxes": {30: (1.0, 2.0, 30.0, 40.0)},
    }
    return GroundingSample(**(values | changes))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "train.jsonl"
    write_samples(path, [sample(i, video=str(tmp_path / f"clip{i}.mp4")) for i in range(5)])
    return path


def test_records_come_back_as_they_were_written(path):
    store = SampleStore(path)
    assert len(store) == 5
    assert store[3] == sample(3, video=str(path.parent / "clip3.mp4"))
    assert [found.id for found in store[1:3]] == ["s1", "s2"]
    assert store.problems == []
    assert store.frames.tolist() == [100] * 5
    with pytest.raises(IndexError):
        store[5]


def test_a_segment_counts_as_the_clip(tmp_path):
    path = tmp_path / "a.jsonl"
    write_samples(path, [sample(0, segment=(10, 40))])
    assert SampleStore(path).frames.tolist() == [30]


def test_what_cannot_be_used_is_listed(path):
    good = path.read_text().splitlines()
    unsized = json.loads(good[0]) | {"id": "unsized", "width": 1, "height": 1, "boxes": {}}
    bar = json.loads(good[0]) | {"id": "bar", "width": 2048, "height": 10, "boxes": {}}
    made = [json.dumps(record) for record in ({"id": "x"}, unsized, bar)]
    broken = [good[0], '{"id": "cut', "", good[0], *made, good[1]]
    path.write_text("\n".join(broken) + "\n")
    store = SampleStore(path)
    assert [found.id for found in store] == ["s0", "s1"]
    assert [problem.id for problem in store.problems] == ["line 2", "line 4", "line 5", "line 6", "line 7"]
    expected = (
        "not JSON that can be read",
        "id 's0' was already used in line 1",
        "missing key",
        "--align",
        "200 times the other",
    )
    for problem, words in zip(store.problems, expected, strict=True):
        assert words in problem.reason


def test_a_referring_sample_is_one_frame_whatever_it_is_taken_from(tmp_path):
    path = tmp_path / "a.jsonl"
    write_samples(path, [sample(0, task="referring")])
    assert SampleStore(path).frames.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ('"width": 1000000000000', "must be at most 16384, got 1000000000000 x 360"),
        ('"frame_count": 3000000000', "frame_count must be below 2147483648, got 3000000000"),
        (
            '"fps": 1' + "0" * 400,
            "fps must be a positive number (frames per second), got 100000000000000000",
        ),
        ('"fps": 1' + "0" * 5000, "it holds an integer of too many digits"),
        ('"tier": ' + "[" * 100_000, "its brackets are nested too deeply"),
    ],
)
def test_no_line_can_stop_the_opening(path, change, reason):
    line = path.read_text().splitlines()[0].replace('"s0"', '"odd"')
    path.write_text(path.read_text() + line[:-1] + ", " + change + "}\n")  # the last value of a key counts
    store = SampleStore(path)
    assert len(store) == 5
    assert [problem.id for problem in store.problems] == ["line 6"]
    assert reason in store.problems[0].reason


@pytest.mark.parametrize("content", ["", "\n", '{"id": 1}\n', None])
def test_a_file_without_a_usable_record_is_one_sentence(tmp_path, content):
    path = tmp_path / "none.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SampleError, match=r"none\.jsonl (holds no usable record|cannot be read)") as caught:
        SampleStore(path)
    assert "\n" not in str(caught.value)


def read(store, queue):
    queue.put([found.id for found in store])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_it_too(path, method):
    store = SampleStore(path)
    assert store[0].id == "s0"  # the file is open here before the others begin
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=read, args=(store, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [[f"s{i}" for i in range(5)]] * 2


def test_it_pickles_small(tmp_path):
    path = tmp_path / "long.jsonl"
    write_samples(path, [sample(i, boxes=dict.fromkeys(range(100), (0.0, 0.0, 9.0, 9.0))) for i in range(200)])
    assert path.stat().st_size > 500_000
    assert len(pickle.dumps(SampleStore(path))) < 20_000


def test_a_file_that_changes_underneath_is_noticed(path):
    store = SampleStore(path)
    path.write_text("{}\n" * 5)
    with pytest.raises(SampleError, match="has changed since it was opened"):
        store[4]


def test_only_a_line_that_is_another_is_refused(path):
    store = SampleStore(path)
    text = path.read_text()
    path.write_text(text.replace("a dog runs", "a cat runs", 1) + "one more\n")
    assert store[1].id == "s1"
    with pytest.raises(SampleError, match=r"train\.jsonl has changed since it was opened; its record 0 is another\."):
        store[0]
    path.write_text(text)  # the same again, at another time
    assert store[0].id == "s0"


def test_a_byte_order_mark_belongs_to_no_record(path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    store = SampleStore(path)
    assert store.problems == [] and store[0] == sample(0, video=str(path.parent / "clip0.mp4"))


def test_a_pipe_cannot_be_read_by_place(path):
    reading, writing = os.pipe()
    os.write(writing, path.read_bytes())
    os.close(writing)
    with pytest.raises(SampleError, match="is a pipe or a device"):
        SampleStore(f"/dev/fd/{reading}")
    os.close(reading)
