"""`warmup` compiles kernels before they are needed: the first call of a Triton kernel takes seconds to compile it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..attend_memory.api import attend_memory
from ..prune_tokens.api import prune_tokens
from ..prune_tokens.varlen import prune_tokens_varlen
from .checks import check_integer

_SIZES = {"segments", "tokens", "width", "queries", "batch", "rows", "keys", "capacity"}


def warmup(shapes: Iterable[Mapping[str, Any]], device: torch.device | str = "cuda") -> int:
    """Call ops once, forward and backward, so that their kernels are compiled and cached on disk.

    A job of several ranks should do so before it starts: ranks that compile at different times stall the collectives.
    One compilation serves all numbers of tokens, queries and kept tokens. Another width, dtype, option or bucket of
    lengths compiles anew.

    Args:
        shapes: mappings with "op" and the sizes and options of a call:
            "prune_tokens": segments, tokens, width, queries, keep; optional dtype, scoring, reduce, masked;
            "prune_tokens_varlen": segments, tokens (rows in all), width, queries, budget, capacity; optional dtype,
            policy, scoring, reduce;
            "attend_memory": batch, rows (heads x queries), keys, width; optional dtype, position, bias, masked,
            indexed, windowed (booleans), return_mass.
        device: where to compile for.

    Returns:
        How many calls were made.

    Raises:
        TypeError, ValueError: an unknown op or device; a size that is missing, unknown or no positive integer; what
            the op raises.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"warmup: device must be one that torch knows, such as 'cuda', got {device!r}.") from None
    if isinstance(shapes, (str, Mapping)) or not isinstance(shapes, Iterable):
        raise TypeError(f"warmup: shapes must be a list of mappings, got {type(shapes).__name__}.")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("warmup compiles for the GPU that it runs on, and there is none here.")
    count = 0
    for shape in shapes:
        if not isinstance(shape, Mapping):
            raise TypeError(f"warmup: a shape must be a mapping with 'op' and sizes, got {shape!r}.")
        sizes = dict(shape)
        op = sizes.pop("op", None)
        if not isinstance(op, str) or op not in _WARMUPS:
            raise ValueError(f"warmup: op must be one of {', '.join(map(repr, _WARMUPS))}, got {op!r}.")
        try:
            inspect.signature(_WARMUPS[op]).bind(device=place, **sizes)
        except TypeError as error:
            raise ValueError(f"warmup: a shape of {op} has a {error}.") from None
        for name in _SIZES & sizes.keys():
            sizes[name] = check_integer("warmup", f"{name} of {op}", sizes[name], 1)
        outputs = [x for x in _WARMUPS[op](device=place, **sizes) if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        count += 1
    return count


def _prune_tokens(
    *,
    device: torch.device,
    segments: int,
    tokens: int,
    width: int,
    queries: int,
    keep: int,
    dtype: torch.dtype = torch.bfloat16,
    masked: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    x = torch.randn(segments, tokens, width, device=device, dtype=dtype, requires_grad=True)
    query = torch.randn(segments, queries, width, device=device, dtype=dtype, requires_grad=True)
    mask = torch.ones(segments, tokens, device=device, dtype=torch.bool) if masked else None
    return prune_tokens(x, query, keep, mask=mask, **options)


def _prune_tokens_varlen(
    *,
    device: torch.device,
    segments: int,
    tokens: int,
    width: int,
    queries: int,
    budget: float,
    capacity: int,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> tuple[Any, ...]:
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    query = torch.randn(segments, queries, width, device=device, dtype=dtype, requires_grad=True)
    cu_seqlens = torch.arange(segments + 1, device=device, dtype=torch.int32) * (tokens // segments)
    cu_seqlens[-1] = tokens
    return prune_tokens_varlen(x, cu_seqlens, query, budget, capacity=capacity, **options)


def _attend_memory(
    *,
    device: torch.device,
    batch: int,
    rows: int,
    keys: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    position: bool = False,
    bias: bool = False,
    masked: bool = False,
    indexed: bool = False,
    windowed: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    query = torch.randn(batch, rows, width, device=device, dtype=dtype, requires_grad=True)
    memory = torch.randn(batch, keys, width, device=device, dtype=dtype, requires_grad=True)
    return attend_memory(
        query,
        memory,
        position=torch.randn_like(memory, requires_grad=True) if position else None,
        bias=torch.randn(batch, keys, device=device, requires_grad=True) if bias else None,
        key_mask=torch.ones(batch, keys, device=device, dtype=torch.bool) if masked else None,
        index=torch.arange(keys, device=device).expand(batch, -1).contiguous() if indexed else None,
        window=torch.tensor([0, keys], device=device).expand(batch, rows, -1) if windowed else None,
        scale=width**-0.5,
        **options,
    )


# Each takes `device` and the sizes of a shape, calls the op on tensors that require gradients, returns its outputs.
_WARMUPS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "attend_memory": _attend_memory,
    "prune_tokens": _prune_tokens,
    "prune_tokens_varlen": _prune_tokens_varlen,
}
