"""The vocabulary of a benchmark: what is computed (`Case`), by whom (`Provider`), and what it must cost (`Work`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"


class Unavailable(Exception):
    """A provider cannot run this case here; the message says why and ends up in the report."""


@dataclass(frozen=True)
class Case:
    """One problem of one op.

    Attributes:
        shape: label, such as "B64 N196 D256 Q8 k49".
        dtype: of the floating tensors, or of the output where the input is integer.
        sizes: whatever the bench file needs to build inputs.
        modes: FORWARD, FORWARD_BACKWARD or both.
        leaves: names of the inputs that get gradients in FORWARD_BACKWARD.
        series, x: cases of one series are drawn as lines over `x` and left out of the bars.
    """

    shape: str
    dtype: torch.dtype
    sizes: Mapping[str, Any]
    modes: tuple[str, ...] = (FORWARD,)
    leaves: tuple[str, ...] = ()
    series: str | None = None
    x: float | None = None


@dataclass(frozen=True)
class Prepared:
    """A provider ready for one case: `call(inputs)` and the parameters that FORWARD_BACKWARD differentiates too."""

    call: Callable[[Inputs], Outputs]
    parameters: tuple[nn.Parameter, ...] = ()


@dataclass(frozen=True)
class Provider:
    """One implementation under test.

    Attributes:
        name: as the report shows it.
        prepare: builds it for a case on a device; raises `Unavailable` with the reason where it cannot run.
        ours: whether it is this project's; a wrong or failing one fails the run.
        subject: the one that the ratios of all others are taken against: what a user gets by default.
        slow_start: compiles for many seconds; left out, and listed, under --quick.
        reuses_output: its result lives in a buffer that it got beforehand, so that none of it is extra memory.
    """

    name: str
    prepare: Callable[[Case, torch.device], Prepared]
    ours: bool = False
    subject: bool = False
    slow_start: bool = False
    reuses_output: bool = False


@dataclass(frozen=True)
class Work:
    """The least any implementation must do: bytes moved to and from memory, and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Benchmark:
    """What one `bench_<op>.py` exports as `BENCHMARK`.

    Attributes:
        op: its name in every room.
        cases: (device type, quick) -> the cases, most telling first.
        inputs: (case, device, generator) -> the named inputs of one call; never zeros.
        providers: (case, device) -> all implementations, `subject` among them.
        reference: (case, inputs) -> the outputs that everybody must agree with, differentiable where the case is.
        disagreement: (case, inputs, outputs, expected) -> why the outputs are wrong, or None.
        work: (case, mode) -> the floor.
        gradient_tolerance: relative error that the gradients of the leaves may have, by dtype.
        input_sets: how many sets of inputs take turns; None for as many as the cache cannot hold.
    """

    op: str
    cases: Callable[[str, bool], Sequence[Case]]
    inputs: Callable[[Case, torch.device, torch.Generator], Inputs]
    providers: Callable[[Case, torch.device], Sequence[Provider]]
    reference: Callable[[Case, Inputs], Outputs]
    disagreement: Callable[[Case, Inputs, Outputs, Outputs], str | None]
    work: Callable[[Case, str], Work]
    gradient_tolerance: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
    )
    input_sets: int | None = None


def find_benchmarks(folder: Path, package: str, names: Iterable[str]) -> list[Benchmark]:
    """The benchmarks of `bench_<op>.py` in `folder`, importable as `package`; "all" or nothing names every one.

    Raises:
        ValueError: a name that has no file.
    """
    known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    wanted = list(names) or ["all"]
    for name in wanted:
        if name != "all" and name not in known:
            raise ValueError(f"{name!r} has no benchmark; {folder} has {', '.join(known) or 'none'}.")
    chosen = known if "all" in wanted else [name for name in known if name in wanted]
    return [importlib.import_module(f"{package}.bench_{name}").BENCHMARK for name in chosen]


def own_providers(
    op: str,
    device: torch.device,
    make: Callable[[str | None], Callable[[Case, torch.device], Prepared]],
    **call: Any,
) -> list[Provider]:
    """This project's implementations of `op`: the default one as subject, and every other backend by name.

    Args:
        make: backend name -> `Provider.prepare`.
        call: what the op hands to `choose_backend` (meta tensors will do), to tell which backend is the default.
    """
    from bridge_stg.ops import backends
    from bridge_stg.ops.core.backends import choose_backend

    default = choose_backend(op, None, device.type, **call)
    providers = [Provider(f"bridge_stg ({default})", make(None), ours=True, subject=True)]
    for status in backends():
        if status.op != op or status.name == default:
            continue
        on_device = not status.devices or device.type in status.devices
        if not on_device:
            continue
        prepare = make(status.name) if status.usable else _refuse(str(status.reason))
        providers.append(Provider(f"bridge_stg ({status.name})", prepare, ours=status.usable))
    return providers


def _refuse(reason: str) -> Callable[[Case, torch.device], Prepared]:
    def prepare(case: Case, device: torch.device) -> Prepared:
        raise Unavailable(reason)

    return prepare
