"""The definition of `attend_memory` in plain PyTorch, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    zero = d_score.new_zeros(())
    d_query, d_memory, d_position, d_bias = (query.new_empty(0) for _ in range(4))  # no two may be one tensor
    if need_query:
        d_query = torch.baddbmm(zero, d_score, keys.key, beta=0, alpha=scale).to(query.dtype)
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
