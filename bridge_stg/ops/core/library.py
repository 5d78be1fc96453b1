"""Registration of ops with `torch.library`: schema, kernels, fake implementation, autocast and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .backends import find_backend
from .modes import refuse_transforms

NAMESPACE = "bridge_stg"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def define_op(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    pack: Callable[..., dict[str, Any]] | None = None,
    backend_of: str | None = None,
    autocast_cast: tuple[int, ...] = (),
) -> OpOverload:
    """Define `bridge_stg::<name><schema>` and return its default overload.

    The schema's last argument is `str backend`, which picks the kernel in the table of backends. Under autocast the op
    runs with autocast disabled, so that the matmuls of a kernel keep their precision.

    Args:
        fake: returns empty outputs of the right shapes, dtypes and strides. It takes the arguments of the schema, or
            what `pack` returns.
        pack: takes the arguments of the schema without `backend` by their names, and returns those of `fake` and of
            the backends by theirs; a schema is flat, backends take records. None where they are the same.
        backend_of: for a backward op, the op whose table entry holds it as `backward`.
        autocast_cast: positions of the tensor arguments that autocast converts to its dtype (float64 excepted).
    """
    LIBRARY.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
    op: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    names = [argument.name for argument in op._schema.arguments[:-1]]

    def call(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return function(*args) if pack is None else function(**pack(**dict(zip(names, args, strict=True))))

    def kernel(*args: Any) -> Any:
        refuse_transforms(backend_of or name, *(x for x in args if isinstance(x, Tensor)))
        backend = find_backend(backend_of or name, args[-1])
        function = backend.backward if backend_of else backend.forward
        assert function is not None, f"{backend_of} registered backend {args[-1]!r} without a backward"
        return function(*args[:-1]) if backend.flat else call(function, args[:-1])

    def fake_kernel(*args: Any) -> Any:
        return fake(*args) if pack is None else call(fake, args[:-1])

    for key in _DEVICES.values():
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake_kernel, lib=LIBRARY)
    for device, key in _DEVICES.items():
        LIBRARY.impl(name, _autocast_kernel(op, device, autocast_cast), f"Autocast{key}", with_keyset=True)
    return op


def _autocast_kernel(op: OpOverload, device: str, cast: tuple[int, ...]) -> Callable[..., Any]:
    def kernel(_keyset: Any, *args: Any) -> Any:
        values = list(args)
        dtype = torch.get_autocast_dtype(device)
        for position in cast:
            value = values[position]
            if value is not None and value.is_floating_point() and value.dtype != torch.float64:
                values[position] = value.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return op(*values)

    return kernel


def differentiate(op: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the gradient formula of `op`."""
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=LIBRARY)


def refuse_gradient(op: OpOverload, reason: str) -> None:
    """Make a backward pass through `op` raise NotImplementedError with `reason`; it would be silently wrong."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(reason)

    torch.library.register_autograd(op, backward, lib=LIBRARY)
