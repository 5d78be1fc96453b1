"""Pickles as data only: no class, no function, and no more room and time than a file of that size is worth."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import pickletools
from typing import Any

from ...errors import SampleError
from ..jsonl import read_file

_ADMITTED = frozenset(("set", "frozenset"))  # the other containers have opcodes of their own in every protocol

_CODES = {op.name: ord(op.code) for op in pickletools.opcodes}
_SIZES = {ord(op.code): op.arg.n if op.arg is not None else 0 for op in pickletools.opcodes}
_COUNTED = {-2: 1, -3: 4, -4: 4, -5: 8}  # a negative size of `pickletools` to the bytes of the count that stands first
_PUTS = tuple(_CODES[name] for name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_GETS = tuple(_CODES[name] for name in ("GET", "BINGET", "LONG_BINGET"))
_TUPLES = tuple(_CODES[name] for name in ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE"))
_REFUSED = tuple(_CODES[name] for name in ("DUP", "POP", "POP_MARK", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX"))
_GLOBAL, _MEMOIZE, _STOP = (_CODES[name] for name in ("GLOBAL", "MEMOIZE", "STOP"))
_WATCHED = (*_PUTS, *_GETS, *_TUPLES, *_REFUSED, _GLOBAL, _STOP)
# Bytes of an opcode that is passed over; bytes of the count of one that has one; both 0 for what is looked at.
_PASSED = [1 + _SIZES[code] if _SIZES.get(code, -1) >= 0 and code not in _WATCHED else 0 for code in range(256)]
_WIDTHS = [_COUNTED.get(_SIZES.get(code, 0), 0) for code in range(256)]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in _ADMITTED:
            return getattr(builtins, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain values and containers are admitted")


def load_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle that holds numbers, texts and builtin containers, also one written by Python 2.

    Raises:
        SampleError: it cannot be read, is cut off, asks for anything else, or for more than its size warrants; nothing
            of it has been run then.
    """
    data = read_file(path, "a pickle")
    try:
        _check_opcodes(data)
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes stumble over
        raise SampleError(
            f"{os.fspath(path)} cannot be read as a pickle of plain data: {error or type(error).__name__}."
        ) from error


def _check_opcodes(data: bytes) -> None:
    """Walk over the opcodes, and refuse those with which a few bytes ask for gigabytes or for hours.

    A place in the memo is allocated with all places before it, so that it may not exceed the length of the file. A
    tuple is hashed as often as it is referred to, which doubles with every level, so that it may be referred to once.

    Raises:
        UnpicklingError: there is such an opcode.
    """
    place, memoized, after_tuple = 0, 0, -1
    tuples: set[int] = set()
    while place < len(data):
        code = data[place]
        if passed := _PASSED[code]:
            place += passed
            continue
        if width := _WIDTHS[code]:
            place += 1 + width + int.from_bytes(data[place + 1 : place + 1 + width], "little")
            continue
        if code == _STOP:
            return
        if code not in _SIZES or code in _REFUSED:
            name = bytes([code])
            raise pickle.UnpicklingError(f"it has the opcode {name!r} at byte {place}, which no plain data needs")
        size = _SIZES[code]
        end = place + 1 + size if size >= 0 else data.find(b"\n", place) + 1
        if code == _GLOBAL and end:
            end = data.find(b"\n", end) + 1
        if not end:
            return  # cut off, as the unpickler will say
        if code in _PUTS or code in _GETS:
            if code == _MEMOIZE:
                index = memoized
            else:
                argument = data[place + 1 : end]
                index = int(argument) if size < 0 else int.from_bytes(argument, "little")
            if index > len(data):
                raise pickle.UnpicklingError(f"it asks for {index} places for what it repeats, more than it has bytes")
            if code in _PUTS:
                memoized += 1
                if place == after_tuple:
                    tuples.add(index)
            elif index in tuples:
                raise pickle.UnpicklingError("it refers to one tuple from several places, and only copies are admitted")
        elif code in _TUPLES:
            after_tuple = end
        place = end
