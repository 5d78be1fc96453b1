"""Attention over projected keys and values, in the library that runs the call best: flash-attn, xformers or torch."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_choice

HALF = (torch.float16, torch.bfloat16)


def projected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_bias: Tensor | None = None,
    *,
    library: str | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(D) + score_bias) v, head by head.

    Args:
        query: [B, Q, H, D] floating point.
        key, value: [B, M, H, D], by their strides.
        score_bias: [B or 1, H or 1, Q or 1, M] in the dtype of the query, no row of it all -inf; None for none.
        library: one of `LIBRARIES`; None picks (`choose_library`).
        dropout: probability with which a weight is set to 0; only torch's "sdpa" drops.

    Returns:
        [B, Q, H, D].

    Raises:
        ValueError: an unknown library, or one that does not run this call.
    """
    if dropout:
        if library not in (None, "sdpa"):
            raise ValueError(f"projected_attention: library must be 'sdpa' or None with dropout, got {library!r}.")
        return _sdpa(query, key, value, score_bias, dropout)
    chosen = choose_library(query.device.type, query.dtype, query.shape[-1], score_bias is not None, library)
    return LIBRARIES[chosen].attend(query, key, value, score_bias)


def choose_library(
    device_type: str, dtype: torch.dtype, head_dim: int, has_bias: bool, requested: str | None = None
) -> str:
    """Return the name of the library for a call: the one requested, or the first that takes the call.

    Without a request that is, on CUDA, flash-attn, then xformers, if installed and without a score bias; else "sdpa",
    which is also what `torch.compile` traces. "flex" runs only when requested: it compiles a kernel at the first call.

    Raises:
        ValueError: the requested library does not exist or does not take the call.
    """
    call = (device_type, dtype, head_dim, has_bias)
    if requested is not None:
        check_choice("projected_attention", "library", requested, tuple(LIBRARIES))
        if (reason := LIBRARIES[requested].refusal(*call)) is not None:
            raise ValueError(f"projected_attention cannot use {requested}: {reason}.")
        return requested
    if device_type == "cuda" and not torch.compiler.is_compiling():
        for name in ("flash_attn", "xformers"):
            if LIBRARIES[name].refusal(*call) is None:
                return name
    return "sdpa"


@functools.cache
def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _refusal(
    module: str, widest: int, dtypes: tuple[torch.dtype, ...]
) -> Callable[[str, torch.dtype, int, bool], str | None]:
    def refusal(device_type: str, dtype: torch.dtype, head_dim: int, has_bias: bool) -> str | None:
        if _import(module) is None:
            return f"{module} is not installed"
        if device_type != "cuda":
            return f"it runs on cuda tensors, got {device_type}"
        if dtype not in dtypes:
            return f"it takes {' and '.join(map(str, dtypes))}, got {dtype}"
        if head_dim > widest or head_dim % 8:
            return f"it takes heads of a multiple of 8 up to {widest} numbers, got {head_dim}"
        return "it is not used with a bias or a mask" if has_bias else None

    return refusal


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, score_bias: Tensor | None) -> Tensor:
    # This interface, for equal lengths, splits the keys in the forward; the one for ragged lengths does not.
    return _import("flash_attn").flash_attn_func(query, key, value)


def _xformers(query: Tensor, key: Tensor, value: Tensor, score_bias: Tensor | None) -> Tensor:
    return _import("xformers.ops").memory_efficient_attention(query, key, value)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, score_bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=score_bias, dropout_p=dropout).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(query: Tensor, key: Tensor, value: Tensor, score_bias: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if score_bias is None:
        return _compiled_flex()(q, k, v).transpose(1, 2)
    bias = score_bias.expand(query.shape[0], query.shape[2], query.shape[1], -1)

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, place: Tensor) -> Tensor:
        return score + bias[batch, head, row, place]

    return _compiled_flex()(q, k, v, score_mod=add_bias).transpose(1, 2)


class Library(NamedTuple):
    """One library of attention kernels.

    Attributes:
        attend: called as (query, key, value, score_bias).
        refusal: called as (device_type, dtype, head_dim, has_bias); says why it does not take such a call, or None.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    refusal: Callable[[str, torch.dtype, int, bool], str | None]


LIBRARIES = {
    "flash_attn": Library(_flash_attn, _refusal("flash_attn", 256, HALF)),
    "xformers": Library(_xformers, _refusal("xformers.ops", 256, (*HALF, torch.float32))),
    "sdpa": Library(_sdpa, lambda *call: None),
    "flex": Library(_flex, lambda *call: None),
}
