"""What a run leaves under its output folder, complete after every case: five small files, each replaced at once."""

from __future__ import annotations

import csv
import io
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .events import Event

LOG_BYTES = 256 * 2**10  # kept of the end of a log
FAILURES = "failures.txt"
ARCHIVE = "results.tar.gz"
# Files that come back from the machine: at most 8, of 16 MiB at most. The archive repeats the others.
MOST_BYTES = 16 * 2**20

Row = Mapping[str, str]


class Record:
    """The results of one run.

    Args:
        out: folder of finished.txt, failures.txt, results.csv, summary.md and results.tar.gz.
        extras: folder whose files (logs, tuned tables, profiles) go into the archive.
        heading: first line of the summary.
        conclude: rows of the results -> further lines of the summary.
    """

    def __init__(
        self, out: Path, extras: Path, heading: str, conclude: Callable[[Sequence[Row]], Iterable[str]]
    ) -> None:
        self.out, self.extras, self.heading, self.conclude = out, extras, heading, conclude
        self.started = time.monotonic()
        self.finished: list[str] = []
        self.rows: list[Row] = []
        self.steps: list[tuple[str, str, float]] = []
        self.counts: dict[str, dict[str, int]] = {}
        out.mkdir(parents=True, exist_ok=True)
        for name in (FAILURES, ARCHIVE, "finished.txt", "results.csv", "summary.md"):
            (out / name).unlink(missing_ok=True)
        self.write()

    def add(self, step: str, event: Event) -> None:
        """Record a finished case or test, rewrite everything, and only then announce it."""
        line = f"{step}\t{event.status}\t{event.name}\t{event.note}".replace("\n", " ")
        self.finished.append(line)
        self.rows += event.rows
        counts = self.counts.setdefault(step, {})
        counts[event.status] = counts.get(event.status, 0) + 1
        if event.status == "failed":
            with (self.out / FAILURES).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n{event.text}\n")
        self.write()
        print(f"finished: {line}", flush=True)

    def end_step(self, step: str, result: str, seconds: float) -> None:
        """Record how a step ended."""
        self.steps.append((step, result, seconds))
        self.write()
        print(f"step: {step} {result}, {seconds:.0f} s", flush=True)

    @property
    def failed(self) -> list[str]:
        """Steps that failed, or in which a case or test did."""
        return [
            step
            for step, result, _ in self.steps
            if result.startswith("FAILED") or self.counts.get(step, {}).get("failed")
        ]

    def write(self) -> None:
        """Replace all files: none is ever half written, and the archive is never behind the others by a case."""
        texts = {"finished.txt": "".join(f"{line}\n" for line in self.finished), "summary.md": self._summary()}
        if self.rows:
            table = io.StringIO()
            writer = csv.DictWriter(table, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            texts["results.csv"] = table.getvalue()
        for name, text in texts.items():
            _replace(self.out / name, text.encode())
        _replace(self.out / ARCHIVE, self._archive())

    def _archive(self) -> bytes:
        memory = io.BytesIO()
        with tarfile.open(fileobj=memory, mode="w:gz", compresslevel=3) as archive:
            for path in sorted(self.out.iterdir()):
                if path.suffix in (".txt", ".csv", ".md"):
                    _pack(archive, path.name, path.read_bytes())
            for path in sorted(self.extras.iterdir()) if self.extras.is_dir() else []:
                _pack(archive, f"extras/{path.name}", _end_of(path))
        if len(memory.getvalue()) > MOST_BYTES:
            raise ValueError(
                f"the archive has {len(memory.getvalue())} bytes, more than the {MOST_BYTES} that come back."
            )
        return memory.getvalue()

    def _summary(self) -> str:
        lines = [f"# {self.heading}", "", "| step | result | seconds | cases |", "|---|---|---|---|"]
        ended = {step for step, _, _ in self.steps}
        running = [(step, "running", 0.0) for step in self.counts if step not in ended]
        for step, result, seconds in [*self.steps, *running]:
            counts = ", ".join(f"{count} {status}" for status, count in sorted(self.counts.get(step, {}).items()))
            lines.append(f"| {step} | {result} | {seconds:.0f} | {counts or '-'} |")
        lines += ["", *self.conclude(self.rows)]
        failed = [line for line in self.finished if line.split("\t")[1] == "failed"]
        lines += ["", *(f"- failed: {line.replace(chr(9), ' | ')}" for line in failed[:50])]
        elapsed = time.monotonic() - self.started
        lines += ["", f"{elapsed:.0f} s in all; failed steps: {', '.join(self.failed) or 'none'}"]
        return "\n".join(lines) + "\n"


def _end_of(path: Path) -> bytes:
    """The end of a log, all of any other file."""
    with path.open("rb") as file:
        if path.suffix == ".log":
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return file.read()


def _pack(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(content), int(time.time())
    archive.addfile(member, io.BytesIO(content))


def _replace(path: Path, content: bytes) -> None:
    """Write beside and rename: a reader, or a machine that dies here, finds the old file or the new one."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_bytes(content)
    os.replace(beside, path)
