"""`MultiLayerQueryCrossAttention`: the cross-attentions of all decoder layers, over one memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops import share_memory
from ..ops.core.checks import FLOATING, Expect, check_integer, check_tensors
from ..ops.core.modes import autocasts
from ._projected_memory import PackedWeights, ProjectedMemory, project_memory
from .memory_cross_attention import MemoryCrossAttention, Path


class MultiLayerQueryCrossAttention(nn.Module):
    """One `MemoryCrossAttention` for each of L layers, which all attend to the same memory.

    Call it with the queries of all layers at once. A decoder whose layers feed each other calls `share(memory, ...)`
    once and then `layer(i, ...)` with what that returns.

    Args:
        embed_dim, num_heads, bias, batch_first, path, library: as in `MemoryCrossAttention`.
        num_layers: L.

    Raises:
        TypeError, ValueError: what `MemoryCrossAttention` raises, or `num_layers` is not an int of at least 1.
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
        check_integer(type(self).__name__, "num_layers", num_layers, 1)
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
        """Prepare a memory for all layers, so that their common work is done once.

        If the layers absorb their projections, `ops.share_memory` gives the memory one gradient for all of them. If
        they project and `fuse` is set, one product makes keys and values of all layers here, with the weights of this
        moment. The returned tensors are ordinary ones; a layer that gets another tensor, such as one that reentrant
        checkpointing detached, computes its keys and values itself. In `torch.compile` nothing is shared.

        Args:
            memory: [B, M, C]; for modules that are not `batch_first`, [M, B, C], which is returned as it is.
            queries: Q, the number of queries a clip that the layers will be called with.
            position: shape of the memory, which every layer must be given with it.
            fuse: whether to project for all layers at once; None does so on CUDA. On CPUs it is slower, because keys
                and values of a layer then lie far apart.

        Returns:
            The memory; with a position, the pair (memory, position).

        Raises:
            TypeError, ValueError: a tensor has the wrong dtype, shape or device, or `queries` is not an int of at
                least 0.
        """
        name = f"{type(self).__name__}.share"
        layers = [layer for layer in self.layers if isinstance(layer, MemoryCrossAttention)]
        shape = "B M C" if not layers else f"B M {layers[0].kdim}" if layers[0].batch_first else f"M B {layers[0].kdim}"
        check_integer(name, "queries", queries, 0)
        check_tensors(
            name,
            Expect("memory", memory, shape, FLOATING),
            Expect("position", position, shape, FLOATING, optional=True),
        )
        if torch.compiler.is_compiling() or not layers or not layers[0].batch_first:
            return memory if position is None else (memory, position)
        if layers[0].absorbs(queries, memory.shape[1], memory.device.type, memory.dtype):
            return share_memory(memory, position)
        fuse = memory.is_cuda if fuse is None else fuse
        packed = [_readable_weights(layer, memory) for layer in layers] if fuse and _alike(layers) else [None]
        if None not in packed:
            made = project_memory(cast(list[PackedWeights], packed), layers[0].num_heads, memory, position)
            pairs = WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]](zip(layers, made, strict=True))
            memory = memory.view_as(memory)
            ProjectedMemory(position, pairs).attach(memory)
        return memory if position is None else (memory, position)

    def layer(self, i: int, query: Tensor, memory: Tensor, **options: Any) -> Tensor:
        """Output of layer `i`, shape of the query; options are those of `MemoryCrossAttention.forward`.

        Raises:
            TypeError, ValueError: `i` is not an int in -L..L-1, or what the layer raises.
        """
        check_integer(f"{type(self).__name__}.layer", "i", i, -len(self.layers), len(self.layers) - 1, "layers")
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
            TypeError, ValueError: there is not one query tensor for each layer, or what the layers raise.
        """
        if not isinstance(queries, (Tensor, Sequence)):
            raise TypeError(f"queries must be a tensor or a list of tensors, got {type(queries).__name__}.")
        if len(queries) != len(self.layers):
            raise ValueError(f"queries must hold one tensor for each of {len(self.layers)} layers, got {len(queries)}.")
        if isinstance(memory, Tensor) and memory.dim() == 3:
            count = queries[0].shape[-2]
            if position is None:
                memory = self.share(memory, queries=count)
            else:
                memory, position = self.share(memory, queries=count, position=position)
        return [self.layer(i, query, memory, position=position, **options) for i, query in enumerate(queries)]


def _readable_weights(layer: MemoryCrossAttention, memory: Tensor) -> PackedWeights | None:
    """The weights of a layer, or None if they cannot be read outside its call.

    They cannot while they are sharded or offloaded, or if a parametrization or a hook makes them at the call.
    """
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    hooked = layer._forward_pre_hooks or "forward" in vars(layer)
    if hooked or type(weight) is not nn.Parameter or type(bias) not in (nn.Parameter, type(None)):
        return None
    fits = weight.shape == (3 * layer.embed_dim, layer.embed_dim) and weight.device == memory.device
    same = weight.dtype == memory.dtype or autocasts(memory.device.type)
    return PackedWeights(weight, bias) if fits and same else None


def _alike(layers: list[MemoryCrossAttention]) -> bool:
    return len({(x.embed_dim, x.num_heads, x.in_proj_bias is None) for x in layers}) == 1
