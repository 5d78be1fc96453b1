"""Griffe extension: split the docstring entry `key, value: text` into one entry for each name.

The docstring parser takes the whole of `key, value` for one name and finds neither its type nor its default.
"""

import re

import griffe

ENTRY = re.compile(r"^( +)([a-z_]\w*(?:, [a-z_]\w*)+): (.*(?:\n\1 +.*)*)$", re.MULTILINE)


def split_entry(match: re.Match) -> str:
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


class OneEntryAName(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = ENTRY.sub(split_entry, obj.docstring.value)
