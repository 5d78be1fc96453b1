"""Checks of values from outside, and how messages show them: never longer than a line."""

from __future__ import annotations

import os
import reprlib
import sys
from collections.abc import Iterable
from typing import TypeGuard

LONGEST_SIDE = 1 << 14  # pixels; no codec that we read goes beyond it, and a typing error would fill the memory
MOST_FRAMES = 1 << 31  # an MP4 counts its frames in 32 bits
FARTHEST = 1 << 20  # pixels; a box may leave its frame, but its area must stay finite


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 4096:  # Python refuses to write out more than 4300 digits
            return f"a number of about {round(x.bit_length() * 0.30103)} digits"
        return super().repr_int(x, level)


shown = _Short().repr
"""`repr`, cut to a line: of a long text, a long list, deep nesting and a number of many digits only the ends."""


def shown_list(values: Iterable[object]) -> str:
    """The first ten values for a message."""
    values = list(values)
    rest = f" and {len(values) - 10} more" if len(values) > 10 else ""
    return ", ".join(map(shown, values[:10])) + rest


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an int or float that a float can hold; a bool, NaN and infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_key(value: object) -> TypeGuard[str | int | float]:
    """Whether records may refer to each other by it: a text or a number."""
    return isinstance(value, str) or is_number(value)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON and pickles can spell half a character, a lone surrogate."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_path(text: str) -> bool:
    """Whether a file can have this path."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
