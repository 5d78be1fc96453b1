"""The masks of `nn.MultiheadAttention` and a bias on the keys, combined into one term of the scores."""

from __future__ import annotations

import torch
from torch import Tensor


def split_padding(bias: Tensor | None, key_padding_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return (bias, bool mask); a floating point `key_padding_mask` is added to the bias on the keys."""
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        return bias, key_padding_mask
    return (key_padding_mask if bias is None else bias + key_padding_mask), None


def score_bias(
    bias: Tensor | None, padding: Tensor | None, attn_mask: Tensor | None, heads: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The term to add to the scores [B, H, Q, M], and which rows see any key.

    Softmax of a row of -inf, and its gradient, is NaN in some kernels and zero in others. Such a row is unmasked here,
    and the caller sets its output to zero.

    Args:
        bias: [B, M] floating point.
        padding: [B, M] bool, True for a key to ignore.
        attn_mask: [Q, M] or [B * H, Q, M]; bool, True for a key to ignore, or floating point, to be added.
        heads: H.
        dtype: dtype of the scores.

    Returns:
        (term [B or 1, H or 1, Q or 1, M] of `dtype`, seen [B or 1, Q or 1, H or 1, 1] bool), both None for no mask.
    """
    total = None if bias is None else bias.to(dtype)[:, None, None]
    if attn_mask is not None:
        grid = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads))
        total = _apply(total, grid, dtype)
    if padding is not None:
        total = _apply(total, padding[:, None, None], dtype)
    if total is None:
        return None, None
    seen = (total != -torch.inf).any(dim=-1, keepdim=True)
    return torch.where(seen, total, 0.0), seen.transpose(1, 2)


def _apply(total: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype) if total is None else total + mask.to(dtype)
    start = torch.zeros(mask.shape, dtype=dtype, device=mask.device) if total is None else total
    return start.masked_fill(mask, -torch.inf)
