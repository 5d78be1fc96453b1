"""Kills dry runs at random seconds, and looks whether what they had finished is in the archive that they leave."""

from __future__ import annotations

import argparse
import csv
import io
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .record import ARCHIVE, MOST_BYTES

ROOT = Path(__file__).parents[2]
MOST_FILES = 8


def killed_run(command: Sequence[str], out: Path) -> tuple[int, int]:
    """Run a command that kills itself, and check what it left.

    Args:
        command: a run of `benchmarks.gpu.run` with this `out`.

    Returns:
        (exit status, cases that were finished).

    Raises:
        AssertionError: the archive does not open or lacks a finished case, or the folder is more than comes back.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    announced = [line.removeprefix("finished: ") for line in done.stdout.splitlines() if line.startswith("finished: ")]
    files = list(out.iterdir()) if out.is_dir() else []
    assert len(files) <= MOST_FILES and all(path.stat().st_size <= MOST_BYTES for path in files), files
    texts = {"finished.txt": ""}
    if (out / ARCHIVE).is_file():
        with tarfile.open(out / ARCHIVE) as archive:
            for member in archive:
                file = archive.extractfile(member)
                texts[member.name] = file.read().decode() if file else ""
    kept = texts["finished.txt"].splitlines()
    assert kept[: len(announced)] == announced, f"{set(announced) - set(kept)} are not in the archive"
    if "results.csv" in texts:
        rows = list(csv.DictReader(io.StringIO(texts["results.csv"])))
        assert all(None not in row.values() for row in rows), "a row of results.csv is cut off"
    failures = texts.get("failures.txt", "")
    assert all(line in failures for line in announced if line.split("\t")[1] == "failed"), "a failure has no text"
    return done.returncode, len(announced)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.rehearse", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--within", type=float, default=60.0, help="seconds; each kill is at a random one of them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seconds = random.Random(options.seed)
    for number in range(options.kills):
        moment = seconds.uniform(0.5, options.within)
        work = Path(tempfile.mkdtemp())
        command = [sys.executable, "-m", "benchmarks.gpu.run", "--dry-run", "--kill-at", f"{moment:.2f}"]
        try:
            status, count = killed_run([*command, "--out", f"{work}/out", "--cache", f"{work}/cache"], work / "out")
        finally:
            shutil.rmtree(work)
        print(
            f"{number + 1}: killed after {moment:.1f} s (exit status {status}), all {count} finished cases kept",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
