"""The one reader of JSON Lines and of JSON files: whatever they hold, the answer is a value or one sentence."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from ..errors import SampleError
from ..json_text import parse_json
from .values import is_unicode, shown

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=_HasId)


class Line(NamedTuple):
    """A line of a file: its number from 1, the byte at which it begins, and its bytes with the line feed."""

    number: int
    offset: int
    data: bytes


def iterate_records(
    path: str | os.PathLike[str], what: str, build: Callable[[Any], R], *, may_be_empty: bool = False
) -> Iterator[tuple[Line, R | SampleError]]:
    """Read JSON Lines one line at a time: each line with its record, or with the reason why there is none.

    Args:
        path: of the file.
        what: what the file ought to be, such as "an annotation file"; messages say so.
        build: makes a record, which has an `id`, of the value of a line; raises SampleError where it cannot.
        may_be_empty: whether a file without a record is allowed.

    Raises:
        SampleError: the file cannot be read as `what`, or holds no line. What is wrong with one line, an id that comes
            twice among them, is yielded and not raised.
    """
    used: dict[str, int] = {}
    line = None
    for line in numbered_lines(path, what):
        try:
            record = build(parse_line(line.data))
            if used.setdefault(record.id, line.number) != line.number:
                raise SampleError(repeated_id(record.id, f" in line {used[record.id]}"))
        except SampleError as error:
            yield line, error
        else:
            yield line, record
    if line is None and not may_be_empty:
        raise SampleError(f"{os.fspath(path)} holds no record; {what} needs at least one line.")


def read_records(
    path: str | os.PathLike[str], what: str, build: Callable[[Any], R], *, may_be_empty: bool = False
) -> list[R]:
    """All records of `iterate_records`, the first bad line being an error that names it.

    Raises:
        SampleError: see `iterate_records`, or a line is bad.
    """
    records = []
    for line, record in iterate_records(path, what, build, may_be_empty=may_be_empty):
        if isinstance(record, SampleError):
            raise SampleError(f"{os.fspath(path)}:{line.number}: {record}") from record
        records.append(record)
    return records


def repeated_id(id: object, place: str = "") -> str:
    """The sentence for an id that comes twice; `place` says where it came first, such as " in line 3"."""
    return f"id {shown(id)} was already used{place}; ids must be unique."


def numbered_lines(path: str | os.PathLike[str], what: str) -> Iterator[Line]:
    """Every line of a file that is not blank; one line at a time is in memory.

    Lines end at a line feed alone, as JSON Lines says: a text may hold other separators of Unicode.

    Raises:
        SampleError: the file "cannot be read as" `what`.
    """
    offset = 0
    try:
        with open(path, "rb") as file:
            for number, data in enumerate(file, start=1):
                if data.removeprefix(codecs.BOM_UTF8).strip():
                    yield Line(number, offset, data)
                offset += len(data)
    except (OSError, ValueError) as error:
        raise unreadable(path, what, error) from error


def decode(data: bytes) -> str:
    """UTF-8 as text, without a byte order mark.

    Raises:
        SampleError: it is not UTF-8.
    """
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"not UTF-8 text: {error.reason} at byte {error.start}.") from error


def parse_line(line: bytes) -> Any:
    """The value of one line of JSON.

    NaN and Infinity, which Python writes and JSON has not, become floats: only the record knows which field to name.

    Raises:
        SampleError: the line is not UTF-8, not JSON (see `parse_json`), or holds half a character (a lone surrogate).
            The sentence does not name the place; the caller does.
    """
    text = decode(line).rstrip("\r\n")
    try:
        value = parse_json(text)
    except ValueError as error:
        raise SampleError(f"not JSON that can be read: {error}.") from error
    if _SURROGATE.search(text):
        half = next((found for found in _texts(value) if not is_unicode(found)), None)
        if half is not None:
            raise SampleError(f"a text in it holds half a character, which UTF-8 cannot hold: {shown(half)}.")
    return value


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The value of a JSON file.

    Values that only some record of it may be unfit for are kept, so that the record can be named and the others read:
    NaN and Infinity as floats, a number of thousands of digits as an infinite float, lone surrogates in texts.

    Raises:
        SampleError: it "cannot be read as" `what`: it is not UTF-8, or not JSON (see `parse_json`).
    """
    data = read_file(path, what)
    try:
        text = data.decode()
        try:
            return parse_json(text)
        except ValueError:  # perhaps of a number of too many digits; calling back for every number takes long
            return parse_json(text, parse_int=_int_or_infinity)
    except ValueError as error:
        raise unreadable(path, what, error) from error


def read_file(path: str | os.PathLike[str], what: str) -> bytes:
    """All bytes of a file, without a byte order mark.

    Raises:
        SampleError: it "cannot be read as" `what`.
    """
    try:
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise unreadable(path, what, error) from error


def unreadable(path: str | os.PathLike[str], what: str, error: Exception) -> SampleError:
    """The sentence for a file that cannot be read as `what`."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SampleError(f"{os.fspath(path)} cannot be read as {what}: {reason}.")


def _int_or_infinity(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _texts(value: Any) -> Iterator[str]:
    """Every key and text in a JSON value, by a list of what is left and not by recursion."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, dict):
            left += [*found, *found.values()]
        elif isinstance(found, list):
            left += found
