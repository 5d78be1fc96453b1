"""The native backends: the compiled libraries, which are loaded when an op is first chosen."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .backends import Backend

_FOLDER = Path(os.environ.get("BRIDGE_STG_LIBRARY_FOLDER") or Path(__file__).parents[2] / "lib")
_LIBRARIES = {"cpu": "libbridge_stg_cpu.so", "cuda": "libbridge_stg_cuda.so"}
_NAMES = {"cpu": "native", "cuda": "cuda"}


def native_backend(
    op: str,
    device_type: str = "cpu",
    *,
    has_backward: bool = False,
    limits: Callable[..., str | None] = lambda **call: None,
) -> Backend:
    """The backend of `op` in the compiled library for `device_type`: "native" for CPU tensors, "cuda" for CUDA.

    Its kernels are the ops `bridge_stg_native::<op>` and `<op>_backward`, with the arguments of the registered op.
    """

    def call(name: str, *args: Any) -> Any:
        if (reason := _load(device_type)) is not None:  # a program that was exported elsewhere may name this backend
            raise RuntimeError(f"{name} cannot run on backend {_NAMES[device_type]!r}: {reason}.")
        return getattr(torch.ops.bridge_stg_native, name).default(*args)

    return Backend(
        op,
        _NAMES[device_type],
        functools.partial(call, op),
        functools.partial(call, f"{op}_backward") if has_backward else None,
        devices=(device_type,),
        obstacle=functools.partial(library_obstacle, device_type),
        limits=limits,
        flat=True,
    )


def library_obstacle(device_type: str) -> str | None:
    """Load the compiled library for `device_type`, and return the reason if that fails, else None."""
    return _load(device_type)


# A graph takes the answer for a constant. torch.compiler.assume_constant_result does this, but imports torch._dynamo.
setattr(library_obstacle, "_dynamo_marked_constant", True)  # noqa: B010


@functools.cache
def _load(device_type: str) -> str | None:
    path = _FOLDER / _LIBRARIES[device_type]
    if not path.is_file():
        return f"{path.name} was not built with this installation; install with a C++ compiler" + (
            " and nvcc" if device_type == "cuda" else ""
        )
    if device_type == "cuda":
        if torch.version.cuda is None:
            return "torch is built without CUDA"
        if (reason := library_obstacle("cpu")) is not None:  # it defines the ops
            return reason
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    return None


def build_info() -> dict[str, object] | None:
    """What the compiled part was built with: compilers, torch, CUDA architectures, SIMD level; None without one."""
    try:
        module = importlib.import_module("bridge_stg._native")
    except ImportError:
        return None
    return dict(module.build_info())
