"""Pickles as data only: no class, no function, nothing but plain values and containers."""

from __future__ import annotations

import builtins
import os
import pickle
from pathlib import Path
from typing import Any

from ...errors import SampleError

_ADMITTED = frozenset(("dict", "list", "tuple", "set", "frozenset"))


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in _ADMITTED:
            return getattr(builtins, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain values and containers are admitted")


def load_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle that holds numbers, texts and builtin containers, also one written by Python 2.

    Raises:
        SampleError: it cannot be read, is cut off, or asks for anything else; nothing of it has been run then.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
    except OSError as error:
        raise SampleError(f"{path} cannot be read as a pickle: {error.strerror or error}.") from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes stumble over
        raise SampleError(
            f"{path} cannot be read as a pickle of plain data: {error or type(error).__name__}."
        ) from error
