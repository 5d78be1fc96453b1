"""Keys and values of one memory, computed for several layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.attend_memory.share_memory import MemoryHandle


class PackedWeights(NamedTuple):
    """A layer's `in_proj_weight` [3 C, C] and its `in_proj_bias` [3 C] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class ProjectedMemory(MemoryHandle):
    """The handle of a memory that `MultiLayerQueryCrossAttention.share` projected for its layers.

    Attributes:
        position: the position that was added to the keys, or None.
        by_layer: (keys, values) of each layer, each [B, M, H, head_dim].
    """

    position: Tensor | None
    by_layer: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]]


def project_memory(
    layers: Sequence[PackedWeights], heads: int, memory: Tensor, position: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, M, H, head_dim] of layers of one shape, in one product, or in two with a position."""
    width = layers[0].weight.shape[1]

    def project(x: Tensor, first: int, last: int) -> list[Tensor]:
        rows = slice(first * width, last * width)
        weight = _cat([layer.weight[rows] for layer in layers])
        biases = [layer.bias[rows] for layer in layers if layer.bias is not None]
        parts = F.linear(x, weight, _cat(biases) if biases else None)
        return list(parts.unflatten(-1, (len(layers) * (last - first), heads, width // heads)).unbind(2))

    if position is None:
        parts = project(memory, 1, 3)
        return list(zip(parts[::2], parts[1::2], strict=True))
    return list(zip(project(memory + position, 1, 2), project(memory, 2, 3), strict=True))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
