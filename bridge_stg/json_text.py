"""JSON as every parser takes it: written without NaN, read with one reason for whatever cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def dump_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """The value as ASCII JSON.

    Raises:
        ValueError: it holds a number that is not finite, which JSON does not have.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent, sort_keys=sort_keys)
    except ValueError as error:
        raise ValueError("it holds a number that is not finite, which JSON does not have") from error


def parse_json(text: str | bytes, *, parse_int: Callable[[str], Any] | None = None) -> Any:
    """What a JSON text says.

    Args:
        parse_int: makes the value of an integer's digits; None takes `int`.

    Raises:
        ValueError: with a short reason; it is not JSON, or holds what cannot be read.
    """
    try:
        return json.loads(text, parse_int=parse_int)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{error.msg} ({line}column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
    except ValueError as error:  # the only other one: Python's bound on the digits of an integer
        raise ValueError("it holds an integer of too many digits") from error
