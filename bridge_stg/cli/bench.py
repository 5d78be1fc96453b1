"""Finds the benchmarks of a checkout; they are not part of an installed package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ..errors import BridgeSTGError

_PACKAGE = "benchmarks"


def load_benchmarks(folder: Path | None = None) -> ModuleType:
    """The module `harness.command` of a `benchmarks/` folder: `folder`, or the one beside the package.

    Raises:
        BridgeSTGError: there is none.
    """
    home = Path(__file__).parents[2] / "benchmarks" if folder is None else folder
    if not (home / "harness" / "command.py").is_file():
        raise BridgeSTGError(
            f"{home} holds no benchmarks: they come with a checkout of the source, which --benchmarks DIR can name."
        )
    # By its path: another package of that name may be installed.
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, home / "__init__.py", submodule_search_locations=[str(home)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    spec.loader.exec_module(package)
    return importlib.import_module(f"{_PACKAGE}.harness.command")
