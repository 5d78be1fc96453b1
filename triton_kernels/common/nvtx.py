"""NVTX ranges around the launches of an op, where BRIDGE_STG_NVTX=1; otherwise they cost nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def nvtx_range(name: str) -> Callable[[Function], Function]:
    """Decorator that puts calls into an NVTX range `name`; it reads the variable once, when the module is imported."""

    def decorate(function: Function) -> Function:
        if os.environ.get("BRIDGE_STG_NVTX") != "1":
            return function

        @functools.wraps(function)
        def ranged(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.nvtx.range(name):
                return function(*args, **kwargs)

        return ranged  # type: ignore[return-value]

    return decorate
