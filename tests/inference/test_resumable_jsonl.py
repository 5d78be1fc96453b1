"""Outcomes of a long list: whatever is killed, and whoever merges when, all are there once and in order."""

import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bridge_stg.errors import OutputError, SampleError
from bridge_stg.inference import resumable_jsonl as module
from bridge_stg.inference.outcome import Outcome
from bridge_stg.inference.resumable_jsonl import ResumableJsonl

IDS = [f"r{i}" for i in range(11)]
FACTS = {"model": "a", "settings": {"keep": 1.0}}


def ground(names):
    """Every fourth has no answer; `batch` tells with whom it was grounded."""
    for name in names:
        if int(name[1:]) % 4 == 3:
            yield Outcome(name, reason="no", request={"batch": names})
        else:
            yield Outcome(name, answer={"batch": names})


def answer(names):
    return [Outcome(name, answer={}) for name in names]


def open_output(folder, ids=IDS, **options):
    return ResumableJsonl(folder / "o.jsonl", ids, failures_apart=True, **{"made_with": FACTS, **options})


def content(folder, files_only=False):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file() or not files_only}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with open_output(folder, batch_size=3) as output:
        assert output.work(ground)
    return content(folder)


def test_the_output_is_in_order_and_nothing_else_is_left(uninterrupted):
    assert sorted(uninterrupted) == ["o.jsonl", "o.jsonl.failed", "o.jsonl.run"]
    names = {name: [json.loads(line)["id"] for line in text.splitlines()] for name, text in uninterrupted.items()
             if name != "o.jsonl.run"}  # fmt: skip
    assert names == {"o.jsonl": [n for n in IDS if n not in ("r3", "r7")], "o.jsonl.failed": ["r3", "r7"]}
    assert json.loads(uninterrupted["o.jsonl.run"]) == FACTS


def work_until(line, folder, kill):
    """Run to the end, or to the `line`-th line of the module that is reached; returns how many there were."""
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
        with open_output(folder, batch_size=3) as output:
            output.work(ground)
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
        with open_output(folder, batch_size=3, rank=1, world_size=2) as other:
            other.work(ground)
        with open_output(folder, batch_size=3, rank=0, world_size=2) as other:
            assert other.work(ground)
        assert content(folder) == uninterrupted, f"killed at line {line} of {total}"


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_cut_off_is_made_again(uninterrupted, tmp_path, cut):
    with open_output(tmp_path) as output:
        for outcome in ground(IDS[:3]):
            output.append(outcome)
    part = tmp_path / "o.jsonl.parts" / "0-of-1.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    with open_output(tmp_path, batch_size=3) as output:
        # Without its line feed alone, a line is whole.
        assert output.done() == set(IDS[: 3 if cut == 1 else 2])
        assert output.work(ground)
    assert [json.loads(line)["id"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == [
        name for name in IDS if name not in ("r3", "r7")
    ]


def test_other_bytes_in_a_part_are_no_results(tmp_path):
    with open_output(tmp_path) as output:
        output.append(Outcome("r0", answer={}))
    part = tmp_path / "o.jsonl.parts" / "0-of-1.jsonl"
    part.write_bytes(part.read_bytes() + b'\x00\x00\xff\n[]\n{"id": 3}\n\n{"id": "r1"}\n')
    assert open_output(tmp_path).done() == {"r0", "r1"}


def test_batches_are_those_of_the_list_whoever_makes_them(uninterrupted, tmp_path):
    for rank, world_size in ((2, 3), (0, 2), (1, 2)):
        with open_output(tmp_path, batch_size=3, rank=rank, world_size=world_size) as output:
            merged = output.work(ground)
            assert merged == (rank == 1)
    assert content(tmp_path) == uninterrupted


def test_only_what_is_missing_is_made(tmp_path):
    calls, told = [], []

    def counting(names):
        calls.append(names)
        return ground(names)

    with open_output(tmp_path, batch_size=4) as output:
        for outcome in ground(IDS[:6]):
            output.append(outcome)
    with open_output(tmp_path, batch_size=4) as output:
        output.work(counting, lambda *state: told.append(state))
    assert calls == [IDS[4:8], IDS[8:]]
    assert told == [(4, 11), (8, 11), (11, 11)]
    (tmp_path / "o.jsonl.failed").unlink()  # to try the failed ones again
    with open_output(tmp_path) as output:
        output.work(answer)
    assert sorted(content(tmp_path)) == ["o.jsonl", "o.jsonl.run"]
    assert [outcome.id for outcome in output.outcomes()] == IDS


def test_a_merge_does_not_take_away_what_another_process_reads(tmp_path):
    with open_output(tmp_path) as output:
        for outcome in ground(IDS):
            output.append(outcome)
    reader = open_output(tmp_path).outcomes()
    first = next(reader)
    assert open_output(tmp_path).merge()
    assert not (tmp_path / "o.jsonl.parts").exists()
    assert [o.to_record() for o in (first, *reader)] == [outcome.to_record() for outcome in ground(IDS)]


def test_all_may_merge_at_once_and_readers_see_everything_throughout(uninterrupted, tmp_path):
    def merge(rank):
        with open_output(folder, batch_size=3, rank=rank, world_size=8) as output:
            return output.merge() and {outcome.id for outcome in output.outcomes()} == set(IDS)

    def read(_):
        return open_output(folder).done() == set(IDS)

    for attempt in range(25):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        for rank in range(3):
            with open_output(folder, batch_size=3, rank=rank, world_size=3) as output:
                for batch in output.batches:
                    for outcome in ground(batch):
                        output.append(outcome)
        with ThreadPoolExecutor(12) as pool:
            merged, seen = pool.map(merge, range(8)), pool.map(read, range(8))
            assert all(merged)
            assert all(seen)
        assert open_output(folder).merge()
        assert content(folder) == uninterrupted


def test_one_of_those_that_end_together_is_told(uninterrupted, tmp_path):
    def work(rank):
        with open_output(folder, batch_size=2, rank=rank, world_size=6) as output:
            started.wait()
            return output.work(ground)

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
            if names == output.batches[0] and rank < 2:
                end(rank + 1)
            return ground(IDS)

        with open_output(tmp_path, rank=rank, world_size=3) as output:
            told.append((rank, output.work(while_others_end)))

    end(0)
    assert told == [(2, True), (1, False), (0, False)]


def test_ids_of_another_list_and_files_of_another_kind_are_refused(tmp_path):
    with open_output(tmp_path) as output:
        output.work(ground)
    with pytest.raises(SampleError, match="'r10', which is not asked for: it belongs to another list"):
        open_output(tmp_path, IDS[:-1]).merge()
    (tmp_path / "a.txt").write_text('{"id": "r1"}\nhello\n')
    (tmp_path / "a.txt.run").write_text(json.dumps(FACTS))
    with pytest.raises(SampleError, match=r"a\.txt:2 is not a JSON object with an id"):
        ResumableJsonl(tmp_path / "a.txt", IDS, made_with=FACTS).merge()
    assert (tmp_path / "a.txt").read_text().endswith("hello\n")


def test_what_is_made_with_something_else_is_refused_begun_or_finished(uninterrupted, tmp_path):
    def interrupted(names):
        raise KeyboardInterrupt

    with open_output(tmp_path) as output, pytest.raises(KeyboardInterrupt):
        output.work(interrupted)  # begun, and ended before its first outcome
    for finished in (False, True):
        message = r'o\.jsonl is made with model "a", not "b"; name another file, or remove .*o\.jsonl and .*\.parts'
        for use in (ResumableJsonl.done, ResumableJsonl.merge, lambda output: output.work(interrupted)):
            with pytest.raises(OutputError, match=message):
                use(open_output(tmp_path, made_with={"model": "b", "settings": {"keep": 1.0}}))
        with pytest.raises(OutputError, match=r'settings \{"keep": 1\.0\}, not \{\}'):
            open_output(tmp_path, made_with=FACTS | {"settings": {}}).done()
        if not finished:
            with open_output(tmp_path) as output:
                output.work(ground)
    kept = content(tmp_path)
    assert kept == {**uninterrupted, "o.jsonl": kept["o.jsonl"], "o.jsonl.failed": kept["o.jsonl.failed"]}
    (tmp_path / "o.jsonl.run").unlink()
    with pytest.raises(OutputError, match="nothing says what made them"):
        open_output(tmp_path).work(interrupted)
    assert content(tmp_path)["o.jsonl"] == kept["o.jsonl"]


@pytest.mark.parametrize("cut", [1, 3, 20])
def test_outcomes_are_not_continued_where_nothing_says_what_made_them(tmp_path, cut):
    with open_output(tmp_path) as output:
        output.append(Outcome("r0", answer={}))
    part = tmp_path / "o.jsonl.parts" / "0-of-1.jsonl"
    head, line = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(head[:-cut])  # killed while it wrote its first line
    with open_output(tmp_path) as output:
        output.append(Outcome("r1", answer={}))
    assert open_output(tmp_path).done() == {"r1"}
    with pytest.raises(OutputError, match="made with model"):
        open_output(tmp_path, made_with={"model": "b"}).done()
    part.write_bytes(line)
    with pytest.raises(OutputError, match="nothing says what made them"):
        open_output(tmp_path).done()


def test_an_output_that_was_removed_leaves_nothing_that_counts(tmp_path):
    with open_output(tmp_path) as output:
        output.work(ground)
    (tmp_path / "o.jsonl").unlink()
    with open_output(tmp_path, made_with={"model": "b"}) as output:
        assert output.done() == set()
        output.work(answer)
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
        ResumableJsonl(tmp_path / name, IDS, made_with=FACTS).work(lambda names: pytest.fail("grounded"))


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/o.jsonl")
    with ResumableJsonl(tmp_path / "link", IDS, made_with=FACTS) as output:
        assert output.work(ground)
    assert (tmp_path / "link").is_symlink()
    assert sorted(content(tmp_path / "there")) == ["o.jsonl", "o.jsonl.run"]


def test_the_longest_name_of_an_output_leaves_room_for_what_is_beside_it(tmp_path):
    name = "o" * 250
    for _ in range(2):
        with ResumableJsonl(tmp_path / name, IDS, made_with=FACTS, failures_apart=True) as output:
            assert output.work(ground)
            assert output.done() == set(IDS)
        assert name in content(tmp_path) and len(content(tmp_path)) == 3


def test_a_number_that_json_does_not_have_is_refused(tmp_path):
    with open_output(tmp_path) as output, pytest.raises(ValueError, match="not finite"):
        output.append(Outcome("r0", answer={"box": float("nan")}))
