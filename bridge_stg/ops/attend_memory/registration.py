"""`attend_memory` as a registered op: schemas, fakes, gradients, backends, FLOP formulas.

The flat arguments of the schemas are packed into records, and records are unpacked, only here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...triton_kernels.attend_memory.records import AttentionBackward, AttentionInputs
from ..core.backends import Backend, register_backend
from ..core.library import define_op, differentiate, refuse_gradient
from ..core.native import native_backend
from ..core.triton import kernels, triton_backend
from .reference import (
    StashedRows,
    accumulation_dtype,
    reference,
    reference_backward,
    stashed_layer_backward,
    stashed_memory_backward,
)


def _pack_backward(grad_out: Tensor | None, grad_lse: Tensor | None, *rest: Any) -> AttentionBackward:
    *tensors, lse, saved, scale, need_query, need_memory, need_position, need_bias = rest
    inputs = AttentionInputs(*tensors, scale)
    return AttentionBackward(inputs, grad_out, grad_lse, lse, saved, need_query, need_memory, need_position, need_bias)


def _fake(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *packed, return_mass, stash, backend = flat
    inputs = AttentionInputs(*packed)
    query, keys, dtype = inputs.query, inputs.key_count, accumulation_dtype(inputs.query)
    batch, rows, _ = query.shape
    stashed = (batch, keys, (rows + 15) // 16 * 16) if backend == "native" else (batch, rows, keys)
    return (
        query.new_empty(query.shape),
        query.new_empty((batch, rows), dtype=dtype),
        query.new_empty((batch, inputs.memory.shape[1]) if return_mass else (0,), dtype=dtype),
        query.new_empty(stashed if stash and backend != "triton" else (0,), dtype=dtype),
    )


def _fake_backward(*flat: Any) -> tuple[Tensor, ...]:
    *packed, _ = flat
    call = _pack_backward(*packed)
    query, memory, position, bias = call.inputs[:4]
    return (
        query.new_empty(query.shape if call.need_query else (0,)),
        memory.new_empty(memory.shape if call.need_memory else (0,)),
        query.new_empty(0) if position is None or not call.need_position else position.new_empty(position.shape),
        query.new_empty(0) if bias is None or not call.need_bias else bias.new_empty(bias.shape),
    )


_INPUTS = "Tensor query, Tensor memory, Tensor? position, Tensor? bias, Tensor? key_mask, Tensor? index, Tensor? window"
_forward_op = define_op(
    "attend_memory",
    f"({_INPUTS}, float scale, bool return_mass, bool stash, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    autocast_cast=(0, 1, 2),
)
_backward_op = define_op(
    "attend_memory_backward",
    f"(Tensor? grad_out, Tensor? grad_lse, {_INPUTS}, Tensor lse, Tensor probability, float scale, "
    "bool need_query, bool need_memory, bool need_position, bool need_bias, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    backend_of="attend_memory",
)


def attend(
    inputs: AttentionInputs, return_mass: bool, stash: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the registered op: (out, lse, mass, P); the mass is empty without `return_mass`, P without `stash`."""
    return _forward_op(*inputs, return_mass, stash, backend)


def attend_backward(call: AttentionBackward, backend: str) -> tuple[Tensor | None, ...]:
    """Call the registered backward: gradients of query, memory, position and bias, None where not needed."""
    *tensors, scale = call.inputs
    needs = (call.need_query, call.need_memory, call.need_position, call.need_bias)
    grads = _backward_op(call.grad_out, call.grad_lse, *tensors, call.lse, call.saved, scale, *needs, backend)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def saved_for_backward(out: Tensor, probability: Tensor, backend: str) -> Tensor:
    """What the backward of a backend reads besides the inputs and lse.

    Triton computes P again from lse, and needs rowsum(P * dP), which is rowsum(out * dOut).
    """
    return out if backend == "triton" else probability


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _, _, ctx.backend = inputs
    out, lse, _, probability = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, lse, saved_for_backward(out, probability, ctx.backend))


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *rest: None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 11
    *tensors, lse, saved = ctx.saved_tensors
    inputs = AttentionInputs(*tensors, ctx.scale)
    call = AttentionBackward(inputs, grad_out, grad_lse, lse, saved, *ctx.needs_input_grad[:4])
    return *attend_backward(call, ctx.backend), *(None,) * 7


differentiate(_forward_op, _backward, _setup_context)
refuse_gradient(_backward_op, "attend_memory is differentiable once: its gradient has no gradient.")


def _register(backend: Backend) -> None:
    """Register a backend that takes records.

    Its `forward` takes (inputs, return_mass, stash) and gives what the op gives. Its `backward` takes an
    `AttentionBackward` and gives four gradients, None for one that is not needed.
    """
    forward, backward = backend.forward, backend.backward
    assert backward is not None

    def flat_forward(*flat: Any) -> tuple[Tensor, ...]:
        *packed, return_mass, stash = flat
        return forward(AttentionInputs(*packed), return_mass, stash)

    def flat_backward(*flat: Any) -> tuple[Tensor, ...]:
        call = _pack_backward(*flat)
        # Each None becomes an empty tensor of its own: no two outputs of an op may be one tensor.
        return tuple(call.inputs.query.new_empty(0) if grad is None else grad for grad in backward(call))

    register_backend(replace(backend, forward=flat_forward, backward=flat_backward))


def _kernel_limits(inputs: AttentionInputs) -> str | None:
    if torch.float64 in (inputs.query.dtype, inputs.memory.dtype):
        return "it takes torch.float32, torch.bfloat16 and torch.float16, got torch.float64"
    return None


def _native_limits(inputs: AttentionInputs) -> str | None:
    for name, tensor in (("a window", inputs.window), ("an index", inputs.index)):
        if tensor is not None:
            return f"it attends to all rows of the memory in order, got {name}"
    return _kernel_limits(inputs)


def _triton_limits(inputs: AttentionInputs) -> str | None:
    if (width := inputs.query.shape[-1]) > 512:
        return f"it takes rows of at most 512 numbers (C), got {width}"
    return _kernel_limits(inputs)


_register(Backend("attend_memory", "reference", reference, reference_backward))
_register(triton_backend("attend_memory", "attend_memory.backward", limits=_triton_limits))
# The native ops have the flat arguments of the registered op.
register_backend(native_backend("attend_memory", has_backward=True, limits=_native_limits))


class SharedBackend(NamedTuple):
    """How a backend computes the gradient of a shared memory: a part for each layer, and one sum over all layers.

    Attributes:
        layer_backward: takes the record of the backward of one layer, which has no index and no window. It gives
            (d query, d bias, rows), None for a gradient that is not needed. The rows are what the sum reads: a tuple.
        memory_backward: takes (rows of all layers, memory, position, need_position). It gives d memory and, where it
            is needed, d position, else None.
    """

    layer_backward: Callable[[AttentionBackward], tuple[Tensor | None, Tensor | None, tuple[Any, ...]]]
    memory_backward: Callable[[Sequence[Any], Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]


def _native_layer_backward(call: AttentionBackward) -> tuple[Tensor | None, Tensor | None, StashedRows]:
    inputs = call.inputs
    query = inputs.query.float().contiguous()
    d_out = None if call.grad_out is None else call.grad_out.float().contiguous()
    tensors = (d_out, call.grad_lse, query, *inputs[1:5], call.lse, call.saved)
    d_query, d_bias, d_score = torch.ops.bridge_stg_native.attend_memory_layer_backward.default(
        *tensors, inputs.scale, call.need_query, call.need_bias
    )
    rows = StashedRows(query, d_out, call.saved, d_score, 1.0)  # the kernel has multiplied d_score by the scale
    return d_query.to(inputs.query.dtype) if call.need_query else None, d_bias if call.need_bias else None, rows


def _native_memory_backward(
    layers: Sequence[StashedRows], memory: Tensor, position: Tensor | None, need_position: bool
) -> tuple[Tensor, Tensor | None]:
    d_memory, d_position = torch.ops.bridge_stg_native.attend_memory_shared_backward.default(
        memory,
        [layer.probability for layer in layers],
        [layer.d_score for layer in layers],
        [layer.query for layer in layers],
        [layer.query.new_empty(0) if layer.d_out is None else layer.d_out for layer in layers],
        need_position,
    )
    return d_memory, d_position if need_position else None


SHARED_BACKENDS: dict[str, SharedBackend] = {
    "native": SharedBackend(_native_layer_backward, _native_memory_backward),
    "reference": SharedBackend(stashed_layer_backward, stashed_memory_backward),
    "triton": SharedBackend(
        lambda call: kernels("attend_memory.backward").layer_backward(call),
        lambda *args: kernels("attend_memory.backward").memory_gradients(*args),
    ),
}


@register_flop_formula(torch.ops.bridge_stg.attend_memory)
def _flops(
    query: Any, memory: Any, position: Any, bias: Any, key_mask: Any, index: Any, *args: Any, **kwargs: Any
) -> int:
    """Two products of [R, C] with [K, C] a clip; what masks and windows hide is counted."""
    batch, rows, width = query
    keys = memory[1] if index is None else index[1]
    return 4 * batch * rows * keys * width


@register_flop_formula(torch.ops.bridge_stg.attend_memory_backward)
def _flops_backward(grad_out: Any, grad_lse: Any, *forward_args: Any, **kwargs: Any) -> int:
    """The four products of the backward with P at hand, twice the forward; a backend that recomputes P does a fifth."""
    return 2 * _flops(*forward_args)
