"""`run_on_gpu.sh` on a machine without a GPU: every step is walked, and nothing that was finished is ever lost."""

import csv
import os
import random
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import libraries, run
from benchmarks.gpu.compare import compare
from benchmarks.gpu.events import Event
from benchmarks.gpu.record import LOG_BYTES, Record
from benchmarks.gpu.rehearse import killed_run

ROOT = Path(__file__).parents[2]
ROW = {"op": "prune_tokens", "provider": "bridge_stg (triton)", "mode": "forward", "shape": "B1", "dtype": "bfloat16"}


def run_steps(folder, *programs, seconds=60, limit=600):
    """Run Python programs as the steps of a run; (exit status, folder of the results)."""
    folders = run.Folders(folder / "out", folder / "cache")
    folders.tree.mkdir(parents=True)
    steps = [run.Step(f"step{i}", seconds, [sys.executable, "-c", program]) for i, program in enumerate(programs)]
    environment = run.variables(folders) | {"PYTHONPATH": str(ROOT)}
    return run.run(steps, folders, limit, "a test", environment), folders.out


EMIT = "from benchmarks.gpu.events import Event, emit\n"


def test_the_dry_run_walks_every_step(tmp_path):
    command = [ROOT / "benchmarks" / "run_on_gpu.sh", "--dry-run", "--cache", tmp_path / "cache"]
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = run.Folders(tmp_path / "out", tmp_path / "cache")
    summary = (folders.out / "summary.md").read_text()
    for part in run.SECONDS:
        for step in run.plan(part, folders, dry=False):
            assert f"| {step.name} | passed | " in summary
    assert "failed steps: none" in done.stdout
    assert "test_harness.py" in (folders.extras / "tests.log").read_text()
    listed = (folders.out / "results.csv").read_text()
    assert "fused GEMM + SDPA cudnn" in listed and "torch.compile" in listed and "FlexAttention" in listed


def test_the_parts_fit_the_time(tmp_path):
    folders = run.Folders(tmp_path, tmp_path)
    assert sum(run.SECONDS.values()) <= 700  # of fifteen minutes; the rest starts and ends the machine
    for part, seconds in run.SECONDS.items():
        steps = run.plan(part, folders, dry=False)
        assert len({step.name for step in steps}) == len(steps)
        assert all(step.seconds < seconds for step in steps)
        # The most valuable half has its time even where every step takes all that it may.
        assert sum(step.seconds for step in steps[: len(steps) // 2]) < seconds


def test_arguments_that_make_no_sense_are_refused():
    for words in (["--nonsense"], [], ["--part", "3"], ["--part", "1", "--dry-run"], ["--part", "1", "--kill-at", "3"]):
        with pytest.raises(SystemExit, match="2"):
            run.main(words)


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_run_keeps_what_it_finished(seed, tmp_path):
    out, moment = tmp_path / "out", random.Random(seed).uniform(0.3, 3.0)
    command = [sys.executable, "-m", "tests.benchmarks.fake_gpu_run", out, tmp_path / "cache", moment]
    status, count = killed_run(list(map(str, command)), out)
    assert status == -9 and count > 0


def test_a_failing_step_hides_no_other(tmp_path):
    good, bad = (f"{EMIT}emit(Event({event}))" for event in ("'fine'", "'bad', 'failed', 'why'"))
    status, out = run_steps(tmp_path, "raise SystemExit(3)", good, bad)
    assert status == 1
    summary = (out / "summary.md").read_text()
    assert "| step0 | FAILED: exit status 3 |" in summary and re.search(r"step1 \| passed \| \d+ \| 1 ok", summary)
    assert "failed steps: step0, step2" in summary and "step2 | failed | bad | why" in summary


def test_a_step_out_of_time_is_interrupted_and_keeps_its_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LEAST", 0)
    program = f"{EMIT}import time\nemit(Event('one'))\n"
    program += "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    emit(Event('two'))"
    status, out = run_steps(tmp_path, program, seconds=3)
    assert status == 1 and "FAILED: out of time after 3 s" in (out / "summary.md").read_text()
    assert (out / "finished.txt").read_text() == "step0\tok\tone\t\nstep0\tok\ttwo\t\n"


def test_a_step_that_ignores_the_interrupt_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LEAST", 0)
    monkeypatch.setattr(run, "GRACE", 0.5)
    status, out = run_steps(
        tmp_path, "import signal, time\nsignal.signal(2, signal.SIG_IGN)\ntime.sleep(600)", seconds=2
    )
    assert status == 1 and "FAILED: out of time after 2 s" in (out / "summary.md").read_text()


def test_without_time_a_step_is_left_out_and_named(tmp_path):
    status, out = run_steps(tmp_path, "print(1)", limit=run.RESERVE + 1)
    assert status == 0 and "| step0 | skipped: no time left | 0 | - |" in (out / "summary.md").read_text()


def test_failing_tests_are_reported_one_by_one(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the run's tests are no worker of these tests
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    words = ["-p", "benchmarks.gpu.events", "-p", "no:cacheprovider", str(tmp_path / "test_some.py")]
    program = f"import pytest\npytest.main({words})"
    status, out = run_steps(tmp_path, program)
    assert status == 1
    failures = (out / "failures.txt").read_text()
    assert "test_bad" in failures and "assert 1 == 2" in failures and "test_good" not in failures
    assert "ok\t" in (out / "finished.txt").read_text()


def test_the_archive_holds_everything_and_only_the_end_of_a_log(tmp_path):
    extras = tmp_path / "extras"
    extras.mkdir()
    (extras / "long.log").write_text("x" * 2 * LOG_BYTES + "end")
    record = Record(tmp_path / "out", extras, "a test", lambda rows: [f"{len(rows)} rows"])
    record.add("bench", Event("a case", rows=[ROW | {"metric": "graph_ms", "value": "1"}]))
    record.end_step("bench", "passed", 1.0)
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert set(archive.getnames()) == {"finished.txt", "results.csv", "summary.md", "extras/long.log"}
        log = archive.extractfile("extras/long.log").read()
        assert len(log) == LOG_BYTES and log.endswith(b"end")
        assert b"| bench | passed | 1 | 1 ok |" in archive.extractfile("summary.md").read()
    assert "1 rows" in (tmp_path / "out" / "summary.md").read_text()


def test_predictions_stand_beside_measurements(tmp_path):
    table = tmp_path / "predictions.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*ROW, "kernel", "predicted_us", "floor_us"])
        writer.writeheader()
        for shape in ("B1", "B2"):
            writer.writerow(ROW | {"shape": shape, "kernel": "total", "predicted_us": "40", "floor_us": "30"})
    rows = [ROW | {"metric": "graph_ms", "value": "0.08"}, ROW | {"metric": "eager_ms", "value": "0.2"}]
    lines = list(compare(rows, table))
    assert "| prune_tokens | B1 | forward | 40.0 us | 80.0 us | 2.00 (!) | 200.0 us | 30 us |" in lines
    assert "| prune_tokens | B2 | forward | 40.0 us | - | - | - | 30 us |" in lines
    assert list(compare(rows, tmp_path / "none.csv")) == [f"no predictions: {tmp_path / 'none.csv'} is not there"]


def test_libraries_are_those_of_the_sources(tmp_path):
    tree, folder = tmp_path / "tree", tmp_path / "lib"
    for name in ("csrc/op.cpp", "CMakeLists.txt", "setup.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    assert "has no libbridge_stg_cpu.so" in libraries.obstacle(tree, folder)
    folder.mkdir()
    for name in libraries.NAMES:
        (folder / name).touch()
    (folder / "source_hash").write_text(libraries.source_hash(tree))
    assert libraries.obstacle(tree, folder) is None
    (tree / "csrc/op.cpp").write_text("changed")
    assert "the sources changed" in libraries.obstacle(tree, folder)


def test_a_dry_run_needs_no_brought_libraries_and_a_part_names_theirs(tmp_path):
    folders = run.Folders(tmp_path / "out", tmp_path / "cache")
    for part in run.SECONDS:
        real, dry = (run.plan(part, folders, dry=dry) for dry in (False, True))
        assert [replace(s, command=(), tool=None) for s in real] == [replace(s, command=(), tool=None) for s in dry]
        assert all(step.tool is None for step in dry)
