"""Results of a long list, one JSON line each: written by any number of processes, resumed after any interruption.

Every process appends its results to a part of its own in a folder beside the output. A result counts as done when its
line stands whole in any part, whoever wrote it; the process that finds all of them done merges the parts into the
output in the order of the list. What is not finished, and what an interruption leaves, is all in that folder.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, TypeVar

from ..errors import OutputError, SampleError
from ..files import beside, replaceable, unwritable
from ..json_text import dump_json, parse_json

Progress = Callable[[int, int], None]
"""Called with (results of this process done, all of this process)."""

T = TypeVar("T")
_TRIES = 100  # no merge comes between so often: then the folder is a link to nowhere


def check_output(out: str | os.PathLike[str]) -> Path:
    """The file that results go to; see, before any long work starts, that it and its parts can be there.

    Raises:
        OutputError: they cannot.
    """
    target = replaceable(out)
    folder = beside(target, ".parts")
    try:  # asked once: another process may merge and remove it at any moment
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except FileNotFoundError:
        is_folder = not folder.is_symlink()
    except OSError as error:
        raise unwritable(folder, error) from error
    if not is_folder:
        raise OutputError(f"{folder} cannot be written: it is there, and no folder.")
    return target


class Parts:
    """The results of a list of ids, on their way into `out`. A context manager: it closes the part of this process.

    Processes may begin, end, be killed and merge at the same time; nothing is lost or doubled by it. Where two have
    made the same result, the first found is kept.

    Args:
        out: where the results go when all are there; the parts are in `out` with `.parts` behind it. A link is
            followed.
        ids: of all results, in order, without doubles.
        rank, world_size: this process does the batches whose place modulo `world_size` is `rank`. A later run may have
            other numbers.
        batch_size: consecutive ids that are made together. The batches are those of the list, so that no result
            depends on who makes it or on what was interrupted.
        split: key to file: a result that has the key goes there and not to `out`. A file is there if it has a line.
        made_with: what all results have to be made with; remembered beside them, for `out` in a file with `.run`
            behind it. None remembers nothing and asks for nothing.

    Raises:
        OutputError: the output cannot be written or is no regular file, or there are results made with something
            else.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        ids: Sequence[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        split: Mapping[str, Path] | None = None,
        made_with: Mapping[str, Any] | None = None,
    ) -> None:
        self.out = check_output(out)
        self.folder = beside(self.out, ".parts")
        self.ids = list(ids)
        self.rank = rank
        self.batches = [self.ids[i : i + batch_size] for i in range(0, len(self.ids), batch_size)][rank::world_size]
        self.split = {key: replaceable(path) for key, path in (split or {}).items()}
        self.made_with = made_with
        self._path = self.folder / f"{rank}-of-{world_size}.jsonl"
        self._part: BinaryIO | None = None
        self._ended_it = False
        if made_with is not None:
            self._agree(made_with)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None

    def work(self, make: Callable[[list[str]], Iterable[Mapping[str, Any]]], progress: Progress | None = None) -> bool:
        """Make what is missing of this process's share, and merge where nothing is missing of all.

        Args:
            make: the results of a batch of ids, each with its `id`; a batch that is done in part is made again whole.
            progress: told after every batch.

        Returns:
            whether all results are in the output. With `made_with`, one of several processes is told so: one that finds
            them complete after its own work, or rank 0 where nothing was left to do.

        Raises:
            SampleError, OutputError: see `done` and `merge`.
        """
        before = self.done()
        if before.issuperset(self.ids):
            return (self.made_with is None or self.rank == 0) and self.merge()
        self._open_part()  # an output that cannot be written must not wait for the first result
        if self.made_with is not None:
            self._begin(self.made_with)
        count, total = 0, sum(map(len, self.batches))
        for batch in self.batches:
            if not before.issuperset(batch):
                for record in make(batch):
                    if record["id"] not in before:
                        self.append(record)
            count += len(batch)
            if progress is not None:
                progress(count, total)
        return self.merge() and (self.made_with is None or self._ended_it)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write down one result; it outlives this process once this returns.

        Raises:
            OutputError: it cannot be written.
        """
        part = self._open_part()
        line = memoryview(_to_line(record))
        try:
            while line:
                line = line[part.write(line) :]
        except OSError as error:
            raise unwritable(self._path, error) from error

    def done(self) -> set[str]:
        """Ids of the results that are there.

        Raises:
            SampleError: there are results that are not of this list, or the output holds something else.
        """
        with self._lines() as lines:
            return set(lines)

    def results(self) -> Iterator[dict[str, Any]]:
        """The results that are there, in the order of the list, read one at a time.

        Raises:
            SampleError: see `done`.
        """
        with self._lines() as lines:
            for name in self.ids:
                if name in lines:
                    yield parse_json(lines[name].read())

    def merge(self) -> bool:
        """Move all results from the parts to the output; False while some are missing.

        Raises:
            SampleError: see `done`.
            OutputError: the output cannot be written.
        """
        with self._lines() as lines:
            if len(lines) < len(self.ids):
                return False
            # The output last: whoever finds it finds the others.
            if self.made_with is not None:
                record = _to_line(self.made_with, sort_keys=True)
                self._write(self._record, lambda: [record])
            for kind, path in [*self.split.items(), (None, self.out)]:
                found = [line for name in self.ids if (line := lines[name]).kind == kind]
                if found or kind is None:
                    self._write(path, partial(map, _Line.read, found))
                else:
                    path.unlink(missing_ok=True)
        for path in [*self._files(".jsonl"), *self._files(".writing")]:
            path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            self._started.unlink()
            self._ended_it = True  # of those that merge at the same time, one gets here
        with suppress(OSError):
            self.folder.rmdir()
        return True

    @property
    def _record(self) -> Path:
        return beside(self.out, ".run")

    @property
    def _started(self) -> Path:
        return self.folder / "made-with.json"

    def _agree(self, facts: Mapping[str, Any]) -> None:
        """Remember what the results are made with, or see that it is what they were made with before."""
        begun = self.out.exists() or self._files(".jsonl") != []
        # Read after that, and in this order: a record is there before its first result, and a merge takes the first
        # one away after it has written the second. A second one without an output is of an output since removed.
        found = _read_record(self._started)
        if found is None and self.out.exists():
            found = _read_record(self._record)
        again = f"name another file, or remove {self.out} and {self.folder} to begin again"
        if found is None and begun:
            raise OutputError(f"{self.out} holds results, and nothing says what made them; {again}.")
        if found is not None and (key := next((key for key in facts if found.get(key) != facts[key]), None)):
            old, new = dump_json(found.get(key)), dump_json(facts[key])
            raise OutputError(f"{self.out} is made with {key} {old}, not {new}; {again}.")
        if not self.out.exists():
            self._begin(facts)

    def _begin(self, facts: Mapping[str, Any]) -> None:
        self._write(self._started, lambda: [_to_line(facts, sort_keys=True)])

    def _open_part(self) -> BinaryIO:
        if self._part is None:
            self._part = self._in_folder(self._path, self._append_to_part)
        return self._part

    def _append_to_part(self) -> BinaryIO:
        part = open(self._path, "ab+", buffering=0)  # noqa: SIM115 - closed by __exit__
        if part.seek(0, os.SEEK_END):
            part.seek(-1, os.SEEK_END)
            if part.read(1) != b"\n":
                part.write(b"\n")  # an interruption cut the line before
        return part

    def _files(self, suffix: str) -> list[Path]:
        """Those in the folder of the parts, in order. `glob` would not bear that a merge takes the folder away."""
        try:
            return sorted(self.folder / name for name in os.listdir(self.folder) if name.endswith(suffix))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _write(self, path: Path, lines: Callable[[], Iterable[bytes]]) -> None:
        """A whole file or none. It grows in the folder of the parts, so that nothing is left elsewhere."""
        temporary = self.folder / f"{secrets.token_hex(4)}.writing"

        def write() -> None:
            with open(temporary, "wb") as file:
                file.writelines(lines())
            os.replace(temporary, path)

        try:
            self._in_folder(path, write)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _in_folder(self, path: Path, act: Callable[[], T]) -> T:
        """Do what needs the folder of the parts, for `path`; again where a merge has just taken the folder away."""
        for _ in range(_TRIES):
            self._make_folder()
            try:
                return act()
            except FileNotFoundError as error:
                missing = error
            except OSError as error:
                raise unwritable(path, error) from error
        raise unwritable(path, missing) from missing

    def _make_folder(self) -> None:
        """If a merge takes it away again, opening a file in it says so; `exist_ok` would take that for a file."""
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.folder.mkdir()
        except OSError as error:
            raise unwritable(self.folder, error) from error

    @contextmanager
    def _lines(self) -> Iterator[dict[str, _Line]]:
        """Where the result of every id that is done stands; the files stay open, so that none can vanish."""
        found: dict[str, _Line] = {}
        with ExitStack() as files:
            # The output after the parts: what a merge takes away in between is in the output by then.
            for path in self._files(".jsonl"):
                for name, line in self._read(path, files, whole=False):
                    found.setdefault(name, line)
            if self.out.exists():
                for path in (*self.split.values(), self.out):
                    found.update(self._read(path, files, whole=True))
            if foreign := sorted(found.keys() - set(self.ids)):
                raise SampleError(
                    f"{self.out} or its parts hold {foreign[0]!r}, which is not asked for: they belong to another list."
                )
            yield found

    def _read(self, path: Path, files: ExitStack, *, whole: bool) -> Iterator[tuple[str, _Line]]:
        """The results in a file. A part may hold what an interruption cut off, or be gone; an output may not."""
        try:
            file = files.enter_context(open(path, "rb"))  # noqa: SIM115 - closed by `files`
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {error.strerror}.") from error
        start = 0
        for number, text in enumerate(file, 1):
            record = _parse(text)
            if record is not None:
                kind = next((key for key in self.split if key in record), None)
                yield record["id"], _Line(file, start, len(text), kind)
            elif whole and text.strip():
                raise SampleError(f"{path}:{number} is no JSON object with an id; it holds other things than results.")
            start += len(text)


class _Line(NamedTuple):
    """Where a result stands, and the key that sends it to a file of its own."""

    file: BinaryIO
    start: int
    length: int
    kind: str | None

    def read(self) -> bytes:
        self.file.seek(self.start)
        return self.file.read(self.length).rstrip() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """A result, or None. The beginning of a JSON object is none, so that a line cut off cannot pass for a whole one."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = parse_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}.") from error
    return record if isinstance(record, dict) else None


def _to_line(record: Mapping[str, Any], *, sort_keys: bool = False) -> bytes:
    return dump_json(record, sort_keys=sort_keys).encode() + b"\n"
