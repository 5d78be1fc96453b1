"""Conversion of other attentions to `MemoryCrossAttention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._linear import check_like_weight, weight_obstacle

if TYPE_CHECKING:
    from .memory_cross_attention import MemoryCrossAttention


def copy_multihead_attention(
    cls: type[MemoryCrossAttention], attention: nn.MultiheadAttention, path: Any
) -> MemoryCrossAttention:
    """Implements `MemoryCrossAttention.from_multihead_attention`."""
    name = f"{cls.__name__}.from_multihead_attention"
    if not isinstance(attention, nn.MultiheadAttention):
        kind = f"{type(attention).__module__}.{type(attention).__qualname__}"
        raise TypeError(f"{name}: attention must be a torch.nn.MultiheadAttention, got a {kind}.")
    if attention.bias_k is not None or attention.add_zero_attn:
        raise ValueError(f"{name}: attention must be without add_bias_kv and add_zero_attn: added rows are no memory.")
    own = getattr(attention.forward, "__func__", None) is nn.MultiheadAttention.forward
    if not own or attention._forward_pre_hooks or attention._forward_hooks:
        raise ValueError(
            f"{name}: attention must have the forward of nn.MultiheadAttention and no hooks, got a "
            f"{type(attention).__name__} with its own: remove hooks and quantisation first."
        )
    check_plain(name, out_proj=attention.out_proj)
    weight = attention.q_proj_weight if attention.in_proj_weight is None else attention.in_proj_weight
    made = cls(
        attention.embed_dim,
        attention.num_heads,
        attention.dropout,
        attention.in_proj_bias is not None,
        kdim=attention.kdim,
        vdim=attention.vdim,
        batch_first=attention.batch_first,
        device=weight.device,
        dtype=weight.dtype,
        path=path,
    )
    for key, parameter in made.named_parameters():
        owner, _, leaf = key.rpartition(".")
        _copy(parameter, getattr(attention.get_submodule(owner), leaf))
    return made.train(attention.training)


def copy_linears(
    cls: type[MemoryCrossAttention],
    q: nn.Linear,
    k: nn.Linear,
    v: nn.Linear,
    out: nn.Linear,
    num_heads: int,
    **options: Any,
) -> MemoryCrossAttention:
    """Implements `MemoryCrossAttention.from_linears`."""
    name = f"{cls.__name__}.from_linears"
    check_plain(name, q=q, k=k, v=v, out=out)
    inner, parts = q.out_features, (q, k, v)
    sizes = {"k.out_features": k.out_features, "v.out_features": v.out_features, "out.in_features": out.in_features}
    for size, width in sizes.items():
        if width != inner:
            raise ValueError(f"{name}: {size} must be q.out_features ({inner}), got {width}.")
    check_like_weight(name, q.weight, k=k.weight, v=v.weight, out=out.weight)
    place: dict[str, Any] = {"device": q.weight.device, "dtype": q.weight.dtype}
    made = cls(
        q.in_features,
        num_heads,
        bias=any(part.bias is not None for part in parts),
        kdim=k.in_features,
        vdim=v.in_features,
        inner_dim=inner,
        **place,
        **options,
    )
    made.out_proj = nn.Linear(inner, out.out_features, out.bias is not None, **place)
    if made.in_proj_weight is not None:
        _copy(made.in_proj_weight, *(part.weight for part in parts))
    else:
        for letter, part in zip("qkv", parts, strict=True):
            _copy(made.get_parameter(f"{letter}_proj_weight"), part.weight)
    if made.in_proj_bias is not None:
        _copy(made.in_proj_bias, *(q.weight.new_zeros(inner) if x.bias is None else x.bias for x in parts))
    _copy(made.out_proj.weight, out.weight)
    if out.bias is not None:
        _copy(made.out_proj.bias, out.bias)
    return made.train(q.training)


def check_plain(op: str, **layers: nn.Module) -> None:
    """Check that the layers are linear and have nothing but a weight and a bias.

    Raises:
        TypeError: an argument is not a module.
        ValueError: a layer is an adapter, quantised, parametrized, hooked, sharded, or not linear.
    """
    for name, layer in layers.items():
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{op}: {name} must be an nn.Linear, got {type(layer).__name__}.")
        if (obstacle := weight_obstacle(layer)) is not None:
            raise ValueError(
                f"{op}: {name} must be a plain nn.Linear, whose weight is all there is to copy, but {obstacle}."
            )


def _copy(parameter: Tensor, *sources: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(torch.cat(sources) if len(sources) > 1 else sources[0])
    parameter.requires_grad_(any(source.requires_grad for source in sources))
