"""Outcomes of a long list, one JSON line each: written by any number of ranks, resumed after any interruption.

Every rank appends its outcomes to a file of its own, in a folder beside the output. An outcome is done when its line
stands whole in any of these files, whoever wrote it. A rank that finds all of them done merges the files into the
output, in the order of the list, and removes the folder. Ranks need no lock: every file of the output appears whole by
a rename, and all who merge write the same bytes.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from errno import ENOENT
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, TypeVar

from ..distributed import shard
from ..errors import OutputError, SampleError
from ..files import beside, replaceable, unwritable
from ..json_text import dump_json, parse_json
from .outcome import Outcome

Progress = Callable[[int, int], None]
"""Called with (outcomes of this rank done, all of this rank)."""

T = TypeVar("T")
_TRIES = 100  # merges that may take the folder away just before a file is made in it


def check_output(out: str | os.PathLike[str]) -> Path:
    """The file that `out` is or links to; checks, before any long work, that it and the folder beside it can be made.

    Raises:
        OutputError: they cannot.
    """
    target = replaceable(out)
    folder = beside(target, ".parts")
    try:  # one question alone: a rank may merge and remove the folder at any moment
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except FileNotFoundError:
        is_folder = not folder.is_symlink()
    if not is_folder:
        raise OutputError(f"{folder} cannot be written: it is there, and no folder.")
    return target


class ResumableJsonl:
    """The outcomes of a list of ids, on their way into `out`. A context manager: it closes the file of this rank.

    Ranks may begin, end, be killed and merge at the same time; nothing is lost or doubled by it. Where two ranks have
    made the same outcome, the first found is kept. Outcomes that were made with something else are never continued:
    every method that reads them raises OutputError.

    Args:
        out: where the outcomes go when all are there. Until then they are in the folder `out` with `.parts` behind it.
            A link is followed.
        ids: of all outcomes, in order, without doubles.
        made_with: what outcomes depend on. It is written before those of a rank, and for the output to `out` with
            `.run` behind it.
        batch_size: consecutive ids that are grounded together. Batches are cut from the whole list, so that no outcome
            depends on which rank makes it or on what was interrupted.
        rank, world_size: which share of the batches this rank does. A later run may have other numbers.
        failures_apart: whether outcomes without an answer go to a file of their own, `out` with `.failed` behind it.
            The file is there if it has a line.

    Raises:
        OutputError: the output cannot be written or is not a regular file.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        ids: Sequence[str],
        *,
        made_with: Mapping[str, Any],
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        failures_apart: bool = False,
    ) -> None:
        self.out = check_output(out)
        self.folder = beside(self.out, ".parts")
        self.ids = list(ids)
        self.rank = rank
        batches = (self.ids[i : i + batch_size] for i in range(0, len(self.ids), batch_size))
        self.batches = list(shard(batches, rank, world_size))
        self.made_with = made_with
        self._failed = replaceable(beside(Path(out), ".failed")) if failures_apart else None
        self._run = beside(self.out, ".run")
        self._path = self.folder / f"{rank}-of-{world_size}.jsonl"
        self._file: BinaryIO | None = None
        self._is_last = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def work(
        self, ground: Callable[[list[str]], Iterable[Outcome[dict[str, Any]]]], progress: Progress | None = None
    ) -> bool:
        """Compute the missing outcomes of this rank's share, and merge if no rank's are missing then.

        Args:
            ground: the outcomes of a batch of ids. A batch of which some outcomes are missing is grounded as a whole.
            progress: called after every batch.

        Returns:
            True for one rank when everything is in the output: the one that ended the merge after its own work, or
            rank 0 where nothing was left to do.

        Raises:
            SampleError, OutputError: see `done` and `merge`.
        """
        before = self.done()
        if before.issuperset(self.ids):
            return self.rank == 0 and self.merge()
        self._open()  # an output that cannot be written must not wait for the first outcome
        count, total = 0, sum(map(len, self.batches))
        for batch in self.batches:
            if not before.issuperset(batch):
                for outcome in ground(batch):
                    if outcome.id not in before:
                        self.append(outcome)
            count += len(batch)
            if progress is not None:
                progress(count, total)
        return self.merge() and self._is_last

    def append(self, outcome: Outcome[dict[str, Any]]) -> None:
        """Write down one outcome; it outlives this process once this returns.

        Raises:
            OutputError: it cannot be written.
        """
        line = memoryview(_to_line(outcome.to_record()))
        file = self._open()
        try:
            while line:
                line = line[file.write(line) :]
        except OSError as error:
            raise unwritable(self._path, error) from error

    def done(self) -> set[str]:
        """Ids of the outcomes that are there.

        Raises:
            SampleError: there are outcomes that are not of this list, or the output holds something else.
            OutputError: there are outcomes that were made with something else, or a file cannot be read.
        """
        with self._lines() as lines:
            return set(lines)

    def outcomes(self) -> Iterator[Outcome[dict[str, Any]]]:
        """Yield the outcomes that are there, in the order of the list, read one at a time.

        Raises:
            SampleError, OutputError: see `done`.
        """
        with self._lines() as lines:
            for name in self.ids:
                if name in lines:
                    yield Outcome.from_record(parse_json(lines[name].read()))

    def merge(self) -> bool:
        """Move all outcomes to the output and remove the folder; return False where some are missing.

        Raises:
            SampleError, OutputError: see `done`; or the output cannot be written.
        """
        with self._lines() as lines:
            if len(lines) < len(self.ids):
                return False
            found = [lines[name] for name in self.ids]
            self._write(self._run, [_to_line(self.made_with, sort_keys=True)])
            if self._failed is not None:
                failed, found = [line for line in found if line.failed], [line for line in found if not line.failed]
                if failed:
                    self._write(self._failed, failed)
                else:
                    self._failed.unlink(missing_ok=True)
            self._write(self.out, found)  # as the last: whoever finds it finds the others
        for number, path in enumerate(self._files(".jsonl")):
            with suppress(FileNotFoundError):
                path.unlink()
                self._is_last |= number == 0  # of the ranks that merge at the same time, one removes the first file
        for path in self._files(".writing"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # another rank has removed it, or has just begun
            self.folder.rmdir()
        return True

    def _open(self) -> BinaryIO:
        """The file of this rank, opened at its end, where it says what the next outcomes are made with."""

        def begin() -> BinaryIO:
            file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
            cut_off = b"\n" if file.tell() else b""  # ends a line that an interruption may have cut off
            file.write(cut_off + _to_line({"made_with": self.made_with}))
            return file

        if self._file is None:
            self._file = self._in_folder(self._path, begin)
        return self._file

    def _write(self, path: Path, lines: Sequence[bytes | _Line]) -> None:
        """Write a whole file or none. It grows in the folder, so that an interruption leaves nothing elsewhere."""
        temporary = self.folder / f"{secrets.token_hex(4)}.writing"

        def write() -> None:
            with open(temporary, "wb") as file:
                file.writelines(line if isinstance(line, bytes) else line.read() for line in lines)
            os.replace(temporary, path)

        try:
            self._in_folder(path, write)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _in_folder(self, path: Path, act: Callable[[], T]) -> T:
        """Make the folder and act in it, to write `path`; again where a merge has just removed the folder."""
        try:
            for _ in range(_TRIES):
                self.out.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):  # `exist_ok` fails where a merge removes it meanwhile
                    self.folder.mkdir()
                with suppress(FileNotFoundError):
                    return act()
            raise FileNotFoundError(ENOENT, os.strerror(ENOENT))
        except OSError as error:
            raise unwritable(path, error) from error

    def _files(self, suffix: str) -> list[Path]:
        """Files in the folder, in order. `Path.glob` fails where a merge takes the folder away meanwhile."""
        with suppress(FileNotFoundError):
            return sorted(self.folder / name for name in os.listdir(self.folder) if name.endswith(suffix))
        return []

    @contextmanager
    def _lines(self) -> Iterator[dict[str, _Line]]:
        """Where the outcome of every id that is done stands; the files stay open, so that a merge takes none away."""
        found: dict[str, _Line] = {}
        with ExitStack() as files:
            # The output after the folder: what a merge takes away in between is in the output by then.
            for path in self._files(".jsonl"):
                for name, line in self._read(path, files):
                    found.setdefault(name, line)
            if self.out.exists():
                self._agree(_read_json(self._run))
                for path in filter(None, (self._failed, self.out)):
                    found.update(self._read(path, files, is_output=True))
            if foreign := sorted(found.keys() - set(self.ids)):
                raise SampleError(
                    f"{self.out} or {self.folder} holds {foreign[0]!r}, which is not asked for: it belongs to another "
                    "list."
                )
            yield found

    def _read(self, path: Path, files: ExitStack, *, is_output: bool = False) -> Iterator[tuple[str, _Line]]:
        """Yield the ids in a file and where they stand.

        A file of a rank may be gone, may hold lines that were cut off, and says itself what its outcomes are made with.
        An output holds outcomes alone.

        Args:
            files: closes the file.
        """
        try:
            file = files.enter_context(open(path, "rb"))  # noqa: SIM115 - closed by `files`
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {error.strerror}.") from error
        start, agreed = 0, is_output
        for number, text in enumerate(file, 1):
            try:  # the beginning of a JSON object is none, so that a line cut off cannot pass for a whole one
                record = parse_json(text)
                made_with = record.get("made_with") if isinstance(record, dict) and not is_output else None
                outcome = None if made_with is not None else Outcome.from_record(record)
            except ValueError as error:
                if is_output and text.strip():
                    message = f"{path}:{number} is not a JSON object with an id; it holds other things than results."
                    raise SampleError(message) from error
            else:
                if not agreed:
                    self._agree(made_with)
                    agreed = True
                if outcome is not None:
                    yield outcome.id, _Line(file, start, len(text), outcome.reason is not None)
            start += len(text)

    def _agree(self, made_with: Any) -> None:
        """Raise OutputError unless the outcomes that were made with this may be continued."""
        again = f"name another file, or remove {self.out} and {self.folder} to begin again"
        if not isinstance(made_with, dict):
            raise OutputError(f"{self.out} holds results, and nothing says what made them; {again}.")
        for key, value in self.made_with.items():
            if made_with.get(key) != value:
                old, new = dump_json(made_with.get(key)), dump_json(value)
                raise OutputError(f"{self.out} is made with {key} {old}, not {new}; {again}.")


class _Line(NamedTuple):
    """Where an outcome stands, and whether it is without an answer."""

    file: BinaryIO
    start: int
    length: int
    failed: bool

    def read(self) -> bytes:
        self.file.seek(self.start)
        return self.file.read(self.length).rstrip() + b"\n"


def _read_json(path: Path) -> Any:
    """The value of a JSON file; None where it is missing or not JSON."""
    try:
        return parse_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}.") from error


def _to_line(record: Mapping[str, Any], *, sort_keys: bool = False) -> bytes:
    return dump_json(record, sort_keys=sort_keys).encode() + b"\n"
