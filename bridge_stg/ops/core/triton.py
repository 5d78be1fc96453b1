"""The Triton backends: kernels of `bridge_stg.triton_kernels`, imported when first called."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from .backends import Backend


def triton_backend(op: str, module: str, limits: Callable[..., str | None] = lambda **call: None) -> Backend:
    """The backend "triton" of `op`: `forward` and `backward` of a module of `triton_kernels`.

    Triton's interpreter runs it on CPU tensors too, when the call names this backend.
    """

    def call(function: str, *args: Any, **options: Any) -> Any:
        return getattr(kernels(module), function)(*args, **options)

    return Backend(
        op,
        "triton",
        functools.partial(call, "forward"),
        functools.partial(call, "backward"),
        devices=("cuda", "cpu") if interpreting() else ("cuda",),
        only_if_asked=("cpu",),
        obstacle=triton_obstacle,
        limits=limits,
    )


def kernels(module: str) -> Any:
    """A module of `bridge_stg.triton_kernels`, imported at the first call because it imports triton."""
    return importlib.import_module(f"bridge_stg.triton_kernels.{module}")


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: TRITON_INTERPRET=1 when bridge_stg is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    return _obstacle()


# torch.compiler.assume_constant_result without importing torch._dynamo, as in native.py. The mark is on a plain
# function because Dynamo of torch 2.11 binds a cached function that it reads from a dataclass as a method of it.
setattr(triton_obstacle, "_dynamo_marked_constant", True)  # noqa: B010


@functools.cache
def _obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreting() or torch.version.cuda is not None:
        return None
    return "torch is built without CUDA"
