"""`MultiLayerQueryCrossAttention`: the cross-attentions of all decoder layers, over one memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .memory_cross_attention import MemoryCrossAttention, Path


class MultiLayerQueryCrossAttention(nn.Module):
    """One `MemoryCrossAttention` for each of L layers, which all attend to the same memory.

    Call it with the queries of all layers at once, or `layer(i, ...)` from a decoder whose layers feed each other.

    Args:
        embed_dim, num_heads, bias, batch_first, path: as in `MemoryCrossAttention`.
        num_layers: L.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        *,
        bias: bool = True,
        batch_first: bool = True,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}.")
        self.layers = nn.ModuleList(
            MemoryCrossAttention(
                embed_dim,
                num_heads,
                bias=bias,
                batch_first=batch_first,
                path=path,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )

    def __len__(self) -> int:
        return len(self.layers)

    def layer(self, i: int, query: Tensor, memory: Tensor, **options: Any) -> Tensor:
        """Output of layer `i`, shape of the query; options are those of `MemoryCrossAttention.forward`."""
        return self.layers[i](query, memory, **options)[0]

    def forward(self, queries: Sequence[Tensor] | Tensor, memory: Tensor, **options: Any) -> list[Tensor]:
        """Outputs of all layers.

        Args:
            queries: one [B, Q, C] for each layer, as a list or stacked [L, B, Q, C].
            memory: [B, M, C], shared by the layers.
            options: as for `layer`, the same for every layer.

        Raises:
            ValueError: not one query tensor for each layer.
        """
        if len(queries) != len(self.layers):
            raise ValueError(f"queries must hold one tensor for each of {len(self.layers)} layers, got {len(queries)}.")
        return [self.layer(i, query, memory, **options) for i, query in enumerate(queries)]
