"""Checks, times, profiles or lists the cases of a GPU run: `python -m benchmarks.gpu.cases check|bench|profile|list`.

Every case is an event of the run, and leaves a page a benchmark in the folder of the results.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..harness.cases import Benchmark, Case, Provider, find_benchmarks
from ..harness.command import FOLDER
from ..harness.machine import device_label
from ..harness.report import markdown, rows
from ..harness.runner import Measured, Settings, bound_calls, check_case, run_case
from .events import Event, emit

OPS = ("prune_tokens", "patchify_frames", "attend_memory")
# The shapes that have goals and predictions, by value.
TARGETS = (
    "B64 N576 D1024 Q16 k144",
    "T64 1080x1920 to 560x1008",
    "L6 B1 M8192 C256 H8 Q16",
    "L6 B16 M8192 C256 H8 Q16",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PEERS: dict[str, Callable[[Provider], bool]] = {
    "cheap": lambda provider: not provider.slow_start,
    "slow": lambda provider: provider.slow_start or provider.subject,
    "none": lambda provider: provider.ours,
}


def chosen(name: str, settings: Settings) -> Iterator[tuple[Benchmark, Case, str]]:
    """(benchmark, case, mode) of a set, the first of every benchmark first; on the CPU its quick cases."""
    kind = settings.device.type
    lists = []
    for benchmark in sorted(find_benchmarks(FOLDER, "benchmarks", OPS), key=lambda found: OPS.index(found.op)):
        cases = benchmark.cases(kind, settings.quick)
        if kind == "cuda":
            cases = [case for case in cases if _set_of(case) == name]
        lists.append([(benchmark, case) for case in cases])
    for line in itertools.zip_longest(*lists):
        for benchmark, case in filter(None, line):
            for mode in case.modes:
                yield benchmark, case, mode


def _set_of(case: Case) -> str:
    if case.series is not None:
        return "crossovers"
    return "targets" if case.shape in TARGETS and case.dtype == torch.bfloat16 else "others"


def run(what: str, name: str, peers: str, settings: Settings, seconds: float, out: Path | None) -> int:
    """Go through the cases until the time is up; 1 where one of this project's providers was wrong or failed."""
    label = "no device" if what == "list" else device_label(settings.device)
    pages: dict[str, list[Measured]] = {}
    started, failed = time.monotonic(), False
    cases = list(chosen(name, settings))
    if what == "check" and settings.device.type == "cuda":
        cases = [(b, replace(case, dtype=dtype), mode) for dtype in DTYPES for b, case, mode in cases]
    for benchmark, case, mode in cases:
        title = f"{benchmark.op}: {case.shape}, {str(case.dtype).removeprefix('torch.')}, {mode}"
        if time.monotonic() - started > seconds:
            emit(Event(title, "skipped", "no time left"))
            continue
        print(title, flush=True)
        found: list[Measured] = []
        if what == "check":
            found = check_case(benchmark, case, mode, settings, print)
        elif what == "bench":
            found = run_case(benchmark, case, mode, settings, print, PEERS[peers])
        elif what == "list":  # backends are asked for their limits on meta tensors, which needs no device
            providers = filter(PEERS[peers], benchmark.providers(case, settings.device))
            found = [Measured(provider, case, mode, "left out", "only listed") for provider in providers]
        else:
            profile(benchmark, case, mode, settings)
        wrong = [
            f"{m.provider.name}: {m.status}, {m.note}"
            for m in found
            if m.provider.ours and m.status in ("wrong", "failed")
        ]
        failed |= bool(wrong)
        table = list(rows(benchmark.op, label, found)) if what in ("bench", "list") else []
        if table and out is not None:
            page = pages.setdefault(benchmark.op, [])
            page += found
            (out / f"{name}-{peers}-{benchmark.op}.md").write_text(markdown(benchmark.op, label, page), "utf-8")
        emit(Event(title, "failed" if wrong else "ok", "; ".join(wrong), rows=table))
    return int(failed)


def profile(benchmark: Benchmark, case: Case, mode: str, settings: Settings) -> None:
    """Call the default provider once to compile, and once between the profiler's start and stop."""
    subject = next(p for p in benchmark.providers(case, settings.device) if p.subject)
    first, second = bound_calls(benchmark, case, mode, settings, subject)
    first()
    if settings.device.type == "cpu":
        second()
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    second()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cases", description=__doc__)
    parser.add_argument("what", choices=("check", "bench", "profile", "list"))
    parser.add_argument("--set", choices=("targets", "crossovers", "others"), default="targets")
    parser.add_argument("--peers", choices=tuple(PEERS), default="cheap")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no case after that long")
    parser.add_argument("--out", type=Path, help="folder of the pages")
    options = parser.parse_args(arguments)
    settings = Settings(torch.device(options.device), quick=options.device == "cpu")
    return run(options.what, options.set, options.peers, settings, options.seconds, options.out)


if __name__ == "__main__":
    sys.exit(main())
