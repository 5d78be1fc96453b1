"""The launches of the target shapes, by the launchers on meta tensors: which kernels, how compiled, on which grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bridge_stg.triton_kernels.attend_memory import backward as attend_memory_backward
from bridge_stg.triton_kernels.attend_memory import forward as attend_memory
from bridge_stg.triton_kernels.attend_memory import shared_backward
from bridge_stg.triton_kernels.attend_memory.records import AttentionBackward, AttentionInputs
from bridge_stg.triton_kernels.prune_tokens import dense as prune_tokens
from bridge_stg.triton_kernels.prune_tokens import varlen as prune_tokens_varlen
from bridge_stg.triton_kernels.prune_tokens.records import PruneBackward, ScoreOptions
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from ..bench_attend_memory import providers as attend_memory_providers
from ..harness import Case
from .ahead_of_time import Variant, variant_of

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
    tokens, queries, options = _empty(b, n, d), _empty(b, q, d), ScoreOptions()
    kept, index, score, _ = prune_tokens.forward(tokens, queries, keep, options, None, False)
    if backward:
        prune_tokens.backward(PruneBackward(kept, score, kept, index, queries, n, options, True, True, score))


def _prune_varlen() -> None:
    b, n, d, q, keep = PRUNE.values()
    starts, budget = _empty(b + 1, dtype=torch.int32), _empty(dtype=torch.int64)
    tokens, queries = _empty(b * n, d), _empty(b, q, d)
    prune_tokens_varlen.forward(tokens, starts, queries, budget, "per_segment", b * keep, ScoreOptions())


def _attend(batch: int, backward: bool) -> None:
    """The kernels of six layers; the products of their projections are torch's."""
    query = _empty(batch, ATTEND["H"] * ATTEND["Q"], ATTEND["C"])
    inputs = AttentionInputs(query, _empty(batch, ATTEND["M"], ATTEND["C"]), *(None,) * 5, 0.1)
    outputs = [attend_memory.forward(inputs)[:2] for _ in range(LAYERS)]
    if backward:
        rows = []
        for out, lse in outputs:
            call = AttentionBackward(inputs, out, None, lse, out, True, False, False, False)
            rows.append(attend_memory_backward.layer_backward(call)[2])
        shared_backward.memory_gradients(rows, inputs.memory, None, False)


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
