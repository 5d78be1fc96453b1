"""`share_memory`: the gradient of a memory that many layers attend to, made once in place of once a layer.

A layer that attends to a shared memory leaves what its part of the gradient needs (a few rows), and returns none.
The parts of all layers are summed by one computation, in the backward of a tap that every layer took the memory from:
autograd runs it after all of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor

from ..core.checks import FLOATING, Expect, check_same_dtype, check_tensors
from ..core.modes import autocasts, refuse_transforms, without_autocast
from ..core.triton import kernels
from .api import SHARED, _backward_op, _forward_op
from .reference import gather_keys, score_gradient


@overload
def share_memory(memory: Tensor) -> Tensor: ...


@overload
def share_memory(memory: Tensor, position: None) -> Tensor: ...


@overload
def share_memory(memory: Tensor, position: Tensor) -> tuple[Tensor, Tensor]: ...


def share_memory(memory: Tensor, position: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """The memory, for several `attend_memory` calls that share one computation of its gradient.

    Give what is returned to every layer in place of the memory (and of the position); nothing else changes. All of it
    are ordinary tensors, equal to what was given. Other ops may use them too, and their gradients are added.

    A layer's gradient is deferred where it calls `attend_memory`, or a module over it, with this very memory, and with
    this very position or without one if none is shared. Otherwise that layer makes its own gradient, as it does for
    any tensor: with `index` or `window`, after an op that makes another tensor of the memory (a transpose, the detach
    of reentrant checkpointing), in `torch.compile` and `torch.export`, on fake tensors, under `create_graph=True`, and
    on a backend without a deferred gradient. The results agree up to rounding.

    Under autocast the memory and the position are converted once, here.

    Args:
        memory: [B, M, C] floating point.
        position: [B, M, C], dtype of the memory, or None.

    Returns:
        The memory, and with a position the pair (memory, position).

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, shape or device.
        NotImplementedError: a derivative by `torch.func` (`grad`, `jvp`).
    """
    check_tensors(
        "share_memory",
        Expect("memory", memory, "B M C", FLOATING),
        Expect("position", position, "B M C", FLOATING, optional=True),
    )
    refuse_transforms("share_memory", memory, position)
    device = memory.device.type
    if autocasts(device):
        memory, position = _autocast(memory, device), None if position is None else _autocast(position, device)
    check_same_dtype("share_memory", "memory", memory, position=position)
    wanted = memory.requires_grad or (position is not None and position.requires_grad)
    if wanted and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # The caller gets views: a gradient taken or hooked there is whole, since the tap lies behind them.
        memory, position = memory.view_as(memory), None if position is None else position.view_as(position)
        pending = _Pending()
        SHARED[memory] = MemoryHub(position, pending, *_Tap.apply(pending, memory, position))
    return memory if position is None else (memory, position)


def _autocast(x: Tensor, device: str) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))


@dataclass(frozen=True)
class MemoryHub:
    """What `attend_memory` looks up for a shared memory.

    Attributes:
        position: the position that is shared, or None.
        pending: where layers leave their rows.
        tap, position_tap: memory and position as the layers take them.
    """

    position: Tensor | None
    pending: _Pending
    tap: Tensor
    position_tap: Tensor | None

    def defers(self, position: Tensor | None, backend: str) -> bool:
        """Whether the gradient of a call with this position, on this backend, can be left to the tap."""
        return position is self.position and backend in HUB_BACKENDS

    def attend(
        self,
        query: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        return_mass: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, mass) of `attend_memory`."""
        if autocasts(query.device.type):
            query = _autocast(query, query.device.type)
        options = (key_mask, scale, return_mass, backend, self.pending)
        return cast(tuple[Tensor, Tensor, Tensor], _Attend.apply(query, self.tap, bias, self.position_tap, *options))


class _Attend(torch.autograd.Function):
    """One layer: `attend_memory`, whose gradient of the memory is left to the tap."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        tap: Tensor,
        bias: Tensor | None,
        position_tap: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        return_mass: bool,
        backend: str,
        pending: _Pending,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        memory = tap.to(query.dtype)
        position = None if position_tap is None else position_tap.to(query.dtype)
        out, lse, mass, probability = _forward_op(
            query, memory, position, bias, key_mask, None, None, scale, return_mass, True, backend
        )
        saved = out if backend == "triton" else probability
        ctx.save_for_backward(query, memory, position, bias, key_mask, lse, saved)
        ctx.mark_non_differentiable(mass)
        ctx.scale, ctx.backend, ctx.pending, ctx.dtype = scale, backend, pending, tap.dtype
        return out, lse, mass

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_mass: None
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * 9
        saved = ctx.saved_tensors  # unpacked once: under checkpointing that runs the forward again
        query, memory, position, *_ = saved
        need_query, need_memory, need_bias, need_position = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_plain(query):
            need = (need_query, need_memory, need_position, need_bias)
            tensors = (*saved[:5], None, None, *saved[5:])
            grads = _backward_op(grad_out, grad_lse, *tensors, ctx.scale, *need, ctx.backend)
            d_query, d_memory, d_position, d_bias = (g if n else None for g, n in zip(grads, need, strict=True))
            d_memory, d_position = (None if g is None else g.to(ctx.dtype) for g in (d_memory, d_position))
            return d_query, d_memory, d_bias, d_position, *(None,) * 5
        with without_autocast(query.device.type):
            d_query, d_bias, rows = HUB_BACKENDS[ctx.backend].layer_backward(
                grad_out, grad_lse, *saved, ctx.scale, need_query, need_bias
            )
        # A run that is asked for other gradients alone (`inputs=`) leaves the tap out.
        if torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            ctx.pending.add(ctx.backend, rows, memory, position)
        return d_query, None, d_bias, *(None,) * 6


class _Tap(torch.autograd.Function):
    """Memory and position as the layers take them; its backward sums what they left."""

    @staticmethod
    def forward(ctx: Any, pending: _Pending, memory: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.pending, ctx.dtype = pending, memory.dtype
        return memory.view_as(memory), None if position is None else position.view_as(position)

    @staticmethod
    def backward(
        ctx: Any, grad_memory: Tensor | None, grad_position: Tensor | None = None
    ) -> tuple[None, Tensor | None, Tensor | None]:
        _, need_memory, need_position = ctx.needs_input_grad
        for backend, part in ctx.pending.take():
            with without_autocast(part.memory.device.type):
                d_memory, d_position = HUB_BACKENDS[backend].memory_backward(
                    part.rows, part.memory, part.position, need_position
                )
            grad_memory = _add(grad_memory, d_memory.to(ctx.dtype))
            if d_position is not None:
                grad_position = _add(grad_position, d_position.to(ctx.dtype))
        return None, grad_memory if need_memory else None, grad_position if need_position else None


def _is_plain(x: Tensor) -> bool:
    """Whether kernels may be called past torch's dispatcher of subclasses and modes (fake tensors, counters)."""
    return type(x) in (Tensor, torch.nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


@dataclass
class _Part:
    """Rows of the layers that ran on one backend in one dtype, and the memory as they saw it."""

    memory: Tensor
    position: Tensor | None
    rows: list[Any] = field(default_factory=list)
    stream: Any = None


class _Pending:
    """Rows that layers have left in a backward run that has not reached the tap, by run."""

    def __init__(self) -> None:
        self._runs: dict[int, dict[tuple[str, torch.dtype], _Part]] = {}

    def add(self, backend: str, rows: Any, memory: Tensor, position: Tensor | None) -> None:
        run = self._runs.setdefault(torch._C._current_graph_task_id(), {})
        part = run.setdefault((backend, memory.dtype), _Part(memory, position))
        if memory.is_cuda:
            self._follow(part, memory.device)
        part.rows.append(rows)

    def _follow(self, part: _Part, device: torch.device) -> None:
        """Order what was left on one stream before what uses it on another; autograd does so for gradients only."""
        stream = torch.cuda.current_stream(device)
        if part.stream not in (None, stream):
            stream.wait_stream(part.stream)
            for x in (y for rows in part.rows for y in rows if isinstance(y, Tensor)):
                x.record_stream(stream)
        part.stream = stream

    def take(self) -> list[tuple[str, _Part]]:
        run = self._runs.pop(torch._C._current_graph_task_id(), {})
        for part in run.values():
            if part.memory.is_cuda:
                self._follow(part, part.memory.device)
        return [(backend, part) for (backend, _), part in run.items()]


class HubBackend(NamedTuple):
    """How a backend of `attend_memory` defers the gradient of the memory.

    Attributes:
        layer_backward: called as (grad_out, grad_lse, query, memory, position, bias, key_mask, lse, saved, scale,
            need_query, need_bias); gives (d_query, d_bias, rows), where rows is a tuple that memory_backward reads.
            `saved` is the P of the forward as that backend stashed it, or out for "triton".
        memory_backward: called as (list of rows, memory, position, need_position); gives d_memory, and d_position
            where it is needed, else None.
    """

    layer_backward: Callable[..., tuple[Tensor | None, Tensor | None, tuple[Any, ...]]]
    memory_backward: Callable[[Sequence[Any], Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]


class StashedRows(NamedTuple):
    """What a layer leaves where P was stashed.

    Attributes:
        query: [B, R, C].
        d_out: [B, R, C] or None.
        probability, d_score: [B, R, M].
        scale: factor on the products.
    """

    query: Tensor
    d_out: Tensor | None
    probability: Tensor
    d_score: Tensor
    scale: float


def stashed_layer_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    memory: Tensor,
    position: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    lse: Tensor,
    saved: Tensor,
    scale: float,
    need_query: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, StashedRows]:
    """The part of `reference_backward` that a layer does itself."""
    keys = gather_keys(memory, position, bias, key_mask, None, None, saved.dtype)
    wide = query.to(saved.dtype)
    d_out = None if grad_out is None else grad_out.to(saved.dtype)
    d_score = score_gradient(d_out, grad_lse, keys, lse, saved)
    d_query = d_bias = None
    if need_query:
        d_query = torch.baddbmm(d_score.new_zeros(()), d_score, keys.key, beta=0, alpha=scale).to(query.dtype)
    if need_bias:
        assert bias is not None
        d_bias = d_score.sum(dim=1).to(bias.dtype)
    return d_query, d_bias, StashedRows(wide, d_out, saved, d_score, scale)


def stashed_memory_backward(
    layers: Sequence[StashedRows], memory: Tensor, position: Tensor | None, need_position: bool
) -> tuple[Tensor, Tensor | None]:
    """d key = sum over layers of scale dS^T q, d memory = d key + sum of P^T dOut; in the dtype of accumulation.

    Added up in place, which measures faster than one product of all layers' rows put side by side.
    """
    total = torch.empty(memory.shape, dtype=layers[0].query.dtype, device=memory.device)
    for i, layer in enumerate(layers):
        total.baddbmm_(layer.d_score.transpose(1, 2), layer.query, beta=1 if i else 0, alpha=layer.scale)
    d_position = total.clone() if need_position else None
    for layer in layers:
        if layer.d_out is not None:
            total.baddbmm_(layer.probability.transpose(1, 2), layer.d_out)
    return total, d_position


def _triton_layer_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    memory: Tensor,
    position: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    lse: Tensor,
    saved: Tensor,
    scale: float,
    need_query: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, tuple[Any, ...]]:
    backward, layer = kernels("attend_memory.backward"), kernels("attend_memory.shared_backward").HubLayer
    query = query.contiguous()
    d_out = torch.zeros_like(query) if grad_out is None else grad_out.contiguous()
    d_query = d_bias = None
    with torch.cuda.device_of(query):
        delta = backward.row_delta(d_out, saved, grad_lse)
        if need_query or need_bias:
            d_query, d_bias = backward.query_gradients(
                query, d_out, lse, delta, memory, position, bias, key_mask, None, None, scale, need_bias
            )
    return d_query, d_bias if need_bias else None, layer(query, d_out, lse, delta, bias, key_mask, scale)


def _triton_memory_backward(
    layers: Sequence[Any], memory: Tensor, position: Tensor | None, need_position: bool
) -> tuple[Tensor, Tensor | None]:

    return kernels("attend_memory.shared_backward").hub_backward(layers, memory, position, need_position)


def _native_layer_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    memory: Tensor,
    position: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    lse: Tensor,
    saved: Tensor,
    scale: float,
    need_query: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, tuple[Any, ...]]:
    wide = query.float().contiguous()
    d_out = saved.new_empty(0) if grad_out is None else grad_out.float().contiguous()
    d_query, d_bias, d_score = torch.ops.bridge_stg_native.attend_memory_layer_backward.default(
        None if grad_out is None else d_out,
        grad_lse,
        wide,
        memory,
        position,
        bias,
        key_mask,
        lse,
        saved,
        scale,
        need_query,
        need_bias,
    )
    rows = (saved, d_score, wide, d_out)
    return d_query.to(query.dtype) if need_query else None, d_bias if need_bias else None, rows


def _native_memory_backward(
    layers: Sequence[Any], memory: Tensor, position: Tensor | None, need_position: bool
) -> tuple[Tensor, Tensor | None]:
    parts = [list(part) for part in zip(*layers, strict=True)]  # P, d score, query, d out of all layers
    d_memory, d_position = torch.ops.bridge_stg_native.attend_memory_shared_backward.default(
        memory, *parts, need_position
    )
    return d_memory, d_position if need_position else None


HUB_BACKENDS: dict[str, HubBackend] = {
    "native": HubBackend(_native_layer_backward, _native_memory_backward),
    "reference": HubBackend(stashed_layer_backward, stashed_memory_backward),
    "triton": HubBackend(_triton_layer_backward, _triton_memory_backward),
}
