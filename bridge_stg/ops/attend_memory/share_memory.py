"""`share_memory`: the gradient of a memory that many layers attend to, computed once in place of once a layer.

A layer that attends to a shared memory returns no gradient of it. It leaves the rows that this gradient is computed
from. Every layer takes the memory through one gradient barrier, an identity of autograd whose backward runs after those
of all layers and sums what they left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, overload

import torch
from torch import Tensor

from ...triton_kernels.attend_memory.records import AttentionBackward, AttentionInputs
from ..core.checks import FLOATING, Expect, check_same_dtype, check_tensors
from ..core.modes import autocasts, refuse_transforms, without_autocast
from .registration import SHARED_BACKENDS, attend, attend_backward, saved_for_backward


@overload
def share_memory(memory: Tensor) -> Tensor: ...


@overload
def share_memory(memory: Tensor, position: None) -> Tensor: ...


@overload
def share_memory(memory: Tensor, position: Tensor) -> tuple[Tensor, Tensor]: ...


def share_memory(memory: Tensor, position: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Share one computation of the gradient of a memory among several `attend_memory` calls.

    Give what is returned to every layer in place of the memory (and of the position); nothing else changes. These are
    ordinary tensors, equal to what was given. Other ops may use them too, and their gradients are added.

    The memory that is returned carries a handle (`SharedMemory`). A layer leaves its gradient to the common computation
    where it calls `attend_memory`, or a module over it, with this memory, and with this position or without one if none
    is shared. Otherwise the layer computes its own gradient, as for any tensor: with `index` or `window`; with a tensor
    that an op made from the memory (a transpose, the detach of reentrant checkpointing) or that was changed in place;
    in `torch.compile` and `torch.export`, on fake tensors, and under `create_graph=True`. The results agree up to
    rounding.

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
        # The caller gets views: a gradient taken or hooked there is whole, since the barrier lies behind them.
        memory, position = memory.view_as(memory), None if position is None else position.view_as(position)
        SharedMemory(memory, position).attach(memory)
    return memory if position is None else (memory, position)


def _autocast(x: Tensor, device: str) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))


class MemoryHandle:
    """What a memory carries, as an attribute, for the layers that attend to it.

    It belongs to one tensor and lives as long as that. Tensors computed from the memory do not carry it. Where
    gradients are taken, a copy of the memory, or the memory after a change in place, has another autograd node than the
    handle remembers, and is a memory like any other.
    """

    _ATTRIBUTE = "_bridge_stg_memory_handle"
    _node: Any

    def attach(self, memory: Tensor) -> None:
        """Make `memory` carry this handle."""
        self._node = memory.grad_fn
        setattr(memory, self._ATTRIBUTE, self)

    @classmethod
    def of(cls, memory: Tensor) -> Self | None:
        """Return the handle of this class that `memory` carries, or None."""
        handle = getattr(memory, cls._ATTRIBUTE, None)
        return handle if isinstance(handle, cls) and handle._node is memory.grad_fn else None

    def __reduce__(self) -> tuple[Any, ...]:
        # torch.save writes the attributes of a tensor. A set is what torch.load with weights_only=True reads.
        return set, ()


class SharedMemory(MemoryHandle):
    """The handle of a memory that `share_memory` returned.

    Attributes:
        position: the position that is shared with the memory, or None.
    """

    def __init__(self, memory: Tensor, position: Tensor | None) -> None:
        self.position = position
        self._deferred = _DeferredRows()
        self._behind_barrier = _GradientBarrier.apply(self._deferred, memory, position)

    def defers(self, inputs: AttentionInputs, backend: str) -> bool:
        """Whether a call on this backend can leave the gradient of the memory to the barrier."""
        listed = inputs.index is not None or inputs.window is not None
        return not listed and inputs.position is self.position and backend in SHARED_BACKENDS

    def attend(self, inputs: AttentionInputs, return_mass: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return (out, lse, mass) of `attend_memory`."""
        query = inputs.query
        if autocasts(query.device.type):
            query = _autocast(query, query.device.type)
        layer = _Layer(inputs.scale, return_mass, backend, self._deferred)
        return _Attend.apply(query, *self._behind_barrier, inputs.bias, inputs.key_mask, layer)


class _Layer(NamedTuple):
    """What `_Attend` takes besides tensors; `deferred` is where the layer leaves its rows."""

    scale: float
    return_mass: bool
    backend: str
    deferred: _DeferredRows


class _Attend(torch.autograd.Function):
    """`attend_memory` of one layer, which leaves the gradient of the memory to the barrier."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        memory: Tensor,
        position: Tensor | None,
        bias: Tensor | None,
        key_mask: Tensor | None,
        layer: _Layer,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.dtype = layer, memory.dtype
        memory, position = memory.to(query.dtype), None if position is None else position.to(query.dtype)
        inputs = AttentionInputs(query, memory, position, bias, key_mask, None, None, layer.scale)
        out, lse, mass, probability = attend(inputs, layer.return_mass, True, layer.backend)
        ctx.save_for_backward(*inputs[:5], lse, saved_for_backward(out, probability, layer.backend))
        ctx.mark_non_differentiable(mass)
        return out, lse, mass

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_mass: None
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        *tensors, lse, saved = ctx.saved_tensors  # unpacked once: under checkpointing that runs the forward again
        inputs = AttentionInputs(*tensors, None, None, ctx.layer.scale)
        call = AttentionBackward(inputs, grad_out, grad_lse, lse, saved, *ctx.needs_input_grad[:4])
        backend = ctx.layer.backend
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_plain(inputs.query):
            d_query, d_memory, d_position, d_bias = attend_backward(call, backend)
            d_memory, d_position = (None if x is None else x.to(ctx.dtype) for x in (d_memory, d_position))
            return d_query, d_memory, d_position, d_bias, None, None
        with without_autocast(inputs.query.device.type):
            d_query, d_bias, rows = SHARED_BACKENDS[backend].layer_backward(call)
        # A run that is asked for other gradients alone (`inputs=`) leaves the barrier out.
        if torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            ctx.layer.deferred.add(backend, rows, inputs)
        return d_query, None, None, d_bias, None, None


class _GradientBarrier(torch.autograd.Function):
    """The identity of memory and position; its backward adds the gradients that the layers left to it."""

    @staticmethod
    def forward(
        ctx: Any, deferred: _DeferredRows, memory: Tensor, position: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.deferred, ctx.dtype = deferred, memory.dtype
        return memory.view_as(memory), None if position is None else position.view_as(position)

    @staticmethod
    def backward(
        ctx: Any, grad_memory: Tensor | None, grad_position: Tensor | None = None
    ) -> tuple[None, Tensor | None, Tensor | None]:
        _, need_memory, need_position = ctx.needs_input_grad
        for group in ctx.deferred.take():
            with without_autocast(group.memory.device.type):
                d_memory, d_position = SHARED_BACKENDS[group.backend].memory_backward(
                    group.rows, group.memory, group.position, need_position
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
class _Group:
    """Rows of the layers that ran on one backend in one dtype, and the memory as they saw it."""

    backend: str
    memory: Tensor
    position: Tensor | None
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    stream: Any = None

    def follow_stream(self) -> None:
        """Make the current stream wait for the one that computed the rows: autograd does so for gradients only."""
        if not self.memory.is_cuda:
            return
        stream = torch.cuda.current_stream(self.memory.device)
        if self.stream not in (None, stream):
            stream.wait_stream(self.stream)
            for x in (y for rows in self.rows for y in rows if isinstance(y, Tensor)):
                x.record_stream(stream)
        self.stream = stream


class _DeferredRows:
    """Rows that layers left in the runs of backward that have not reached the barrier yet."""

    def __init__(self) -> None:
        self._runs: dict[int, dict[tuple[str, torch.dtype], _Group]] = {}

    def add(self, backend: str, rows: tuple[Any, ...], inputs: AttentionInputs) -> None:
        """Leave the rows of one layer in the current run."""
        run = self._runs.setdefault(torch._C._current_graph_task_id(), {})
        group = run.setdefault((backend, inputs.memory.dtype), _Group(backend, inputs.memory, inputs.position))
        group.follow_stream()
        group.rows.append(rows)

    def take(self) -> list[_Group]:
        """Take all rows of the current run."""
        groups = list(self._runs.pop(torch._C._current_graph_task_id(), {}).values())
        for group in groups:
            group.follow_stream()
        return groups
