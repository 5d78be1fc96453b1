"""The spatial decoder of QGSL: predicts a box and a presence for every frame and tube hypothesis."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.core.checks import BOOLEAN, FLOATING, Expect, check_integer, check_tensors
from .boxes import inverse_sigmoid
from .multi_layer_query_cross_attention import MultiLayerQueryCrossAttention


class DecodedTubes(NamedTuple):
    """The output of `SpatialDecoder` for every decoder layer; the last is the answer, the others are auxiliary.

    Attributes:
        boxes: `[L, B, S, M, 4]` cxcywh in [0, 1], of at least float32.
        presence: `[L, B, S, M]`, logits of whether the event happens in the frame according to the hypothesis.
    """

    boxes: torch.Tensor
    presence: torch.Tensor


class TubeSelfAttention(nn.Module):
    """Self-attention over all frames and queries of a clip; padding frames are not attended to."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend within x `[B, S*M, C]`; mask is bool `[B, S*M]`, True where real, or None."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attend = None if mask is None else mask[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attend)
        return self.out(attended.transpose(1, 2).flatten(2))


class SpatialDecoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward; the decoder holds the cross-attention between them for all layers."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(dim)
        self.self_attention = TubeSelfAttention(dim, heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))

    def attend_tube(self, state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Self-attention of `[B, S, M, C]` over all S x M queries of a clip; mask `[B, S * M]`."""
        attended = self.self_attention(self.self_norm(state).flatten(1, 2), mask)
        return attended.unflatten(1, state.shape[1:3])


class SpatialDecoder(nn.Module):
    """Query-guided spatial localisation.

    Frame query of layer l = interactive query of layer l + output of layer l-1 + time embedding. Each layer attends to
    itself over (frames x hypotheses), to the frame's kept tokens, and predicts a box refinement and a presence.
    Refinement in logit space from a reference box follows Deformable DETR (Zhu et al. 2021, section 4.3).

    Args:
        dim: C, width of queries and memory.
        heads: number of attention heads.
        ffn_dim: hidden width of the feed-forward blocks.
        num_layers: L, number of layers.
        learned_reference: whether to start from a learned point instead of the one given to `forward`.

    Raises:
        TypeError, ValueError: a size is not an int of at least 1, or `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int, num_layers: int, *, learned_reference: bool = False) -> None:
        super().__init__()
        for name, size in {"dim": dim, "heads": heads, "ffn_dim": ffn_dim, "num_layers": num_layers}.items():
            check_integer("SpatialDecoder", name, size, 1)
        if dim % heads:
            raise ValueError(f"SpatialDecoder: heads must divide dim={dim}, got {heads}.")
        self.dim = dim
        self.layers = nn.ModuleList(SpatialDecoderLayer(dim, heads, ffn_dim) for _ in range(num_layers))
        self.cross_attention = MultiLayerQueryCrossAttention(dim, heads, num_layers)
        self.time_projection = nn.Linear(dim, dim)
        self.output_norm = nn.LayerNorm(dim)
        self.box_heads = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), _ZeroLinear(dim, 4))
            for _ in range(num_layers)
        )
        self.presence_heads = nn.ModuleList(nn.Linear(dim, 1) for _ in range(num_layers))
        self.learned_centre = nn.Parameter(torch.empty(2)) if learned_reference else None
        self.initial_size = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the first boxes to a quarter of the frame's sides; a learned reference starts in the middle."""
        if self.learned_centre is not None:
            nn.init.zeros_(self.learned_centre)
        nn.init.constant_(self.initial_size, -1.1)  # sigmoid: a quarter

    def forward(
        self,
        interactive: torch.Tensor,
        memory: torch.Tensor,
        times: torch.Tensor,
        *,
        reference: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
    ) -> DecodedTubes:
        """Decode the tubes of a batch of clips.

        Args:
            interactive: `[L, B, M, C]` from `SemanticBridge`.
            memory: `[B, S, K, C]`, the kept tokens of each frame.
            times: `[B, S]`, seconds.
            reference: `[B, S, 2]`, starting centres in [0, 1]; required unless `learned_reference`.
            bias: `[B, S, K]`, additive attention bias per token (the pruner's log gate).
            frame_mask: `[B, S]` bool, False for padding frames.

        Raises:
            TypeError, ValueError: a tensor has the wrong dtype, shape or device, or `reference` is missing and none is
                learned.
        """
        check_tensors(
            "SpatialDecoder",
            Expect("interactive", interactive, f"{len(self.layers)} B M {self.dim}", FLOATING),
            Expect("memory", memory, f"B S K {self.dim}", FLOATING),
            Expect("times", times, "B S", FLOATING),
            Expect("reference", reference, "B S 2", FLOATING, optional=True),
            Expect("bias", bias, "B S K", FLOATING, optional=True),
            Expect("frame_mask", frame_mask, "B S", BOOLEAN, optional=True),
        )
        _, batch, queries, dim = interactive.shape
        frames = memory.shape[1]
        if self.learned_centre is not None:
            centre = self.learned_centre.expand(batch, frames, 2)
        elif reference is not None:
            centre = inverse_sigmoid(reference)
        else:
            raise ValueError("reference must be given: this decoder has no learned starting point.")
        box = torch.cat([centre, self.initial_size.expand(batch, frames, 2)], dim=-1)[:, :, None]
        # In bfloat16 a box would be off by 0.4% of the frame.
        box = box.expand(batch, frames, queries, 4).to(torch.promote_types(box.dtype, torch.float32))
        time = self.time_projection(sinusoidal_embedding(times, dim).to(memory.dtype))[:, :, None]  # [B, S, 1, C]
        token_mask = None if frame_mask is None else frame_mask.repeat_interleave(queries, dim=1)
        flat_memory = self.cross_attention.share(memory.flatten(0, 1), queries=queries)
        flat_bias = None if bias is None else bias.flatten(0, 1)
        state = torch.zeros(batch, frames, queries, dim, dtype=memory.dtype, device=memory.device)
        boxes, presence = [], []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, SpatialDecoderLayer)
            state = state + interactive[i][:, None] + time
            state = state + layer.attend_tube(state, token_mask)
            crossed = self.cross_attention.layer(i, layer.cross_norm(state).flatten(0, 1), flat_memory, bias=flat_bias)
            state = state + crossed.unflatten(0, (batch, frames))
            state = state + layer.ffn(state)
            output = self.output_norm(state)
            box = box + self.box_heads[i](output)
            boxes.append(box.sigmoid())
            presence.append(self.presence_heads[i](output).squeeze(-1))
            box = box.detach()
        return DecodedTubes(torch.stack(boxes), torch.stack(presence))


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, so that the first boxes are the reference boxes."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def sinusoidal_embedding(values: torch.Tensor, dim: int, *, max_period: float = 1000.0) -> torch.Tensor:
    """Sinusoidal embedding of real values, `[...]` to `[..., dim]`.

    Periods run geometrically from about half a unit to `max_period` units (Vaswani et al. 2017, with seconds or
    normalised coordinates in place of integer positions).
    """
    half = dim // 2
    exponent = torch.arange(half, device=values.device, dtype=torch.float32) / half
    frequency = 4 * math.pi * torch.exp(-math.log(2 * max_period) * exponent)
    angle = values[..., None].float() * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, dim - 2 * half)).to(values.dtype)
