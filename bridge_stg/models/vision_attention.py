"""Vision attention over frames of equal size in one batched call instead of a Python loop over frames."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention, apply_rotary_pos_emb_vision


class BatchedVisionAttention(Qwen2_5_VLVisionAttention):
    """`Qwen2_5_VLVisionAttention` that folds segments of one length into the batch dimension.

    The stock module splits the sequence by `cu_seqlens` and calls the attention once per frame and layer. Frames of
    one video have the same number of patches, so one call over `[segments, heads, patches, head_dim]` does the same.
    Falls back to the stock path for ragged segments and for flash attention, which takes `cu_seqlens` itself.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        lengths = torch.diff(cu_seqlens).tolist()
        if position_embeddings is None or "flash" in (self.config._attn_implementation or "") or len(set(lengths)) != 1:
            return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        total = hidden_states.shape[0]
        query, key, value = self.qkv(hidden_states).reshape(total, 3, self.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (x.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scaling)  # [segments, H, patches, hd]
        return self.proj(attended.transpose(1, 2).reshape(total, -1))


def batch_vision_attention(visual: nn.Module) -> None:
    """Switch every attention of a Qwen2.5-VL vision tower to `BatchedVisionAttention`, in place; weights unchanged."""
    for module in visual.modules():
        if type(module) is Qwen2_5_VLVisionAttention:
            module.__class__ = BatchedVisionAttention
