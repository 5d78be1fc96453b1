"""Checks of settings of every kind: configurations, `--set`, model and processor files.

A schema has a rule for every field. An unknown field, or a value that its rule refuses, is an error of one sentence
that names the field, the value, and the rule or the nearest known field.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, TypeVar

from .errors import BridgeSTGError, ConfigError

T = TypeVar("T")

_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NAMES: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
_LIMIT = "limit"


@dataclass(frozen=True)
class Rule:
    """The values that a field may have.

    Attributes:
        kind: bool, int, float, str, list, dict, or a dataclass, whose fields are its schema; object takes anything.
            A bool may be given as the text true, false, yes, no, on or off. An int has 64 bits, and is a float too; NaN
            and infinity are none.
        least, most: bounds of a number, themselves allowed.
        above, below: bounds of a number, themselves not allowed.
        choices: the only values allowed, if there are any.
        optional: whether None is allowed.
        each: rule of every item of a list, or of every value of a dict.
        length: of a list.
        filled: whether a text, list or dict must not be empty.
    """

    kind: Any
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False
    each: Rule | None = None
    length: int | None = None
    filled: bool = False

    def __str__(self) -> str:
        """Completes the sentence 'it must be ...'."""
        if self.choices:
            words = "one of " + ", ".join(map(str, self.choices))
        elif self.kind is list:
            count = f"{self.length} " if self.length is not None else ""
            words = f"a list of {count}values" + (f", each {self.each}" if self.each is not None else "")
        elif self.kind is dict or is_dataclass(self.kind):
            words = "a mapping"
        else:
            words = _NAMES[self.kind]
        if self.filled:
            words += " that is not empty"
        signs = ((self.above, ">"), (self.least, ">="), (self.below, "<"), (self.most, "<="))
        if bounds := [f"{sign} {bound}" for bound, sign in signs if bound is not None]:
            words += " " + " and ".join(bounds)
        return words + (" or null" if self.optional else "")

    def read(self, value: Any, name: str, source: str, error: type[BridgeSTGError] = ConfigError) -> Any:
        """Check a value and convert it to its kind.

        Args:
            name: of the field.
            source: where the value stands, such as a file; begins the message.
            error: the type to raise if the rule refuses the value.
        """
        if value is None and self.optional:
            return None
        if is_dataclass(self.kind) and isinstance(value, Mapping):
            return build(typing.cast(type, self.kind), value, source, prefix=f"{name}.", error=error)
        if self.kind is bool:
            value = parse_bool(value)
        elif self.kind is float and type(value) is int and abs(value) < 1e300:
            value = float(value)
        elif self.kind is list and isinstance(value, tuple):
            value = list(value)
        if not self._holds(value):
            raise error(f"{source}: {name} must be {self}, got {show(value)}.")
        if self.each is not None and isinstance(value, list):
            return [self.each.read(item, f"{name}[{i}]", source, error) for i, item in enumerate(value)]
        if self.each is not None and isinstance(value, dict):
            return {key: self.each.read(item, f"{name}.{key}", source, error) for key, item in value.items()}
        return value

    def _holds(self, value: Any) -> bool:
        if self.kind is object:
            return True
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            return False
        if self.choices and value not in self.choices:
            return False
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            return False
        if isinstance(value, (str, list, dict)):
            return (len(value) > 0 or not self.filled) and self.length in (None, len(value))
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, int) and abs(value) >= 2**63:
            return False
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def limit(**bounds: Any) -> dict[str, Any]:
    """Return metadata of a dataclass field: the rest of its `Rule` beside its type, such as `limit(least=1)`."""
    return {_LIMIT: bounds}


def check_fields(
    values: Mapping[str, Any],
    schema: Mapping[str, Rule],
    source: str,
    *,
    prefix: str = "",
    error: type[BridgeSTGError] = ConfigError,
) -> dict[str, Any]:
    """Check values and convert each to its kind; they keep their order, and missing fields stay missing.

    Args:
        schema: the rule of every known field.
        source: where the values stand, such as a file; begins the message.
        prefix: before the names of fields in messages, such as "model.".

    Raises:
        ConfigError: an unknown field, or a value that its rule refuses; another error where `error` says so.
    """
    found = {}
    for key, value in values.items():
        if key not in schema:
            raise error(f"{source}: {unknown_name(key, schema, prefix)}")
        found[key] = schema[key].read(value, f"{prefix}{key}", source, error)
    return found


def unknown_name(name: Any, known: Iterable[str], prefix: str = "") -> str:
    """Return the sentence about an unknown field: it names the nearest known one, or all of them if none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    rest = f"the nearest is {prefix}{near[0]}" if near else f"there are {', '.join(names)}"
    return f"unknown field {show(f'{prefix}{name}')}; {rest}."


def build(
    kind: type[T],
    values: Mapping[str, Any],
    source: str,
    *,
    prefix: str = "",
    error: type[BridgeSTGError] = ConfigError,
) -> T:
    """Build a dataclass from plain values; its type hints and `limit`s are the schema.

    Raises:
        ConfigError: see `check_fields`; or a field without a default is missing.
    """
    schema = rules_of(kind)
    found = check_fields(values, schema, source, prefix=prefix, error=error)
    try:
        return kind(**found)
    except TypeError as missing:  # every field is known and typed, so one must be missing
        absent = next(name for name in schema if name not in found and not _has_default(kind, name))
        raise error(f"{source}: {prefix}{absent} is missing; it must be {schema[absent]}.") from missing


def rules_of(kind: type) -> dict[str, Rule]:
    """Return the schema of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: _rule(hints[field.name], field.metadata.get(_LIMIT, {})) for field in fields(typing.cast(Any, kind))
    }


def parse_bool(value: Any) -> Any:
    """Turn the texts that mean True or False into these, in upper or lower case; return anything else as it is."""
    return _SWITCHES.get(value.strip().lower(), value) if isinstance(value, str) else value


def show(value: Any, most: int = 80) -> str:
    """Return a value as a message shows it: its `repr` on one line, cut at `most` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a nesting of thousands of brackets
        text = "a value too large to show"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _rule(hint: Any, bounds: Mapping[str, Any]) -> Rule:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        return _rule(inner[0] if len(inner) == 1 else Any, {**bounds, "optional": len(inner) < len(arguments)})
    if origin in (list, dict):
        return Rule(origin, each=_rule(arguments[-1], bounds.get("items", {})), **_without(bounds, "items"))
    if origin is Sequence:
        return Rule(list, each=_rule(arguments[0], bounds.get("items", {})), **_without(bounds, "items"))
    return Rule(hint if hint in _NAMES or is_dataclass(hint) else object, **bounds)


def _without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


def _has_default(kind: type, name: str) -> bool:
    field = next(field for field in fields(typing.cast(Any, kind)) if field.name == name)
    return field.default is not MISSING or field.default_factory is not MISSING
