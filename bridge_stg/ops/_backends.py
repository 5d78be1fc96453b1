"""Which implementations of each op exist, which of them run here, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        op: name of the op, as in `torch.ops.bridge_stg.<op>`.
        name: "reference", "native", "triton" or "cuda".
        devices: device types it runs on; empty for any.
        forward, backward: kernels with the arguments of the registered op, less its last one (`backend`).
        obstacle: returns why the backend cannot run in this installation, None if it can.
    """

    op: str
    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    devices: tuple[str, ...] = ()
    obstacle: Callable[[], str | None] = field(default=lambda: None)


@dataclass(frozen=True)
class BackendStatus:
    """One line of `backends()`. `reason` says why `usable` is False, and is None otherwise."""

    op: str
    name: str
    devices: tuple[str, ...]
    usable: bool
    reason: str | None


_REGISTRY: dict[str, dict[str, Backend]] = {}


def register_backend(backend: Backend) -> None:
    """Add an implementation. The first one registered for an op that is usable is what `backend=None` picks."""
    _REGISTRY.setdefault(backend.op, {})[backend.name] = backend


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


def choose_backend(op: str, requested: str | None, device_type: str) -> str:
    """Name of the backend that runs `op` on `device_type`: the one requested, or the first that can.

    Raises:
        ValueError: the requested backend does not exist, cannot run here, or does not run on this device.
    """
    candidates = _REGISTRY[op]
    if requested is None:
        for candidate in candidates.values():
            if _refusal(candidate, device_type) is None:
                return candidate.name
        raise ValueError(f"{op} has no backend that runs on {device_type!r} here.")
    if requested not in candidates:
        raise ValueError(f"{op} has no backend {requested!r}; it has {', '.join(map(repr, candidates))}.")
    refusal = _refusal(candidates[requested], device_type)
    if refusal is not None:
        raise ValueError(f"{op} cannot run on backend {requested!r}: {refusal}.")
    return requested


def _refusal(candidate: Backend, device_type: str) -> str | None:
    if candidate.devices and device_type not in candidate.devices:
        return f"it runs on {' and '.join(candidate.devices)} tensors, got {device_type}"
    return candidate.obstacle()
