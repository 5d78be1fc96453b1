"""`attend_memory`: attention of a few query rows over a memory that is key and value at once.

The cross-attention of a decoder layer with its projections absorbed (`modules.MemoryCrossAttention` does
that): scores = (q W_k^T) x^T and out = (P x) W_v, so that keys and values are the same rows x.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.backends import Backend, choose_backend, register_backend
from ..core.checks import (
    BOOLEAN,
    FLOATING,
    INT64,
    INTEGER,
    Expect,
    check_flag,
    check_number,
    check_same_dtype,
    check_tensors,
)
from ..core.library import define_op, differentiate, refuse_gradient
from ..core.modes import autocasts, refuse_transforms
from ..core.native import native_backend
from ..core.triton import triton_backend
from .reference import accumulation_dtype, reference, reference_backward

# What `memory_hub.share_memory` made: the hub of each shared memory.
SHARED = WeakTensorKeyDictionary()


def attend_memory(
    query: Tensor,
    memory: Tensor,
    *,
    position: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    index: Tensor | None = None,
    window: Tensor | None = None,
    scale: float,
    return_mass: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Attend from every query row to the rows of the memory, which are both keys and values.

    s[i, j] = scale * query[i] . (memory[j] + position[j]) + bias[j], P = softmax_j(s), out[i] = sum_j P[i, j]
    memory[j], lse[i] = log sum_j exp(s[i, j]). Products of float16 and bfloat16 accumulate in float32.

    A row that sees no key gives zeros, lse = -inf and zero gradients, never NaN. What a row of the memory that
    is hidden by `key_mask` or left out by `index` holds does not matter, NaN included.

    Differentiable in query, memory, position and bias, through out and lse; once, not twice, and in reverse mode
    alone. The mass is a constant to autograd. Forward and backward are bitwise reproducible on one device.

    Args:
        query: [B, R, C] floating point, R = heads x queries.
        memory: [B, M, C], dtype of the query (under autocast any; query, memory and position are then cast).
        position: [B, M, C], dtype of the query, added to the keys only.
        bias: [B, M] floating point, added to the scores of every row.
        key_mask: [B, M] bool, True for a key that may be seen, as in `scaled_dot_product_attention`; None for all.
        index: [B, K] int64, rows of the memory to attend to, without a compacted copy. A row named twice is
            two keys. A value outside 0..M-1, such as the -1 of a padded list, is no key at all.
        window: [B, R, 2] int32 or int64, the keys [start, end) that each row may see: rows of the memory, or
            places in `index` where that is given. Bounds outside the keys are cut off.
        scale: factor on the products, such as 1 / sqrt(head_dim): a finite number that float32 holds.
        return_mass: whether to return the attention mass of each key.
        validate: whether to check the values of `index` and `window`, which waits for the device.
        backend: one of `bridge_stg.backends()`; None picks.

    Returns:
        (out [B, R, C] dtype of the query, lse [B, R] float32), and with `return_mass` also mass [B, M] float32,
        mass[j] = sum_i exp(s[i, j] - lse[i]). float64 inputs give float64 lse and mass.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; a backend that
            cannot run; with `validate`, an index outside -1..M-1 or a window whose end lies before its start.
        NotImplementedError: a second derivative, or one by `torch.func` (`grad`, `jvp`).
    """
    sizes = check_tensors(
        "attend_memory",
        Expect("query", query, "B R C", FLOATING),
        Expect("memory", memory, "B M C", FLOATING),
        Expect("position", position, "B M C", FLOATING, optional=True),
        Expect("bias", bias, "B M", FLOATING, optional=True),
        Expect("key_mask", key_mask, "B M", BOOLEAN, optional=True),
        Expect("index", index, "B K", INT64, optional=True),
        Expect("window", window, "B R 2", INTEGER, optional=True),
    )
    if not autocasts(query.device.type):
        check_same_dtype("attend_memory", "query", query, memory=memory, position=position)
    factor = check_number("attend_memory", "scale", scale)
    return_mass = check_flag("attend_memory", "return_mass", return_mass)
    refuse_transforms("attend_memory", query, memory, position, bias)
    if check_flag("attend_memory", "validate", validate) and not query.is_meta:  # which has no values
        _check_values(index, window, sizes["M"])
    call = {"query": query, "memory": memory, "index": index, "window": window}
    chosen = choose_backend("attend_memory", backend, query.device.type, **call)
    inputs = (query, memory, position, bias)
    stash = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    hub = SHARED.get(memory) if stash and not torch.compiler.is_compiling() else None
    if hub is not None and index is None and window is None and hub.defers(position, chosen):
        out, lse, mass = hub.attend(query, bias, key_mask, factor, return_mass, chosen)
    else:
        out, lse, mass, _ = cast(
            tuple[Tensor, Tensor, Tensor, Tensor],
            _forward_op(*inputs, key_mask, index, window, factor, return_mass, stash, chosen),
        )
    return (out, lse, mass.detach()) if return_mass else (out, lse)


def _check_values(index: Tensor | None, window: Tensor | None, rows: int) -> None:
    if index is not None and index.numel():
        low, high = (int(x) for x in index.aminmax())
        if low < -1 or high >= rows:
            wrong = low if low < -1 else high
            raise ValueError(f"attend_memory: index must be in -1..{rows - 1} (rows of the memory), got {wrong}.")
    if window is not None and bool((window[..., 1] < window[..., 0]).any()):
        start, end = window[window[..., 1] < window[..., 0]][0].tolist()
        raise ValueError(f"attend_memory: window must have start <= end, got [{start}, {end}).")


def _fake(
    query: Tensor,
    memory: Tensor,
    position: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    index: Tensor | None,
    window: Tensor | None,
    scale: float,
    return_mass: bool,
    stash: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads_queries, _ = query.shape
    rows = memory.shape[1]
    keys = rows if index is None else index.shape[1]
    dtype = accumulation_dtype(query)
    stashed = (batch, heads_queries, keys)
    if backend == "native":
        stashed = (batch, keys, (heads_queries + 15) // 16 * 16)
    stash = stash and backend != "triton"  # it takes P again from lse
    return (
        query.new_empty(query.shape),
        query.new_empty((batch, heads_queries), dtype=dtype),
        query.new_empty((batch, rows) if return_mass else (0,), dtype=dtype),
        query.new_empty(stashed if stash else (0,), dtype=dtype),
    )


def _fake_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    memory: Tensor,
    position: Tensor | None,
    bias: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needed = args[-5:-1]
    inputs = (query, memory, position, bias)
    query_grad, memory_grad, position_grad, bias_grad = (
        query.new_empty(0) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip(inputs, needed, strict=True)
    )
    return query_grad, memory_grad, position_grad, bias_grad


_INPUTS = "Tensor query, Tensor memory, Tensor? position, Tensor? bias, Tensor? key_mask, Tensor? index, Tensor? window"
_forward_op = define_op(
    "attend_memory",
    f"({_INPUTS}, float scale, bool return_mass, bool stash, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    autocast_cast=(0, 1, 2),
)
_backward_op = define_op(
    "attend_memory_backward",
    f"(Tensor? grad_out, Tensor? grad_lse, {_INPUTS}, Tensor lse, Tensor probability, float scale, "
    "bool need_query, bool need_memory, bool need_position, bool need_bias, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    backend_of="attend_memory",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    out, lse, _, probability = output
    # Triton takes P again from lse, and then needs rowsum(P * dP) = rowsum(out * dOut).
    ctx.save_for_backward(*inputs[:7], lse, out if inputs[-1] == "triton" else probability)
    ctx.scale = inputs[7]
    ctx.backend = inputs[-1]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *rest: None) -> tuple[Tensor | None, ...]:
    need = tuple(ctx.needs_input_grad[:4])
    if grad_out is None and grad_lse is None:
        return (None,) * 11
    grads = cast(
        tuple[Tensor, ...],
        _backward_op(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale, *need, ctx.backend),
    )
    return (*(grad if needed else None for grad, needed in zip(grads, need, strict=True)), *(None,) * 7)


differentiate(_forward_op, _backward, _setup_context)
refuse_gradient(_backward_op, "attend_memory is differentiable once: its gradient has no gradient.")
register_backend(Backend("attend_memory", "reference", reference, reference_backward))


def _native_limits(
    query: Tensor, memory: Tensor, index: Tensor | None = None, window: Tensor | None = None
) -> str | None:
    if torch.float64 in (query.dtype, memory.dtype):
        return "it takes torch.float32, torch.bfloat16 and torch.float16, got torch.float64"
    if index is not None or window is not None:
        return f"it attends to all rows of the memory in order, got {'an index' if window is None else 'a window'}"
    return None


register_backend(native_backend("attend_memory", has_backward=True, limits=_native_limits))


def _triton_limits(
    query: Tensor, memory: Tensor, index: Tensor | None = None, window: Tensor | None = None
) -> str | None:
    if torch.float64 in (query.dtype, memory.dtype):
        return "it takes torch.float32, torch.bfloat16 and torch.float16, got torch.float64"
    if query.shape[-1] > 512:
        return f"it takes rows of at most 512 numbers (C), got {query.shape[-1]}"
    return None


register_backend(triton_backend("attend_memory", "attend_memory.forward", limits=_triton_limits))


def _key_count(memory: Any, index: Any) -> int:
    return memory[1] if index is None else index[1]


@register_flop_formula(torch.ops.bridge_stg.attend_memory)
def _flops(
    query: Any, memory: Any, position: Any, bias: Any, key_mask: Any, index: Any, *args: Any, **kwargs: Any
) -> int:
    """Two products of [R, C] with [K, C] a clip; what masks and windows hide is counted."""
    batch, rows, width = query
    return 4 * batch * rows * _key_count(memory, index) * width


@register_flop_formula(torch.ops.bridge_stg.attend_memory_backward)
def _flops_backward(
    grad_out: Any,
    grad_lse: Any,
    query: Any,
    memory: Any,
    position: Any,
    bias: Any,
    key_mask: Any,
    index: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The four products of the backward with P at hand; a backend that recomputes P does a fifth."""
    batch, rows, width = query
    return 8 * batch * rows * _key_count(memory, index) * width
