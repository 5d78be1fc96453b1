"""The definition of `attend_memory` in plain PyTorch, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...triton_kernels.attend_memory.records import AttentionBackward, AttentionInputs


@dataclass(frozen=True)
class Keys:
    """The keys that one call attends to, in the dtype it accumulates in.

    Attributes:
        value, key: [B, K, C] rows of the memory, and the same with their position.
        bias: [B, K] or None.
        visible: [B, 1 or R, K] bool or None for all.
        index: [B, K] rows of the memory, M where a place of the list stands for no key; None for all rows in order.
    """

    value: Tensor
    key: Tensor
    bias: Tensor | None
    visible: Tensor | None
    index: Tensor | None


def gather_keys(inputs: AttentionInputs) -> Keys:
    """Apply `index`, `key_mask` and `window`; rows that nobody may see become zeros."""
    dtype = accumulation_dtype(inputs.query)
    _, memory, position, bias, key_mask, index, window, _ = inputs
    rows, visible = memory.shape[1], key_mask
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
    """Compute the scores [B, R, K] of query rows [B, R, C], -inf where a row may not see the key."""
    start = query.new_zeros(()) if keys.bias is None else keys.bias[:, None, :]
    score = torch.baddbmm(start, query, keys.key.transpose(1, 2), beta=0 if keys.bias is None else 1, alpha=scale)
    return score if keys.visible is None else score.masked_fill(~keys.visible, -torch.inf)


def softmax_and_lse(score: Tensor, may_hide: bool) -> tuple[Tensor, Tensor]:
    """Compute P [B, R, K] and log-sum-exp [B, R]; a row of -inf, possible where `may_hide`, gives zeros and -inf."""
    if score.shape[-1] == 0:
        return score, score.new_full(score.shape[:-1], -torch.inf)
    probability, peak = score.softmax(dim=-1), score.amax(dim=-1)
    lse = peak - probability.amax(dim=-1).log()  # the largest P is exp(peak - lse)
    if may_hide:
        blind = peak == -torch.inf
        probability, lse = probability.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    return probability, lse


def reference(inputs: AttentionInputs, return_mass: bool, stash: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of `attend_memory`, differentiable by autograd: (out, lse, mass, P).

    The mass is empty without `return_mass`, P [B, R, K] without `stash`.
    """
    query = inputs.query
    keys = gather_keys(inputs)
    score = score_keys(query.to(keys.value.dtype), keys, inputs.scale)
    probability, lse = softmax_and_lse(score, keys.visible is not None or keys.bias is not None)
    out = (probability @ keys.value).to(query.dtype)
    mass = lse.new_empty(0)
    if return_mass:
        mass = _scatter_rows(probability.sum(dim=1)[:, :, None], keys.index, inputs.memory.shape[1])[:, :, 0]
    return out, lse, mass, probability if stash else lse.new_empty(0)


def accumulation_dtype(query: Tensor) -> torch.dtype:
    """The dtype in which products of the query accumulate."""
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


class StashedRows(NamedTuple):
    """What one call adds to the gradient of its keys, where P is stashed.

    Attributes:
        query: [B, R, C].
        d_out: [B, R, C], or None for zeros.
        probability, d_score: P and the gradient of the scores, [B, R, K] (laid out as the backend likes).
        scale: factor by which the products of d_score are still to be multiplied.
    """

    query: Tensor
    d_out: Tensor | None
    probability: Tensor
    d_score: Tensor
    scale: float


def reference_backward(call: AttentionBackward) -> tuple[Tensor | None, ...]:
    """Gradients of query, memory, position and bias; None for one that is not needed.

    With P from the forward (or computed again where it was not stashed) and dP = dOut x^T:
    dS = P * (dP - rowsum(P * dP) + dLse), dq = scale dS key, dkey = scale dS^T q, dx = P^T dOut + dkey,
    dposition = dkey, dbias = sum_rows dS.
    """
    keys, memory = gather_keys(call.inputs), call.inputs.memory
    d_query, d_bias, rows = _row_gradients(call, keys)
    d_memory = d_position = None
    if call.need_memory or call.need_position:
        grads = _key_gradients([rows], call.need_memory, call.need_position)
        d_memory, d_position = (
            None if grad is None else _scatter_rows(grad, keys.index, memory.shape[1]).to(memory.dtype)
            for grad in grads
        )
    return d_query, d_memory, d_position, d_bias


def stashed_layer_backward(call: AttentionBackward) -> tuple[Tensor | None, Tensor | None, StashedRows]:
    """Gradients of query and bias where needed, and what `stashed_memory_backward` takes of this call."""
    return _row_gradients(call, gather_keys(call.inputs))


def stashed_memory_backward(
    layers: Sequence[StashedRows], memory: Tensor, position: Tensor | None, need_position: bool
) -> tuple[Tensor, Tensor | None]:
    """d memory and, where it is needed, d position: sums over layers, in the dtype of accumulation."""
    d_memory, d_position = _key_gradients(layers, True, need_position)
    assert d_memory is not None
    return d_memory, d_position


def _row_gradients(call: AttentionBackward, keys: Keys) -> tuple[Tensor | None, Tensor | None, StashedRows]:
    query, bias, scale = call.inputs.query, call.inputs.bias, call.inputs.scale
    wide, probability = query.to(keys.value.dtype), call.saved
    if probability.dim() != 3:
        may_hide = keys.visible is not None or keys.bias is not None
        probability, _ = softmax_and_lse(score_keys(wide, keys, scale), may_hide)
    d_out = None if call.grad_out is None else call.grad_out.to(wide.dtype)
    d_score = torch.zeros_like(probability)
    if d_out is not None:
        d_probability = d_out @ keys.value.transpose(1, 2)
        d_score = torch.ops.aten._softmax_backward_data(d_probability, probability, -1, probability.dtype)
    if call.grad_lse is not None:
        d_score = d_score + probability * call.grad_lse.masked_fill(call.lse == -torch.inf, 0.0)[..., None]
    d_query = d_bias = None
    if call.need_query:
        d_query = torch.baddbmm(d_score.new_zeros(()), d_score, keys.key, beta=0, alpha=scale).to(query.dtype)
    if call.need_bias:
        assert bias is not None
        d_bias = _scatter_rows(d_score.sum(dim=1)[:, :, None], keys.index, bias.shape[1])[:, :, 0].to(bias.dtype)
    return d_query, d_bias, StashedRows(wide, d_out, probability, d_score, scale)


def _key_gradients(
    layers: Sequence[StashedRows], need_memory: bool, need_position: bool
) -> tuple[Tensor | None, Tensor | None]:
    """d key = sum over layers of scale dS^T q, and d memory = d key + sum of P^T dOut: (d memory, d key), [B, K, C].

    The sums are taken in place, which measures faster than one product of all layers' rows put side by side.
    """
    first = layers[0]
    total = first.query.new_empty((first.query.shape[0], first.d_score.shape[2], first.query.shape[2]))
    for i, layer in enumerate(layers):
        total.baddbmm_(layer.d_score.transpose(1, 2), layer.query, beta=1 if i else 0, alpha=layer.scale)
    if not need_memory:
        return None, total
    d_key = total.clone() if need_position else None
    for layer in layers:
        if layer.d_out is not None:
            total.baddbmm_(layer.probability.transpose(1, 2), layer.d_out)
    return total, d_key
