"""The one reader of JSON Lines and of JSON files: whatever they hold, it is a value or one sentence."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SampleError
from .values import is_unicode, shown

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_file(path: str | os.PathLike[str], what: str) -> bytes:
    """All bytes of a file, without a byte order mark.

    Raises:
        SampleError: it "cannot be read as" `what`.
    """
    try:
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        raise unreadable(path, what, error) from error


def numbered_lines(path: str | os.PathLike[str], what: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of every line that is not blank; one line at a time is in memory.

    Lines end at a line feed alone, as JSON Lines says: a text may hold other separators of Unicode. A byte order mark
    is left out.

    Raises:
        SampleError: the file "cannot be read as" `what`.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8).strip()
                if line:
                    yield number, line
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
        SampleError: the line is not UTF-8 or not complete JSON, is nested too deeply, or holds a number of thousands
            of digits or half a character (a lone surrogate). The sentence does not name the place; the caller does.
    """
    text = decode(line)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SampleError(f"not a complete JSON object: {error.msg} (column {error.colno}).") from error
    except RecursionError as error:
        raise SampleError("not a JSON object that can be read: its brackets are nested too deeply.") from error
    except ValueError as error:  # Python's bound on the digits of an int
        raise SampleError("not a JSON object that can be read: a number in it has thousands of digits.") from error
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
        SampleError: it "cannot be read as" `what`, is not UTF-8 or not complete JSON, or is nested too deeply.
    """
    data = read_file(path, what)
    try:
        text = data.decode()
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return json.loads(text, parse_int=_int_or_infinity)
    except json.JSONDecodeError as error:
        raise SampleError(
            f"{path} is not complete JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from error
    except UnicodeDecodeError as error:
        raise unreadable(path, what, error) from error
    except RecursionError as error:
        raise SampleError(f"{path} cannot be read as {what}: its brackets are nested too deeply.") from error


class UniqueIds:
    """Which line has used an id."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}

    def add(self, id: str, line: int) -> None:
        """Raises:
        SampleError: the id comes twice.
        """
        if self._lines.setdefault(id, line) != line:
            raise SampleError(f"id {shown(id)} was already used in line {self._lines[id]}; ids must be unique.")


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
