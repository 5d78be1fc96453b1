"""Results of a long list, one JSON line each: written by any number of processes, resumed after any interruption.

Every process appends its results to a part of its own in a folder beside the output. A result counts as done when its
line stands whole in any part, whoever wrote it; the process that finds all of them done merges the parts into the
output in the order of the list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from .errors import OutputError, SampleError
from .files import atomic_path, ensure_writable_folder, write_text


class Parts:
    """The results of a list of ids, on their way into `out`. A context manager: it closes the part of this process.

    Args:
        out: where the results go when all are there; the parts are in `out` with `.parts` behind it.
        ids: of all results, in order, without doubles.
        rank, world_size: this process does the ids whose place modulo `world_size` is `rank`. A later run may have
            other numbers.
        split: which file a finished line goes to, None meaning `out`; the others are made where they have a line.

    Raises:
        OutputError: the output cannot be written.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        ids: Sequence[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        split: Mapping[str, Path] | None = None,
    ) -> None:
        self.out = Path(out)
        self.folder = ensure_writable_folder(self.out.with_name(f"{self.out.name}.parts"))
        self.ids = list(ids)
        self.mine = self.ids[rank::world_size]
        self.split = dict(split or {})
        self._path = self.folder / f"{rank}-of-{world_size}.jsonl"
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def done(self) -> dict[str, str]:
        """Line of every id that is done; the first found of an id is kept.

        Raises:
            SampleError: there are results that are not of this list.
        """
        lines: dict[str, str] = {}
        for path in (self.out, *self.split.values(), *sorted(self.folder.glob("*.jsonl"))):
            for name, line in _whole_lines(path):
                lines.setdefault(name, line)
        if foreign := sorted(lines.keys() - set(self.ids)):
            raise SampleError(
                f"{self.out} or its parts hold {foreign[0]!r}, which is not asked for: they belong to another list."
            )
        return lines

    def append(self, record: Mapping[str, Any]) -> None:
        """Write down one result; the rest of a line that an interruption cut off is dropped."""
        if self._file is None:
            self._file = open(self._path, "ab+")  # noqa: SIM115 - closed by __exit__
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def merge(self) -> dict[str, dict[str, Any]] | None:
        """All results by id, in order, now in the output and no longer in parts; None while some are missing.

        Raises:
            SampleError: see `done`.
            OutputError: the output cannot be written.
        """
        lines = self.done()
        if len(lines) < len(self.ids):
            return None
        records = {name: json.loads(lines[name]) for name in self.ids}
        targets: dict[Path, list[str]] = {path: [] for path in self.split.values()}
        targets[self.out] = []  # last: whoever finds it finds the others
        for name, record in records.items():
            kind = next((key for key in self.split if key in record), None)
            targets[self.out if kind is None else self.split[kind]].append(lines[name] + "\n")
        for path, found in targets.items():
            if found or path == self.out:
                with atomic_path(path) as temporary:
                    temporary.write_text("".join(found), encoding="utf-8")
        for path in self.folder.glob("*.jsonl"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # another process may be merging the same lines
            self.folder.rmdir()
        return records


def agree(path: Path, out: Path, facts: Mapping[str, Any]) -> None:
    """Write down what the results in `out` are made with, or see that it is what they were made with before.

    Raises:
        OutputError: there are results already, made with something else or nobody knows with what.
    """
    text = json.dumps(facts, sort_keys=True) + "\n"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if other := next((key for key in facts if found.get(key) != facts[key]), None):
            raise OutputError(
                f"{out} holds results of another {other} ({found.get(other)}, not {facts[other]}); name another file."
            )
    elif out.exists():
        raise OutputError(f"{out} exists, and no {path.name} says what made it; name another file.")
    else:
        write_text(path, text)


def _whole_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(id, line) of the whole lines of a part or an output; a part that another process has merged away is empty."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    for line in text[: text.rfind(b"\n") + 1].decode().splitlines():
        yield json.loads(line)["id"], line


def processes() -> tuple[int, int]:
    """(rank, world size) as `torchrun` gives them, (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


Progress = Callable[[int, int], None]
"""Called with (results of this process done, all of this process)."""
