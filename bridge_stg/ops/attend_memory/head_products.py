"""Products of each head with its part of a projection, and the attention between two such products.

In float32 on the CPU they run in the compiled library, without the copies between layouts that batched products of
torch take. Elsewhere, and where something traces or converts the products, they are products of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.modes import autocasts, differentiates_forward
from ..core.native import library_obstacle
from .api import attend_memory

_NATIVE = torch.ops.bridge_stg_native


def expand_heads(narrow: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Multiply each head of [N, heads * D] by its D rows of the weight [heads * D, C]: [N, heads, C]."""
    if _runs_native(narrow, weight):
        return _Expand.apply(narrow, weight, heads)
    split = narrow.unflatten(1, (heads, -1)).transpose(0, 1)  # [H, N, D]
    return torch.bmm(split, weight.unflatten(0, (heads, -1))).transpose(0, 1)


def contract_heads(wide: Tensor, weight: Tensor) -> Tensor:
    """Multiply [N, heads, C] by the weight [heads * D, C], the transpose of `expand_heads`: [N, heads * D]."""
    if _runs_native(wide, weight):
        return _Contract.apply(wide, weight)
    split = torch.bmm(wide.transpose(0, 1), weight.unflatten(0, (wide.shape[1], -1)).transpose(1, 2))  # [H, N, D]
    return split.transpose(0, 1).flatten(1)


def attend_heads(
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    memory: Tensor,
    heads: int,
    *,
    position: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float,
    return_mass: bool = False,
) -> tuple[Tensor, ...]:
    """Expand the query by the weight of the keys, call `attend_memory`, and contract by the weight of the values.

    Args:
        query: [B, Q, heads * D], projected.
        key_weight, value_weight: [heads * D, C].
        memory, position, bias, key_mask, scale, return_mass: as in `attend_memory`.

    Returns:
        (out [B, Q, heads * D], lse [B, Q * heads]), and with `return_mass` also mass [B, M].
    """
    tensors = (query, key_weight, value_weight, memory, position, bias)
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not needed and not return_mass and _runs_native(query, key_weight, value_weight, memory, position):
        return _NATIVE.attend_heads.default(
            query, key_weight, value_weight, memory, position, bias, key_mask, heads, scale
        )
    batch, count, _ = query.shape
    width = memory.shape[2]
    # One product a head over all clips; a broadcast over clips would repeat the weights B times.
    rows = expand_heads(query.flatten(0, 1), key_weight, heads)  # [B Q, H, C]
    attended, *rest = attend_memory(
        rows.reshape(batch, count * heads, width),
        memory,
        position=position,
        bias=bias,
        key_mask=key_mask,
        scale=scale,
        return_mass=return_mass,
    )
    out = contract_heads(attended.view(batch * count, heads, width), value_weight)
    return out.view(batch, count, query.shape[2]), *rest


def _runs_native(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled library can take these tensors here."""
    tensors = [y for y in (x, *others) if y is not None]
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and all(y.dtype == torch.float32 for y in tensors)
        # Subclasses (sharded weights) and modes (one that counts operations) know the ops of torch alone.
        and all(type(y) in (Tensor, torch.nn.Parameter) for y in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and not autocasts("cpu")
        and not differentiates_forward()
        and not torch._C._are_functorch_transforms_active()  # autograd functions of this form do not know them
        and library_obstacle("cpu") is None
    )


def _correlate_heads(narrow: Tensor, wide: Tensor) -> Tensor:
    """Compute the gradient [heads * D, C] of the weight between [N, heads * D] and [N, heads, C]."""
    # A second derivative, which `create_graph` asks for, goes through products of torch.
    if not torch.is_grad_enabled() and _runs_native(narrow, wide):
        return _NATIVE.correlate_heads.default(narrow.contiguous(), wide.contiguous())
    split = narrow.unflatten(1, (wide.shape[1], -1)).permute(1, 2, 0)  # [H, D, N]
    return torch.bmm(split, wide.transpose(0, 1)).flatten(0, 1)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, narrow: Tensor, weight: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(narrow, weight)
        return _NATIVE.expand_heads.default(narrow.contiguous(), weight.contiguous(), heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        narrow, weight = ctx.saved_tensors
        need_narrow, need_weight, _ = ctx.needs_input_grad
        return (
            contract_heads(grad, weight) if need_narrow else None,
            _correlate_heads(narrow, grad) if need_weight else None,
            None,
        )


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wide: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(wide, weight)
        return _NATIVE.contract_heads.default(wide.contiguous(), weight.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, weight = ctx.saved_tensors
        need_wide, need_weight = ctx.needs_input_grad
        return (
            expand_heads(grad, weight, wide.shape[1]) if need_wide else None,
            _correlate_heads(grad, wide) if need_weight else None,
        )
