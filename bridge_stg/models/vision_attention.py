"""Vision attention over frames of equal size in one batched call instead of a Python loop over frames."""

from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision


class BatchedVisionAttention(nn.Module):
    """Base of a subclass of a family's vision attention that attends to neighbouring segments of one length at once.

    The stock modules split the sequence by `cu_seqlens` and call the attention once per frame and layer. Frames of one
    video have the same number of patches, so one call over `[segments, heads, patches, head_dim]` does the same; clips
    of different frame sizes take one call each. Flash attention takes `cu_seqlens` itself and keeps the stock path.
    """

    stock: ClassVar[Any]
    config: Any
    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    scaling: float

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if position_embeddings is None or "flash" in (self.config._attn_implementation or ""):
            return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.unbind(1)  # [patches of all segments, heads, head_dim]
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        attended = []
        start = 0
        for length, run in groupby(torch.diff(cu_seqlens).tolist()):
            stop = start + length * len(list(run))
            q, k, v = (x[start:stop].unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)  # [segments, heads, patches, head_dim]
            attended.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
            start = stop
        return self.proj(torch.cat(attended))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the stock class, because this class is made at run time."""
        return _unfilled, (self.stock,), self.__dict__


def batch_vision_attention(visual: nn.Module) -> None:
    """Switch every attention of a Qwen vision tower to the batched one, in place; the weights stay."""
    blocks = visual.blocks
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        if not isinstance(block.attn, BatchedVisionAttention):
            stock: Any = type(block.attn)
            block.attn.__class__ = _batched(stock)


@cache
def _batched(stock: Any) -> Any:
    return type(f"Batched{stock.__name__}", (BatchedVisionAttention, stock), {"stock": stock})


def _unfilled(stock: Any) -> Any:
    batched = _batched(stock)
    return batched.__new__(batched)
