"""Everything that needs a GPU, in two parts that fit fifteen minutes together: `benchmarks/run_on_gpu.sh --part 1|2`.

A part is a list of steps, by value. A step is a process that reports every finished case (`events`); after each of
them all results are rewritten (`record`), so that a machine that disappears takes nothing finished with it. Both parts
share a folder with the compiled libraries and kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .compare import PREDICTIONS, compare
from .events import VARIABLE, Event
from .libraries import build, obstacle
from .record import Record

ROOT = Path(__file__).parents[2]
SECONDS = {1: 400, 2: 300}
RESERVE = 8  # of a part, for the end of the last step
GRACE = 5  # between SIGINT and SIGKILL
LEAST = 8  # a step that has less is left out
TREE = ("benchmarks", "bridge_stg", "csrc", "tests", "triton_kernels", "docs", "setup.py", "pyproject.toml")
TREE += ("CMakeLists.txt", "README.md", "LICENSE", "CHANGELOG.md")
# Tests that take long: they run when the others are through.
LATE_TESTS = "test_tune or two_billion"
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__waves_per_multiprocessor",
)


@dataclass(frozen=True)
class Step:
    """One process of a part.

    Attributes:
        name: of its log.
        seconds: most that it may take; it is interrupted then, and killed a little later.
        command: its words; "{seconds}" becomes the seconds after which it should begin no further case.
        tool: a program that has to be on PATH, without which the step is left out.
        environment: variables of its own.
    """

    name: str
    seconds: float
    command: Sequence[str]
    tool: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Folders:
    """Where a run reads and writes: `out` is kept, `cache` is shared by the parts of one machine."""

    out: Path
    cache: Path

    @property
    def tree(self) -> Path:
        return self.cache / "tree"

    @property
    def libraries(self) -> Path:
        return self.cache / "libraries"

    @property
    def extras(self) -> Path:
        return self.cache / "extras"


def plan(part: int, folders: Folders, dry: bool) -> list[Step]:
    """The steps of a part, most valuable first. A dry run does the same on the CPU, with small cases."""
    python = sys.executable
    device = "cpu" if dry else "cuda"

    def module(name: str, *words: str) -> list[str]:
        return [python, "-m", f"benchmarks.gpu.{name}", *words]

    def cases(what: str, *words: str) -> list[str]:
        if dry and what == "bench":
            what, where = "list", "cuda"
        else:
            where = device
        return module("cases", what, *words, "--device", where, "--seconds", "{seconds}", "--out", str(folders.extras))

    def tests(name: str, seconds: float, workers: int, which: str, files: Sequence[Path]) -> Step:
        words = [python, "-m", "pytest", "-m", "gpu", "-k", which, "-p", "benchmarks.gpu.events"]
        words += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        words += ["--collect-only"] if dry else ["-n", str(workers)] if _has_module("xdist") else []
        return Step(name, seconds, [*words, *(str(path.relative_to(folders.tree)) for path in files)])

    libraries = module("libraries", "--tree", str(folders.tree), "--folder", str(folders.libraries))
    if part == 1:
        files = _gpu_tests(folders.tree)
        late = [path for path in files if any(word in path.read_text() for word in LATE_TESTS.split(" or "))]
        return [
            Step("preflight", 40, module("preflight", *(["--dry-run"] if dry else []))),
            Step("libraries", 150, [python, "setup.py", "build_ext", "--inplace", "--help"] if dry else libraries),
            Step("warm", 70, module("warm", "--device", device, "--processes", "2" if dry else "14")),
            Step("check", 50, cases("check")),
            Step("targets", 90, cases("bench")),
            Step("targets_slow_peers", 60, cases("bench", "--peers", "slow")),
            tests("tests", 150, 12, f"not ({LATE_TESTS})", files),
            Step("others", 60, cases("bench", "--set", "others")),
            tests("late_tests", 60, 2, LATE_TESTS, late),
        ]
    sanitizer = [] if dry else ["compute-sanitizer", "--error-exitcode", "86"]
    # Without torch's own pool every tensor is an allocation of its own, and its end is the end.
    apart = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    ncu = ["ncu", "--csv", "--clock-control", "none", "--profile-from-start", "off", "--metrics", ",".join(COUNTERS)]
    tuned = str(folders.extras / "tuned_prune_tokens.json")
    tune = [python, "-m", "bridge_stg", "tune", "prune_tokens", "--out", tuned, "--shape", "64,576,1024,16"]
    return [
        Step("libraries", 100, [python, "setup.py", "build_ext", "--inplace", "--help"] if dry else libraries),
        Step("profile", 70, [*([] if dry else ncu), *cases("profile")], None if dry else "ncu"),
        *(
            Step(
                tool,
                60,
                [*sanitizer, *(["--tool", tool] if sanitizer else []), *module("sanitize", "--device", device)],
                sanitizer[0] if sanitizer else None,
                apart,
            )
            for tool in ("memcheck", "racecheck")
        ),
        Step("crossovers", 90, cases("bench", "--set", "crossovers")),
        Step("tune", 90, [*tune, *(["--help"] if dry else [])]),
    ]


def _gpu_tests(tree: Path) -> list[Path]:
    """Files with GPU tests; without PyAV the rooms above the ops cannot even be collected."""
    found = [path for path in sorted((tree / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    rooms = {"benchmarks", "modules", "ops", "triton_kernels"}
    return [path for path in found if _has_module("av") or path.relative_to(tree).parts[1] in rooms]


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def stage(tree: Path) -> None:
    """Copy the sources: the package runs from there, with `triton_kernels` inside as an installation has it."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "lib", "results")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=left_out)
        else:
            shutil.copy(source, tree / name)
    if PREDICTIONS.is_file():
        (tree / "benchmarks" / "results").mkdir()
        shutil.copy(PREDICTIONS, tree / "benchmarks" / "results")
    (tree / "bridge_stg" / "triton_kernels").symlink_to("../triton_kernels")


def run(steps: Sequence[Step], folders: Folders, seconds: float, heading: str, environment: Mapping[str, str]) -> int:
    """Run the steps within `seconds` in all, and keep the record; 1 where any of them failed.

    Args:
        environment: variables of every step, besides those of this process.
    """
    deadline = time.monotonic() + seconds - RESERVE
    folders.extras.mkdir(parents=True, exist_ok=True)
    record = Record(folders.out, folders.extras, heading, lambda rows: compare(rows))
    environment = {**os.environ, **environment}
    for step in steps:
        limit = min(step.seconds, deadline - time.monotonic())
        if step.tool is not None and shutil.which(step.tool) is None:
            record.end_step(step.name, f"skipped: {step.tool} is not on PATH", 0.0)
        elif limit < LEAST:
            record.end_step(step.name, "skipped: no time left", 0.0)
        else:
            started = time.monotonic()
            result = _run_step(step, limit, folders, environment, record)
            record.end_step(step.name, result, time.monotonic() - started)
    print((folders.out / "summary.md").read_text(encoding="utf-8"))
    return int(bool(record.failed))


def _run_step(step: Step, limit: float, folders: Folders, environment: Mapping[str, str], record: Record) -> str:
    """Run one step, record its events as they come, and say how it ended."""
    events = folders.cache / "events.jsonl"
    events.write_bytes(b"")
    command = [word.replace("{seconds}", f"{max(1.0, limit - 15):.0f}") for word in step.command]
    own = {**environment, VARIABLE: str(events), **dict(step.environment)}
    print(f"== {step.name} ({limit:.0f} s): {' '.join(command)}", flush=True)
    started, seen, stopping = time.monotonic(), 0, 0
    with (folders.extras / f"{step.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folders.tree, env=own, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_follow_parent
        )
        while True:
            status = process.poll()
            seen = _take(events, seen, step.name, record)
            if status is not None:
                break
            over = time.monotonic() - started - limit
            if over > GRACE * stopping and stopping < 2:
                os.killpg(process.pid, (signal.SIGINT, signal.SIGKILL)[stopping])
                stopping += 1
            time.sleep(0.05)
    if stopping:
        return f"FAILED: out of time after {limit:.0f} s"
    return "passed" if status == 0 else f"FAILED: exit status {status}"


def _take(events: Path, seen: int, step: str, record: Record) -> int:
    """Record what was appended after the first `seen` bytes; returns how many are seen now."""
    with events.open("rb") as file:
        file.seek(seen)
        new = file.read()
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.splitlines():
        record.add(step, Event(**json.loads(line)))
    return seen + len(whole)


def _follow_parent() -> None:
    """In the child: a process group of its own, and death with the run (Linux's parent-death signal)."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def variables(folders: Folders) -> dict[str, str]:
    """What every step needs to know, the revision of the sources among it."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    try:
        revision = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    return {
        "BRIDGE_STG_REVISION": os.environ.get("BRIDGE_STG_REVISION", revision),
        "PYTHONPATH": str(folders.tree),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(folders.cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folders.cache / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/run_on_gpu.sh", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", type=int, choices=(1, 2), help="run this part on a GPU; 1 first, on the same machine")
    what.add_argument("--build", action="store_true", help="compile the libraries into the cache; needs nvcc, no GPU")
    what.add_argument("--dry-run", action="store_true", help="walk both parts on the CPU, with small cases")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "benchmarks/results/run")))
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "gpu", help="shared by both parts")
    parser.add_argument("--kill-at", type=float, metavar="SECONDS", help="of a dry run: die then, without a word")
    options = parser.parse_args(arguments)
    if options.kill_at is not None and not options.dry_run:
        parser.error("--kill-at needs --dry-run.")
    folders = Folders(options.out.resolve(), options.cache.resolve())
    if options.kill_at is not None:
        timer = threading.Timer(options.kill_at, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    stage(folders.tree)
    if options.build:
        if obstacle(folders.tree, folders.libraries) is not None:
            build(folders.tree, folders.libraries)
        print(f"the libraries are in {folders.libraries}")
        return 0
    shutil.rmtree(folders.extras, ignore_errors=True)
    environment = variables(folders)
    if options.dry_run:
        # An idle machine takes less than a minute; a busy one is given longer.
        steps = [replace(step, seconds=600) for part in SECONDS for step in plan(part, folders, dry=True)]
        return run(steps, folders, 3000, "A dry run, on the CPU", environment)
    environment["BRIDGE_STG_LIBRARY_FOLDER"] = str(folders.libraries)
    steps = plan(options.part, folders, dry=False)
    return run(steps, folders, SECONDS[options.part], f"Part {options.part}", environment)


if __name__ == "__main__":
    sys.exit(main())
