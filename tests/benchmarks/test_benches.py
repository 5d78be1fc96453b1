"""Every `bench_<op>.py`: its reference agrees with itself, a wrong output is refused, all providers are listed."""

import importlib

import pytest
import torch

from benchmarks.harness import command
from benchmarks.harness.cases import FORWARD

OPS = ("attend_memory", "patchify_frames", "prune_tokens")


@pytest.fixture(params=OPS)
def benchmark(request):
    return importlib.import_module(f"benchmarks.bench_{request.param}").BENCHMARK


def test_the_gate_lets_the_reference_through_and_nothing_else(benchmark):
    device = torch.device("cpu")
    for case in benchmark.cases("cpu", True):
        inputs = benchmark.inputs(case, device, torch.Generator().manual_seed(0))
        expected = benchmark.reference(case, inputs)
        assert benchmark.disagreement(case, inputs, expected, expected) is None
        off = (expected[0] + 0.02, *expected[1:])
        assert benchmark.disagreement(case, inputs, off, expected) is not None
        nan = (torch.full_like(expected[0], float("nan")), *expected[1:])
        assert benchmark.disagreement(case, inputs, nan, expected) is not None


def test_the_floor_covers_reading_the_inputs(benchmark):
    for kind in ("cpu", "cuda"):
        for case in benchmark.cases(kind, False):
            work = [benchmark.work(case, mode) for mode in case.modes]
            assert all(w.bytes > 0 and w.flops > 0 for w in work)
            assert case.modes[0] == FORWARD and all(w.bytes > work[0].bytes for w in work[1:])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_one_subject_and_its_peers(benchmark, kind):
    for case in benchmark.cases(kind, False):
        providers = benchmark.providers(case, torch.device(kind))
        assert [p.subject for p in providers].count(True) == 1
        assert len({p.name for p in providers}) == len(providers)
        assert any(p.ours for p in providers) and any(not p.ours for p in providers)


def test_prune_tokens_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "can_plot", lambda: False)
    text, code = command.run_benchmarks(
        ["prune_tokens"], quick=True, out=tmp_path, device="cpu", echo=lambda line: None
    )
    assert code == 0 and "learned gate, " in text
    page = next(tmp_path.glob("*/prune_tokens.md")).read_text()
    assert "wrong" not in page and "failed" not in page
    assert "torch.compile | - | - | - | - | - | left out: " in page
