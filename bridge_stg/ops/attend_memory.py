"""`attend_memory`: attention of a few query rows over a memory that is key and value at once.

The cross-attention of a decoder layer with its projections absorbed (`modules.MemoryCrossAttention` does
that): scores = (q W_k^T) x^T and out = (P x) W_v, so that keys and values are the same rows x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from ._backends import Backend, choose_backend, register_backend
from ._checks import BOOLEAN, FLOATING, INT64, INTEGER, Expect, check_number, check_same_dtype, check_tensors
from ._library import define_op, differentiate, refuse_gradient
from ._triton import triton_backend

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

    Differentiable in query, memory, position and bias, through out and lse; once, not twice. The mass is a
    constant to autograd. Forward and backward are bitwise reproducible on one device.

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
        scale: factor on the products, such as 1 / sqrt(head_dim).
        return_mass: whether to return the attention mass of each key.
        validate: whether to check the values of `index` and `window`, which waits for the device.
        backend: one of `bridge_stg.backends()`; None picks.

    Returns:
        (out [B, R, C] dtype of the query, lse [B, R] float32), and with `return_mass` also mass [B, M] float32,
        mass[j] = sum_i exp(s[i, j] - lse[i]). float64 inputs give float64 lse and mass.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; a backend that
            cannot run; with `validate`, an index outside -1..M-1 or a window whose end lies before its start.
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
    if not torch.is_autocast_enabled(query.device.type):
        check_same_dtype("attend_memory", "query", query, memory=memory, position=position)
    factor = check_number("attend_memory", "scale", scale)
    if validate:
        _check_values(index, window, sizes["M"])
    chosen = choose_backend("attend_memory", backend, query.device.type, query=query, memory=memory)
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


@dataclass(frozen=True)
class Keys:
    """The keys that one call attends to, in the dtype it accumulates in.

    Attributes:
        value, key: [B, K, C] rows of the memory, and the same with their position.
        bias: [B, K] or None.
        visible: [B, 1 or R, K] bool or None for all.
        index: [B, K] rows of the memory with M for no key, or None for all rows in order.
    """

    value: Tensor
    key: Tensor
    bias: Tensor | None
    visible: Tensor | None
    index: Tensor | None


def gather_keys(
    memory: Tensor,
    position: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    index: Tensor | None,
    window: Tensor | None,
    dtype: torch.dtype,
) -> Keys:
    """Apply `index`, `key_mask` and `window`; rows that nobody may see become zeros."""
    rows = memory.shape[1]
    visible = key_mask
    if index is not None:
        inside = (index >= 0) & (index < rows)
        index = torch.where(inside, index, 0) if rows else index[:, :0]
        inside = inside[:, : index.shape[1]]
        visible = inside if key_mask is None else inside & key_mask.gather(1, index)
        memory, position = _rows(memory, index), None if position is None else _rows(position, index)
        bias = None if bias is None else bias.gather(1, index)
        index = index.masked_fill(~inside, rows)
    value = memory.to(dtype)
    key = value if position is None else value + position.to(dtype)
    if visible is not None:
        hidden = ~visible[:, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        visible = visible[:, None, :]
    if window is not None:
        place = torch.arange(value.shape[1], device=value.device)
        seen = (place >= window[..., :1]) & (place < window[..., 1:])  # [B, R, K]
        visible = seen if visible is None else visible & seen
    return Keys(value, key, None if bias is None else bias.to(dtype), visible, index)


def _rows(memory: Tensor, index: Tensor) -> Tensor:
    return memory[torch.arange(index.shape[0], device=index.device)[:, None], index]


def score_keys(query: Tensor, keys: Keys, scale: float) -> Tensor:
    """Scores [B, R, K] of query rows [B, R, C], -inf where a row may not see the key."""
    start = query.new_zeros(()) if keys.bias is None else keys.bias[:, None, :]
    score = torch.baddbmm(start, query, keys.key.transpose(1, 2), beta=0 if keys.bias is None else 1, alpha=scale)
    return score if keys.visible is None else score.masked_fill(~keys.visible, -torch.inf)


def softmax_and_lse(score: Tensor, may_hide: bool) -> tuple[Tensor, Tensor]:
    """P [B, R, K] and log-sum-exp [B, R]; a row of -inf, possible where `may_hide`, gives zeros and -inf."""
    if score.shape[-1] == 0:
        return score, score.new_full(score.shape[:-1], -torch.inf)
    probability, peak = score.softmax(dim=-1), score.amax(dim=-1)
    lse = peak - probability.amax(dim=-1).log()  # the largest P is exp(peak - lse)
    if may_hide:
        blind = peak == -torch.inf
        probability, lse = probability.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    return probability, lse


def reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of `attend_memory`, differentiable by autograd: (out, lse, mass, P).

    The mass is empty without `return_mass`, P [B, R, K] without `stash`.
    """
    dtype = accumulation_dtype(query)
    keys = gather_keys(memory, position, bias, key_mask, index, window, dtype)
    score = score_keys(query.to(dtype), keys, scale)
    probability, lse = softmax_and_lse(score, keys.visible is not None or keys.bias is not None)
    out = (probability @ keys.value).to(query.dtype)
    mass = lse.new_empty(0)
    if return_mass:
        mass = _scatter_rows(probability.sum(dim=1)[:, :, None], keys.index, memory.shape[1])[:, :, 0]
    return out, lse, mass, probability if stash else lse.new_empty(0)


def accumulation_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _scatter_rows(values: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Add values [B, K, C] into [B, rows, C] at `index`; the index `rows` is dropped. Deterministic."""
    if index is None:
        return values
    batch, _, width = values.shape
    total = values.new_zeros(batch * (rows + 1), width)
    offset = torch.arange(batch, device=index.device)[:, None] * (rows + 1)
    total = total.index_put(((index + offset).flatten(),), values.flatten(0, 1), accumulate=True)
    return total.view(batch, rows + 1, width)[:, :rows].contiguous()


def reference_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    memory: Tensor,
    position: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    index: Tensor | None,
    window: Tensor | None,
    lse: Tensor,
    probability: Tensor,
    scale: float,
    need_query: bool,
    need_memory: bool,
    need_position: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, memory, position and bias; an empty tensor for one that is not needed.

    With P from the forward (or taken again where it was not stashed) and dP = dOut x^T:
    dS = P * (dP - rowsum(P * dP) + dLse), dq = scale dS key, dkey = scale dS^T q, dx = P^T dOut + dkey,
    dposition = dkey, dbias = sum_rows dS.
    """
    dtype, rows = accumulation_dtype(query), memory.shape[1]
    keys = gather_keys(memory, position, bias, key_mask, index, window, dtype)
    wide = query.to(dtype)
    if probability.dim() != 3:
        score = score_keys(wide, keys, scale)
        probability, _ = softmax_and_lse(score, keys.visible is not None or keys.bias is not None)
    d_out = None if grad_out is None else grad_out.to(dtype)
    d_score = score_gradient(d_out, grad_lse, keys, lse, probability)
    empty = query.new_empty(0)
    zero = d_score.new_zeros(())
    d_query = empty
    if need_query:
        d_query = torch.baddbmm(zero, d_score, keys.key, beta=0, alpha=scale).to(query.dtype)
    d_memory = d_position = d_bias = empty
    if need_memory or need_position:
        d_key = torch.baddbmm(zero, d_score.transpose(1, 2), wide, beta=0, alpha=scale)
        if need_position:
            d_position = _scatter_rows(d_key, keys.index, rows).to(memory.dtype)
        if need_memory:
            d_rows = d_key if d_out is None else torch.baddbmm(d_key, probability.transpose(1, 2), d_out)
            d_memory = _scatter_rows(d_rows, keys.index, rows).to(memory.dtype)
    if need_bias:
        assert bias is not None
        d_bias = _scatter_rows(d_score.sum(dim=1)[:, :, None], keys.index, rows)[:, :, 0].to(bias.dtype)
    return d_query, d_memory, d_position, d_bias


def score_gradient(
    d_out: Tensor | None, grad_lse: Tensor | None, keys: Keys, lse: Tensor, probability: Tensor
) -> Tensor:
    """dS [B, R, K] from dOut [B, R, C] in the dtype of P [B, R, K], and dLse [B, R]."""
    d_score = torch.zeros_like(probability)
    if d_out is not None:
        d_probability = d_out @ keys.value.transpose(1, 2)
        d_score = torch.ops.aten._softmax_backward_data(d_probability, probability, -1, probability.dtype)
    if grad_lse is not None:
        d_score = d_score + probability * grad_lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    return d_score


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
    stash = stash and backend != "triton"  # it takes P again from lse
    return (
        query.new_empty(query.shape),
        query.new_empty((batch, heads_queries), dtype=dtype),
        query.new_empty((batch, rows) if return_mass else (0,), dtype=dtype),
        query.new_empty((batch, heads_queries, keys) if stash else (0,), dtype=dtype),
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


def _triton_limits(query: Tensor, memory: Tensor) -> str | None:
    if torch.float64 in (query.dtype, memory.dtype):
        return "it takes torch.float32, torch.bfloat16 and torch.float16, got torch.float64"
    if query.shape[-1] > 512:
        return f"it takes rows of at most 512 numbers (C), got {query.shape[-1]}"
    return None


register_backend(triton_backend("attend_memory", limits=_triton_limits))


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
