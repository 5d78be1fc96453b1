"""The table of implementations of each op: which of them run here, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .checks import shorten


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        op: name of the op, as in `torch.ops.bridge_stg.<op>`.
        name: "reference", "native", "triton" or "cuda".
        devices: device types it runs on; empty for any.
        forward, backward: kernels with the arguments of the registered op without its last one (`backend`), as
            the op's `pack` returns them (`define_op`).
        only_if_asked: device types it runs on only when it is requested by name.
        obstacle: returns why the backend cannot run in this installation, None if it can.
        limits: given what the op passes to `choose_backend` about a call, returns why this call is beyond the
            backend ("it takes float32 and bfloat16, got torch.float64"), None if it is not. Looks at shapes and
            dtypes only, so that it can be traced.
        flat: whether the kernels take the arguments of the schema as they are, as compiled ones do.
    """

    op: str
    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    devices: tuple[str, ...] = ()
    only_if_asked: tuple[str, ...] = ()
    obstacle: Callable[[], str | None] = field(default=lambda: None)
    limits: Callable[..., str | None] = field(default=lambda **call: None)
    flat: bool = False


@dataclass(frozen=True)
class BackendStatus:
    """One line of `backends()`. `reason` says why the backend is not usable; it is None where it is."""

    op: str
    name: str
    devices: tuple[str, ...]
    usable: bool
    reason: str | None


_REGISTRY: dict[str, dict[str, Backend]] = {}
# `backend=None` picks the first of these that can run.
_ORDER = ("cuda", "native", "triton", "reference")


def register_backend(backend: Backend) -> None:
    """Add an implementation of an op."""
    candidates = _REGISTRY.setdefault(backend.op, {})
    candidates[backend.name] = backend
    _REGISTRY[backend.op] = {name: candidates[name] for name in _ORDER if name in candidates}


def backends() -> list[BackendStatus]:
    """Every backend of every op, with whether it can run in this installation and why not."""
    table = []
    for candidates in _REGISTRY.values():
        for candidate in candidates.values():
            reason = candidate.obstacle()
            table.append(BackendStatus(candidate.op, candidate.name, candidate.devices, reason is None, reason))
    return table


def find_backend(op: str, name: str) -> Backend:
    """The implementation `name` of `op`; the name must have come from `choose_backend`."""
    return _REGISTRY[op][name]


def choose_backend(op: str, requested: str | None, device_type: str, **call: Any) -> str:
    """Name of the backend that runs `op` on `device_type`: the one requested, or the first that can.

    Args:
        call: what the backends' `limits` decide by.

    Raises:
        TypeError: the request is not a string.
        ValueError: the requested backend does not exist, cannot run here, or does not run this call.
    """
    candidates = _REGISTRY[op]
    if requested is not None and not isinstance(requested, str):
        names = ", ".join(map(repr, candidates))
        raise TypeError(f"{op}: backend must be one of {names}, or None, got {shorten(requested)}.")
    if requested is None:
        for candidate in candidates.values():
            if device_type not in candidate.only_if_asked and _refusal(candidate, device_type, call) is None:
                return candidate.name
        raise ValueError(f"{op} has no backend that runs on {device_type!r} here.")
    if requested not in candidates:
        raise ValueError(f"{op} has no backend {requested!r}; it has {', '.join(map(repr, candidates))}.")
    refusal = _refusal(candidates[requested], device_type, call)
    if refusal is not None:
        raise ValueError(f"{op} cannot run on backend {requested!r}: {refusal}.")
    return requested


def _refusal(candidate: Backend, device_type: str, call: dict[str, Any]) -> str | None:
    if candidate.devices and device_type not in candidate.devices:
        return f"it runs on {' and '.join(candidate.devices)} tensors, got {device_type}"
    return candidate.obstacle() or candidate.limits(**call)
