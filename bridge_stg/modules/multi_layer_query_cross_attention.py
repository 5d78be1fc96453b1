"""`MultiLayerQueryCrossAttention`: the cross-attentions of all decoder layers, over one memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops import share_memory
from .memory_cross_attention import PROJECTED, MemoryCrossAttention, Path, ProjectedMemory, project_memory


class MultiLayerQueryCrossAttention(nn.Module):
    """One `MemoryCrossAttention` for each of L layers, which all attend to the same memory.

    Call it with the queries of all layers at once. A decoder whose layers feed each other calls `share(memory, ...)`
    once and then `layer(i, ...)` with what that returns.

    Args:
        embed_dim, num_heads, bias, batch_first, path, library: as in `MemoryCrossAttention`.
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
        library: str | None = None,
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
                library=library,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def share(self, memory: Tensor, *, queries: int, position: None = None, fuse: bool | None = None) -> Tensor: ...

    @overload
    def share(
        self, memory: Tensor, *, queries: int, position: Tensor, fuse: bool | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def share(
        self, memory: Tensor, *, queries: int, position: Tensor | None = None, fuse: bool | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The memory to give to every layer, so that what the layers have in common is done once.

        Where the layers absorb their projections this is `ops.share_memory`: one gradient of the memory for all of
        them. Where they project and `fuse`, keys and values of all layers are made here by one product, with the
        weights of this moment. What is returned are ordinary tensors; a layer that is given another tensor, such as one
        that reentrant checkpointing detached, does its part by itself. In `torch.compile` nothing is shared.

        Args:
            memory: [B, M, C]; for modules that are not `batch_first`, [M, B, C], which is returned as it is.
            queries: Q, how many queries a clip the layers will be called with.
            position: shape of the memory, to be given to every layer with it.
            fuse: whether to project for all layers at once; None for on CUDA. On CPUs it measures slower: keys and
                values of a layer then lie far apart.

        Returns:
            The memory, and with a position the pair (memory, position).
        """
        layers = [layer for layer in self.layers if isinstance(layer, MemoryCrossAttention)]
        if torch.compiler.is_compiling() or not layers[0].batch_first:
            return memory if position is None else (memory, position)
        if layers[0].absorbs(queries, memory.shape[1], memory.device.type):
            return share_memory(memory, position)
        fuse = memory.is_cuda if fuse is None else fuse
        if fuse and all(_has_plain_weight(layer) for layer in layers):
            pairs = WeakKeyDictionary(zip(layers, project_memory(layers, memory, position), strict=True))
            memory = memory.view_as(memory)  # the name under which the layers find them
            PROJECTED[memory] = ProjectedMemory(position, pairs)
        return memory if position is None else (memory, position)

    def layer(self, i: int, query: Tensor, memory: Tensor, **options: Any) -> Tensor:
        """Output of layer `i`, shape of the query; options are those of `MemoryCrossAttention.forward`."""
        return self.layers[i](query, memory, **options)[0]

    def forward(
        self, queries: Sequence[Tensor] | Tensor, memory: Tensor, *, position: Tensor | None = None, **options: Any
    ) -> list[Tensor]:
        """Outputs of all layers.

        Args:
            queries: one [B, Q, C] for each layer, as a list or stacked [L, B, Q, C].
            memory: [B, M, C], shared by the layers.
            position: shape of the memory, or None.
            options: as for `layer`, the same for every layer.

        Raises:
            ValueError: not one query tensor for each layer.
        """
        if len(queries) != len(self.layers):
            raise ValueError(f"queries must hold one tensor for each of {len(self.layers)} layers, got {len(queries)}.")
        count = queries[0].shape[1]
        if position is None:
            memory = self.share(memory, queries=count)
        else:
            memory, position = self.share(memory, queries=count, position=position)
        return [self.layer(i, query, memory, position=position, **options) for i, query in enumerate(queries)]


def _has_plain_weight(layer: MemoryCrossAttention) -> bool:
    """Whether the weight can be used outside the layer: not while it is sharded."""
    weight = layer.in_proj_weight
    return type(weight) is nn.Parameter and weight.shape == (3 * layer.embed_dim, layer.embed_dim)
