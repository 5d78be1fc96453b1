"""The command of `bridge-stg bench` and `python -m benchmarks`: which ops, how thorough, where the results go."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .cases import Benchmark, Case, find_benchmarks
from .machine import device_label, folder_name
from .plots import can_plot, write_plots
from .report import markdown, summary, write_csv
from .runner import Measured, Settings, run_case

FOLDER = Path(__file__).parents[1]
_PACKAGE = __package__.rpartition(".")[0]


def run_benchmarks(
    ops: Sequence[str],
    *,
    quick: bool = False,
    out: Path | None = None,
    device: str | None = None,
    seconds: float | None = None,
    list_only: bool = False,
    echo: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> tuple[str, int]:
    """Run the benchmarks and write `<out>/<device>/<op>.csv`, `.md` and `.png`, after every case anew.

    Args:
        ops: names of benchmarks, or "all".
        quick: small shapes, few rounds, nothing that compiles for long.
        out: folder of the results; `benchmarks/results` if None.
        device: "cpu" or "cuda"; CUDA where there is one if None.
        seconds: begin no case after that long; what is left out is named. The first case of every op comes first.
        list_only: prepare nothing and run nothing: list cases and providers.
        echo: takes a line of progress.

    Returns:
        (what belongs on stdout, exit code: 1 when one of this project's providers was wrong or failed).

    Raises:
        ValueError: an op without a benchmark, a device that is not here.
    """
    chosen = find_benchmarks(FOLDER, _PACKAGE, ops)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {kind!r}.")
    if list_only:
        return "\n".join(line for benchmark in chosen for line in _listing(benchmark, kind, quick)), 0
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, and torch finds no CUDA device.")
    settings = Settings(torch.device(kind), quick)
    label = device_label(settings.device)
    folder = (out or FOLDER / "results") / folder_name(label)
    folder.mkdir(parents=True, exist_ok=True)
    if not can_plot():
        echo("matplotlib is not installed: no plots.")
    started = time.monotonic()
    results: dict[str, list[Measured]] = {benchmark.op: [] for benchmark in chosen}
    left_out = []
    for benchmark, case, mode in _queue(chosen, settings):
        name = f"{benchmark.op}: {case.shape}, {str(case.dtype).removeprefix('torch.')}, {mode}"
        if seconds is not None and time.monotonic() - started > seconds:
            left_out.append(name)
            continue
        echo(name)
        found = results[benchmark.op]
        found += run_case(benchmark, case, mode, settings, echo)
        # A run that is cut short leaves what it has.
        write_csv(folder / f"{benchmark.op}.csv", benchmark.op, label, found)
        (folder / f"{benchmark.op}.md").write_text(markdown(benchmark.op, label, found), encoding="utf-8")
    pages = []
    for op, found in results.items():
        if can_plot():
            write_plots(folder, op, label, found)
        pages += [f"{op} on {label}", *summary(found), ""]
    pages += [f"left out for lack of time: {name}" for name in left_out]
    failed = any(m.provider.ours and m.status in ("wrong", "failed") for found in results.values() for m in found)
    return "\n".join([*pages, f"results in {folder}"]), int(failed)


def _queue(chosen: Sequence[Benchmark], settings: Settings) -> Iterator[tuple[Benchmark, Case, str]]:
    """The first case of every op, the second of every op, and so on."""
    columns = [[(b, case) for case in b.cases(settings.device.type, settings.quick)] for b in chosen]
    for line in itertools.zip_longest(*columns):
        for benchmark, case in filter(None, line):
            for mode in case.modes:
                yield benchmark, case, mode


def _listing(benchmark: Benchmark, kind: str, quick: bool) -> list[str]:
    lines = [benchmark.op]
    for case in benchmark.cases(kind, quick):
        lines.append(f"  {case.shape}, {str(case.dtype).removeprefix('torch.')}, {' and '.join(case.modes)}")
        # Backends are asked for their limits on meta tensors, so that a CUDA listing needs no device.
        lines += [f"    {provider.name}" for provider in benchmark.providers(case, torch.device(kind))]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m benchmarks`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="names of benchmarks, or all (the default)")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds, nothing that compiles long")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results when left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="CUDA where there is one when left out")
    parser.add_argument("--seconds", type=float, help="begin no case after that long, and name what is left out")
    parser.add_argument("--list", action="store_true", help="list cases and providers, run nothing")
    options = parser.parse_args(arguments)
    try:
        text, code = run_benchmarks(
            options.ops,
            quick=options.quick,
            out=options.out,
            device=options.device,
            seconds=options.seconds,
            list_only=options.list,
        )
    except ValueError as error:
        parser.error(str(error))
    print(text)
    return code
