"""`bridge-stg bench` and `bridge-stg tune`: time the ops against their peers, and choose Triton configurations."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from ..errors import BridgeSTGError
from .console import echo, finite, note, path_option

_PACKAGE = "benchmarks"


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP ...]", help="Ops to measure; all when left out.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes, few rounds, nothing that compiles long.")
    ] = False,
    out: Annotated[
        Path | None,
        path_option("--out", "-o", help="Results go to OUT/<device>; benchmarks/results when left out."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; CUDA where there is one when left out.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="Begin no case after that long, and name what is left out."),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List cases and providers, run nothing.")] = False,
    benchmarks: Annotated[
        Path | None,
        path_option(
            "--benchmarks", help="The folder benchmarks/ of a checkout; the one beside the package when left out."
        ),
    ] = None,
) -> None:
    """Time the ops against their peers, in pairs, and measure their memory; an op is timed if its output is right."""
    command = _load_benchmarks(benchmarks)
    try:
        text, code = command.run_benchmarks(
            ops or (), quick=quick, out=out, device=device, seconds=seconds, list_only=list_only, echo=note
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    echo(text, lines=True)
    raise typer.Exit(code)


def tune(
    op: Annotated[str, typer.Argument(help="prune_tokens or prune_tokens_varlen.")] = "prune_tokens",
    out: Annotated[Path, path_option("--out", "-o", help="The table; name it in BRIDGE_STG_TUNED.")] = Path(
        "tuned.json"
    ),
    shape: Annotated[
        list[str] | None,
        typer.Option(help="segments,tokens,width,queries; repeat for several. A usual set when left out."),
    ] = None,
) -> None:
    """Time the Triton configurations of OP on this GPU and keep the best of each shape."""
    from ..ops.core.tuning import tune_op

    tune_op(op, out, shape, report=note)
    echo(out)


def _load_benchmarks(folder: Path | None) -> ModuleType:
    """The module `harness.command` of a `benchmarks/` folder: `folder`, or the one beside the package.

    Benchmarks are part of a checkout, and of no installed package.

    Raises:
        BridgeSTGError: the folder holds no benchmarks.
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
