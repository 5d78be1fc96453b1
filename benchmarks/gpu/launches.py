"""The launches of the target shapes, by the launchers on meta tensors: which kernels, how compiled, on which grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bridge_stg.triton_kernels.attend_memory import forward as attend_memory
from bridge_stg.triton_kernels.attend_memory.shared_backward import HubLayer as SharedLayer
from bridge_stg.triton_kernels.attend_memory.shared_backward import hub_backward as shared_backward
from bridge_stg.triton_kernels.prune_tokens import dense as prune_tokens
from bridge_stg.triton_kernels.prune_tokens import varlen as prune_tokens_varlen
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from tests.triton_kernels.aot import Variant, variant_of

from ..bench_attend_memory import providers as attend_memory_providers
from ..harness import Case

BF16 = torch.bfloat16
LAYERS = 6
# The sizes of the targets: B segments of N tokens, Q queries, keep; and B memories of M rows, H heads x Q queries.
PRUNE = {"B": 64, "N": 576, "D": 1024, "Q": 16, "keep": 144}
ATTEND = {"M": 8192, "C": 256, "H": 8, "Q": 16}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    variant: Variant
    grid: tuple[int, ...]
    options: Mapping[str, Any]

    @property
    def kernel(self) -> str:
        return str(self.variant.kernel.__name__)

    @property
    def programs(self) -> int:
        count = 1
        for size in self.grid:
            count *= size
        return count

    @property
    def warps(self) -> int:
        return int(self.options.get("num_warps", 4))


def recorded(call: Callable[[], Any]) -> list[Launch]:
    """The launches of a call on meta tensors, none of which runs."""
    found: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        sizes = grid(options) if callable(grid) else grid
        found.append(Launch(variant_of(self.__name__, self, args, options), tuple(sizes), options))

    original = JITFunction.run
    JITFunction.run = run
    try:
        call()
    finally:
        JITFunction.run = original
    return found


def _empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _prune(backward: bool) -> None:
    b, n, d, q, keep = PRUNE.values()
    tokens, queries = _empty(b, n, d), _empty(b, q, d)
    kept, index, score, scores = prune_tokens.forward(tokens, queries, keep, "dot", "max", 1.0, None, False)
    if backward:
        prune_tokens.backward(
            kept, score, None, None, kept, index, score, scores, queries, n, "dot", "max", 1.0, False, True, True
        )


def _prune_varlen() -> None:
    b, n, d, q, keep = PRUNE.values()
    starts, budget = _empty(b + 1, dtype=torch.int32), _empty(dtype=torch.int64)
    prune_tokens_varlen.forward(
        _empty(b * n, d), starts, _empty(b, q, d), budget, "per_segment", b * keep, "dot", "max", 1.0
    )


def _attend(batch: int, backward: bool) -> None:
    """The kernels of six layers; the products of their projections are torch's."""
    rows, size, width = ATTEND["H"] * ATTEND["Q"], ATTEND["M"], ATTEND["C"]
    query, memory = _empty(batch, rows, width), _empty(batch, size, width)
    none = (None,) * 5
    layers = []
    for _ in range(LAYERS):
        out, lse, *_ = attend_memory.forward(query, memory, *none, 0.1, False, False)
        layers.append(SharedLayer(query, out, lse, lse, None, None, 0.1))
    if backward:
        for layer in layers:
            attend_memory.backward(out, lse, layer.query, memory, *none, layer.lse, out, 0.1, True, False, False, False)
        shared_backward(layers, memory, None)


class _Counter(TorchDispatchMode):
    """Counts the operations that launch a kernel of torch's own: no views, nothing of this project."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        free = function.is_view or function.name() in ("aten::_unsafe_view", "aten::detach")
        self.count += not free and function.namespace == "aten"
        return function(*args, **(kwargs or {}))


def torch_operations(batch: int, backward: bool) -> int:
    """How many kernels torch launches around those of `attend_memory` in the benchmark of six layers."""
    sizes = {"B": batch, **ATTEND}
    case = Case("", BF16, sizes)
    subject = next(p for p in attend_memory_providers(case, torch.device("meta")) if p.subject)
    prepared = subject.prepare(case, torch.device("meta"))
    inputs = {
        "query": _empty(LAYERS, batch, sizes["Q"], sizes["C"]).requires_grad_(),
        "memory": _empty(batch, sizes["M"], sizes["C"]).requires_grad_(),
    }
    with torch.set_grad_enabled(backward), _Counter() as counter:
        outputs = prepared.call(inputs)
        if backward:
            slopes = [_empty(*output.shape) for output in outputs]
            before = counter.count
            torch.autograd.grad(outputs, [*inputs.values(), *prepared.parameters], slopes)
            assert counter.count > before
    return counter.count - (len(outputs) if backward else 0)  # the slopes were made here


CALLS: Mapping[tuple[str, str], Callable[[], None]] = {
    ("prune_tokens", "forward"): lambda: _prune(False),
    ("prune_tokens", "forward+backward"): lambda: _prune(True),
    ("prune_tokens_varlen", "forward"): _prune_varlen,
    ("attend_memory B1", "forward"): lambda: _attend(1, False),
    ("attend_memory B1", "forward+backward"): lambda: _attend(1, True),
    ("attend_memory B16", "forward"): lambda: _attend(16, False),
    ("attend_memory B16", "forward+backward"): lambda: _attend(16, True),
}
