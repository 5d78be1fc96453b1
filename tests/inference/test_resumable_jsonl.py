"""Results in parts: whatever is killed, and whoever merges when, all are there once and in order."""

import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bridge_stg.errors import OutputError, SampleError
from bridge_stg.files import beside
from bridge_stg.inference import resumable_jsonl as module
from bridge_stg.inference.resumable_jsonl import Parts

IDS = [f"r{i}" for i in range(11)]
FACTS = {"model": "a", "settings": {"keep": 1.0}}


def make(names):
    """Every fourth has an error; `batch` tells with whom it was made."""
    for name in names:
        yield {"id": name, "batch": names} | ({"error": "no"} if int(name[1:]) % 4 == 3 else {})


def open_parts(folder, ids=IDS, **options):
    out = folder / "o.jsonl"
    return Parts(out, ids, split={"error": folder / "o.jsonl.failed"}, **{"made_with": FACTS, **options})


def content(folder, files_only=False):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file() or not files_only}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with open_parts(folder, batch_size=3) as parts:
        assert parts.work(make)
    return content(folder)


def test_the_output_is_in_order_and_nothing_else_is_left(uninterrupted):
    assert sorted(uninterrupted) == ["o.jsonl", "o.jsonl.failed", "o.jsonl.run"]
    names = {name: [json.loads(line)["id"] for line in text.splitlines()] for name, text in uninterrupted.items()
             if name != "o.jsonl.run"}  # fmt: skip
    assert names == {"o.jsonl": [n for n in IDS if n not in ("r3", "r7")], "o.jsonl.failed": ["r3", "r7"]}
    assert json.loads(uninterrupted["o.jsonl.run"]) == FACTS


def work_until(line, folder, kill):
    """Run to the end, or to the `line`-th line of parts.py that is reached; returns how many there were."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            seen += 1
            if kill and seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        with open_parts(folder, batch_size=3) as parts:
            parts.work(make)
    finally:
        sys.settrace(None)
    return seen


def test_killed_at_every_moment_and_resumed_it_is_the_same(uninterrupted, tmp_path):
    (tmp_path / "count").mkdir()
    total = work_until(0, tmp_path / "count", kill=False)
    fork = multiprocessing.get_context("fork")
    for line in range(1, total, 11):
        folder = tmp_path / str(line)
        folder.mkdir()
        child = fork.Process(target=work_until, args=(line, folder, True))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        if (folder / "o.jsonl").exists():
            assert uninterrupted.items() <= content(folder, files_only=True).items()
        with open_parts(folder, batch_size=3, rank=1, world_size=2) as other:
            other.work(make)
        with open_parts(folder, batch_size=3, rank=0, world_size=2) as other:
            assert other.work(make)
        assert content(folder) == uninterrupted, f"killed at line {line} of {total}"


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_cut_off_is_made_again(uninterrupted, tmp_path, cut):
    with open_parts(tmp_path) as parts:
        for record in make(IDS[:3]):
            parts.append(record)
    part = tmp_path / "o.jsonl.parts" / "0-of-1.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    with open_parts(tmp_path, batch_size=3) as parts:
        # Without its line feed alone, a line is whole.
        assert parts.done() == set(IDS[: 3 if cut == 1 else 2])
        assert parts.work(make)
    assert [json.loads(line)["id"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == [
        name for name in IDS if name not in ("r3", "r7")
    ]


def test_other_bytes_in_a_part_are_no_results(tmp_path):
    with open_parts(tmp_path) as parts:
        parts.append({"id": "r0"})
    part = tmp_path / "o.jsonl.parts" / "0-of-1.jsonl"
    part.write_bytes(part.read_bytes() + b'\x00\x00\xff\n[]\n{"id": 3}\n\n{"id": "r1"}\n')
    assert open_parts(tmp_path).done() == {"r0", "r1"}


def test_batches_are_those_of_the_list_whoever_makes_them(uninterrupted, tmp_path):
    for rank, world_size in ((2, 3), (0, 2), (1, 2)):
        with open_parts(tmp_path, batch_size=3, rank=rank, world_size=world_size) as parts:
            merged = parts.work(make)
            assert merged == (rank == 1)
    assert content(tmp_path) == uninterrupted


def test_only_what_is_missing_is_made(tmp_path):
    calls, told = [], []

    def counting(names):
        calls.append(names)
        return make(names)

    with open_parts(tmp_path, batch_size=4) as parts:
        for record in make(IDS[:6]):
            parts.append(record)
    with open_parts(tmp_path, batch_size=4) as parts:
        parts.work(counting, lambda *state: told.append(state))
    assert calls == [IDS[4:8], IDS[8:]]
    assert told == [(4, 11), (8, 11), (11, 11)]
    (tmp_path / "o.jsonl.failed").unlink()  # to try the failed ones again
    with open_parts(tmp_path) as parts:
        parts.work(lambda names: [{"id": name} for name in names])
    assert sorted(content(tmp_path)) == ["o.jsonl", "o.jsonl.run"]
    assert [record["id"] for record in parts.results()] == IDS


def test_a_merge_does_not_take_away_what_another_process_reads(tmp_path):
    with open_parts(tmp_path) as parts:
        for record in make(IDS):
            parts.append(record)
    reader = open_parts(tmp_path).results()
    first = next(reader)
    assert open_parts(tmp_path).merge()
    assert not (tmp_path / "o.jsonl.parts").exists()
    assert [first, *reader] == [{"batch": IDS, **record} for record in make(IDS)]


def test_all_may_merge_at_once_and_readers_see_everything_throughout(uninterrupted, tmp_path):
    def merge(rank):
        with open_parts(folder, batch_size=3, rank=rank, world_size=8) as parts:
            return parts.merge() and {record["id"] for record in parts.results()} == set(IDS)

    def read(_):
        return open_parts(folder).done() == set(IDS)

    for attempt in range(25):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        for rank in range(3):
            with open_parts(folder, batch_size=3, rank=rank, world_size=3) as parts:
                for batch in parts.batches:
                    for record in make(batch):
                        parts.append(record)
        with ThreadPoolExecutor(12) as pool:
            merged, seen = pool.map(merge, range(8)), pool.map(read, range(8))
            assert all(merged)
            assert all(seen)
        assert open_parts(folder).merge()
        assert content(folder) == uninterrupted


def test_one_of_those_that_end_together_is_told(uninterrupted, tmp_path):
    def work(rank):
        with open_parts(folder, batch_size=2, rank=rank, world_size=6) as parts:
            started.wait()
            return parts.work(make)

    for attempt in range(25):
        folder, started = tmp_path / str(attempt), threading.Barrier(6)
        folder.mkdir()
        with ThreadPoolExecutor(6) as pool:
            told = list(pool.map(work, range(6)))
            assert any(told)
            assert list(pool.map(work, range(6))) == [True] + 5 * [False]
        assert content(folder).keys() == uninterrupted.keys()


def test_of_those_that_find_it_ended_one_is_told(tmp_path):
    """Every process is at its first batch while the next does everything: whoever merges first has the last word."""
    told = []

    def end(rank):
        def while_others_end(names):
            if names == parts.batches[0] and rank < 2:
                end(rank + 1)
            return make(IDS)

        with open_parts(tmp_path, rank=rank, world_size=3) as parts:
            told.append((rank, parts.work(while_others_end)))

    end(0)
    assert told == [(2, True), (1, False), (0, False)]


def test_ids_of_another_list_and_files_of_another_kind_are_refused(tmp_path):
    with open_parts(tmp_path) as parts:
        parts.work(make)
    with pytest.raises(SampleError, match="'r10', which is not asked for: they belong to another list"):
        open_parts(tmp_path, IDS[:-1]).merge()
    (tmp_path / "a.txt").write_text('{"id": "r1"}\nhello\n')
    with pytest.raises(SampleError, match=r"a\.txt:2 is no JSON object with an id"):
        Parts(tmp_path / "a.txt", IDS).merge()
    assert (tmp_path / "a.txt").read_text().endswith("hello\n")


def test_what_is_made_with_something_else_is_refused_begun_or_finished(uninterrupted, tmp_path):
    other = {"model": "b", "settings": {"keep": 1.0}}
    with open_parts(tmp_path):
        pass  # begun, and killed before its first result
    for finished in (False, True):
        message = r'o\.jsonl is made with model "a", not "b"; name another file, or remove .*o\.jsonl and .*\.parts'
        with pytest.raises(OutputError, match=message):
            open_parts(tmp_path, made_with=other)
        with pytest.raises(OutputError, match=r'settings \{"keep": 1\.0\}, not \{\}'):
            open_parts(tmp_path, made_with=FACTS | {"settings": {}})
        if not finished:
            with open_parts(tmp_path) as parts:
                parts.work(make)
    kept = content(tmp_path)
    (tmp_path / "o.jsonl.run").unlink()
    with pytest.raises(OutputError, match="nothing says what made them"):
        open_parts(tmp_path)
    assert content(tmp_path)["o.jsonl"] == kept["o.jsonl"]


def test_an_output_that_was_removed_leaves_nothing_that_counts(tmp_path):
    with open_parts(tmp_path) as parts:
        parts.work(make)
    (tmp_path / "o.jsonl").unlink()
    with open_parts(tmp_path, made_with={"model": "b"}) as parts:
        assert parts.done() == set()
        parts.work(lambda names: [{"id": name} for name in names])
    assert sorted(content(tmp_path)) == ["o.jsonl", "o.jsonl.run"]
    assert json.loads(content(tmp_path)["o.jsonl.run"]) == {"model": "b"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/o", r"cannot be written: Not a directory\."),
        ("folder", r"folder cannot be written: it is a folder, and only a regular file is replaced\."),
        ("pipe", r"pipe cannot be written: it is a device, a pipe or a socket"),
        ("circle", r"circle cannot be written: "),
        ("taken", r"taken\.parts cannot be written: it is there, and no folder\."),
        ("nowhere", r"nowhere\.parts cannot be written: it is there, and no folder\."),
        ("/proc/o", r"cannot be written: No such file or directory\."),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_made(tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "taken.parts").write_text("")
    (tmp_path / "nowhere.parts").symlink_to("gone")
    with pytest.raises(OutputError, match=message):
        Parts(tmp_path / name, IDS).work(lambda names: pytest.fail("made"))


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/o.jsonl")
    with Parts(tmp_path / "link", IDS) as parts:
        assert parts.work(make)
    assert (tmp_path / "link").is_symlink() and sorted(content(tmp_path / "there")) == ["o.jsonl"]


def test_the_longest_name_of_an_output_has_room_for_its_parts(tmp_path):
    name = "o" * 250
    out = tmp_path / name
    with Parts(out, IDS, split={"error": beside(out, ".failed")}, made_with=FACTS) as parts:
        assert parts.work(make)
    assert name in content(tmp_path) and len(content(tmp_path)) == 3
    assert Parts(out, IDS, split={"error": beside(out, ".failed")}, made_with=FACTS).done() == set(IDS)


def test_a_number_that_json_does_not_have_is_refused(tmp_path):
    with open_parts(tmp_path) as parts, pytest.raises(ValueError, match="not finite"):
        parts.append({"id": "r0", "box": float("nan")})
