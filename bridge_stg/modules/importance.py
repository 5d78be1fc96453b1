"""`importance`: the share of the attention that each row of a memory gets, without attention maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .memory_cross_attention import MemoryCrossAttention
from .multi_layer_query_cross_attention import MultiLayerQueryCrossAttention


def importance(
    attention: MemoryCrossAttention | MultiLayerQueryCrossAttention,
    query: Tensor | Sequence[Tensor],
    memory: Tensor,
    *,
    position: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Attention mass of each key: its weight in the softmax, averaged over heads, queries and layers.

    The mass comes out of `attend_memory`; no [B, H, Q, M] map is made. A decoder that also wants the output of the
    layer asks `MemoryCrossAttention` for both with `need_mass=True`.

    Args:
        attention: one attention, or the stack of a decoder's L layers.
        query: [B, Q, C], as for `attention`; for a stack, one for each layer, as a list or stacked [L, B, Q, C].
        memory, position, bias, key_padding_mask: as in `MemoryCrossAttention.forward`.

    Returns:
        [B, M] float32 (float64 for float64 inputs), a constant to autograd. The masses of a clip sum to 1, and to 0
        where it has no key to attend to.

    Raises:
        TypeError: `attention` is of another kind.
        ValueError: there is not one query tensor for each layer of a stack.
    """
    if not isinstance(attention, nn.Module) or not any(
        isinstance(x, MemoryCrossAttention) for x in attention.modules()
    ):
        raise TypeError(
            "importance: attention must be a MemoryCrossAttention or a MultiLayerQueryCrossAttention, "
            f"got {type(attention).__name__}."
        )
    stack = getattr(attention, "layers", None)  # a wrapper, such as a model with adapters, forwards it
    layers, queries = ([attention], [query]) if stack is None else (list(stack), list(query))
    if len(queries) != len(layers):
        raise ValueError(f"query must hold one tensor for each of {len(layers)} layers, got {len(queries)}.")
    options = {"position": position, "bias": bias, "key_padding_mask": key_padding_mask}
    with torch.no_grad():
        masses = [layer(q, memory, **options, need_mass=True)[1] for layer, q in zip(layers, queries, strict=True)]
    return torch.stack(masses).mean(dim=0)
