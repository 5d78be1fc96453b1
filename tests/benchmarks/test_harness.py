"""The harness: who gets a time and who does not, what is measured, what is written."""

import csv

import pytest
import torch

from benchmarks.harness import command, machine, memory, relative_error
from benchmarks.harness.cases import FORWARD, FORWARD_BACKWARD, find_benchmarks
from benchmarks.harness.counting import counts_of
from benchmarks.harness.machine import Ceilings, folder_name
from benchmarks.harness.report import COLUMNS, markdown, summary, write_csv
from benchmarks.harness.runner import Settings, check_case, run_case
from benchmarks.harness.timing import Budget, Spread, interleaved, paired_ratio, rotation

from .fakes import ALL, OURS, PEER, doubling, provider

CPU = Settings(torch.device("cpu"), quick=True)


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.runner.measure_ceilings", lambda *_: Ceilings(1e10, 1e10))


def run(benchmark, mode=FORWARD, settings=CPU):
    case = benchmark.cases("cpu", True)[0]
    return {m.provider.name: m for m in run_case(benchmark, case, mode, settings, lambda line: None)}


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.harness.runner.measure_ceilings", lambda *_: Ceilings(1e10, 1e10))
        return run(doubling(), FORWARD_BACKWARD)


def test_only_who_agrees_gets_a_time(measured):
    assert {name: m.status for name, m in measured.items()} == {
        "ours": "ok",
        "peer": "ok",
        "wrong": "wrong",
        "short": "wrong",
        "no gradient": "wrong",
        "missing": "not available",
        "broken": "failed",
        "slow": "left out",
    }
    for m in measured.values():
        assert (m.seconds is not None) == (m.ratio is not None or m.provider.subject) == (m.status == "ok")


def test_a_check_times_nothing_and_asks_only_this_project():
    benchmark = doubling([OURS, PEER, provider("wrong", lambda x: 3 * x, ours=True)])
    case = benchmark.cases("cpu", True)[0]
    found = check_case(benchmark, case, FORWARD_BACKWARD, CPU, lambda line: None)
    assert [(m.provider.name, m.status) for m in found] == [("ours", "ok"), ("wrong", "wrong")]
    assert all(m.seconds is None for m in found)


def test_only_the_wanted_providers_run():
    case = doubling().cases("cpu", True)[0]
    found = run_case(doubling(), case, FORWARD, CPU, lambda line: None, lambda p: p.name in ("ours", "peer"))
    assert [m.provider.name for m in found] == ["ours", "peer"] and found[1].ratio is not None


def test_the_reason_is_told(measured):
    assert measured["wrong"].note == "relative error 5.0e-01"
    assert measured["short"].note == "of those with a gradient, output 0 has shape [4095] in place of [4096]"
    assert measured["no gradient"].note.startswith("gradient of x has relative error 5.0e-01")
    assert measured["missing"].note == "no such package"
    assert measured["broken"].note == "RuntimeError: it broke"


def test_gradients_do_not_matter_forward():
    assert run(doubling())["no gradient"].status == "ok"


def test_nan_never_agrees():
    found = run(doubling([OURS, provider("nan", lambda x: x * float("nan"))]))["nan"]
    assert found.status == "wrong" and found.note == "relative error inf"
    infinite = torch.tensor([float("inf"), 1.0])
    assert relative_error(infinite, infinite) == 0.0
    assert relative_error(torch.zeros(2), infinite) == float("inf")


def test_the_floor_is_the_larger_of_bytes_and_operations(measured):
    assert measured["ours"].floor == pytest.approx(8 * 4096 / 1e10)
    assert Ceilings(10.0, 2.0).floor_seconds(20, 10) == 5.0


def test_memory_sees_scratch_that_is_freed_again():
    if not memory.can_measure(torch.device("cpu")):
        pytest.skip("this system does not reset the high-water mark of a process")

    def scratch(x):
        return (torch.ones(2**23) * 2).sum() * 0 + 2 * x  # 64 MiB at its worst

    found = run(doubling([OURS, provider("scratch", scratch)]))
    assert found["scratch"].extra.median == pytest.approx(2**26, rel=0.1)
    assert found["ours"].extra.median < 2**20


def test_a_result_is_not_extra_memory_where_the_call_allocated_it():
    if not memory.can_measure(torch.device("cpu")):
        pytest.skip("this system does not reset the high-water mark of a process")
    found = run(doubling([OURS], sizes=(2**23,)))["ours"]
    assert found.peak.median == pytest.approx(2**25, rel=0.1)
    assert found.extra.median < 2**21
    assert memory.storage_bytes([x := torch.zeros(8), x[:4], None]) == 32


def test_the_inputs_outgrow_the_cache(monkeypatch):
    seen = []
    monkeypatch.setattr("benchmarks.harness.runner.cache_bytes", lambda device: 2**16)
    run(doubling([provider("ours", lambda x: seen.append(x.data_ptr()) or 2 * x, ours=True, subject=True)]))
    assert len(set(seen)) == 3  # of the eight sets of 16 KiB that twice the cache takes, a quick run has three


def test_ratios_are_of_the_same_round():
    ratio = paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0])
    assert ratio.median == 2.0 and ratio.iqr == 0.5
    assert Spread.of([3.0]) == Spread(3.0, 0.0)


def test_the_order_rotates_both_ways():
    names, turns = ["a", "b", "c"], []
    for order, _ in zip(rotation(names), range(6), strict=False):
        assert sorted(order) == names
        turns.append("".join(order))
    assert turns == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_rounds_follow_the_budget():
    assert Budget(1.0, least=3, most=9).rounds(0.2) == 5
    assert Budget(1.0, least=3, most=9).rounds(10.0) == 3
    assert Budget(1.0, least=3, most=9).rounds(0.0) == 9
    samples = interleaved({"a": lambda: 1.0, "b": lambda: 2.0}, Budget(0.0, least=4, most=4))
    assert samples == {"a": [1.0] * 4, "b": [2.0] * 4}


def test_kernels_and_syncs_are_counted_inside_the_call():
    events = [
        ("cudaLaunchKernel", 0, 1),
        ("bridge_stg_bench_call", 10, 20),
        ("cuLaunchKernelEx", 11, 12),
        ("cudaLaunchKernelExC", 13, 14),
        ("cudaMemcpyAsync", 14, 15),
        ("cudaStreamSynchronize", 15, 16),
        ("bridge_stg_bench_call", 12, 40),  # on the device
        ("cudaDeviceSynchronize", 21, 30),
    ]
    assert counts_of(events) == (2, 1)
    assert counts_of([("bridge_stg_bench_call", 0, 1), ("aten::mul", 0, 1)]) is None


def test_csv(measured, tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGE_STG_REVISION", "abc")
    machine.revision.cache_clear()
    write_csv(tmp_path / "x.csv", "doubling", "a machine, 1 threads", list(measured.values()))
    machine.revision.cache_clear()
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert {row["revision"] for row in rows} == {"abc"} and {row["device"] for row in rows} == {"a machine, 1 threads"}
    assert all(f"torch {torch.__version__.split('+')[0]}" in row["versions"] for row in rows)
    values = {(row["provider"], row["metric"]): row["value"] for row in rows}
    assert float(values["ours", "time_ms"]) > 0 and ("ours", "ratio") not in values
    assert float(values["peer", "ratio"]) > 0 and float(values["peer", "floor_share"]) > 0
    assert [row["metric"] for row in rows if row["provider"] == "wrong"] == ["status"]
    assert ("missing", "status", "not available", "no such package") in {
        (row["provider"], row["metric"], row["value"], row["spread"]) for row in rows
    }


def test_markdown(measured):
    page = markdown("doubling", "a machine", list(measured.values()))
    assert "## n4096, float32, forward+backward" in page
    assert "| wrong | - | - | - | - | - | wrong: relative error 5.0e-01 |" in page
    assert "| missing | - | - | - | - | - | not available: no such package |" in page
    line = summary(list(measured.values()))[-1]
    assert line.startswith("| n4096 | float32 | forward+backward |") and "| peer, " in line


def run_command(monkeypatch, tmp_path, benchmark, **options):
    monkeypatch.setattr(command, "find_benchmarks", lambda *_: [benchmark])
    return command.run_benchmarks([], quick=True, out=tmp_path, device="cpu", echo=lambda line: None, **options)


def test_command_writes_results_and_plots(monkeypatch, tmp_path):
    text, code = run_command(monkeypatch, tmp_path, doubling(ALL[:3], modes=(FORWARD,)))
    folder = tmp_path / folder_name(machine.device_label(torch.device("cpu")))
    assert code == 0 and str(folder) in text
    assert {path.name for path in folder.iterdir()} == {"doubling.csv", "doubling.md", "doubling.png"}


def test_command_fails_when_ours_is_wrong(monkeypatch, tmp_path):
    wrong = provider("ours", lambda x: 3 * x, ours=True, subject=True)
    monkeypatch.setattr(command, "can_plot", lambda: False)
    text, code = run_command(monkeypatch, tmp_path, doubling([wrong, PEER], modes=(FORWARD,)))
    assert code == 1 and "| n4096 | float32 | forward | wrong |" in text


def test_command_names_what_it_had_no_time_for(monkeypatch, tmp_path):
    text, code = run_command(monkeypatch, tmp_path, doubling(), seconds=-1.0)
    assert code == 0 and "left out for lack of time: doubling: n4096, float32, forward+backward" in text


def test_command_refuses_what_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match=r"'nothing' has no benchmark; .* has attend_memory, "):
        find_benchmarks(command.FOLDER, "benchmarks", ["nothing"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        command.run_benchmarks([], device="cuda")


@pytest.mark.gpu
def test_on_cuda_graphs_are_captured_and_syncs_counted():
    waits = provider("waits", lambda x: 2 * x * (1.0 if float(x[0]) < 1e9 else 0.0))
    settings = Settings(torch.device("cuda"), quick=True)
    found = run(doubling([OURS, PEER, waits]), FORWARD_BACKWARD, settings)
    assert [m.status for m in found.values()] == ["ok"] * 3
    assert found["ours"].captured and found["ours"].counts.kernels >= 2 and found["ours"].counts.syncs == 0
    assert not found["waits"].captured and found["waits"].counts.syncs >= 1
    assert found["ours"].seconds.median > 0 and found["ours"].eager_seconds.median > 0
    assert found["waits"].ratio is not None and found["ours"].extra.median < 2**20
