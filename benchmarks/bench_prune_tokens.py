"""`prune_tokens` against matmul, top-k, sort and gather, and against a learned gate that projects every token.

The tokens to keep stand out by several deviations of the others' scores, so that rounding cannot change which they
are, and outputs and gradients of all providers can be compared in every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bridge_stg.ops import prune_tokens, prune_tokens_varlen

from .harness import Benchmark, Case, Inputs, Prepared, Provider, Work, own_providers, relative_error
from .harness.cases import FORWARD, FORWARD_BACKWARD

SCORE_WIDTH = 256  # of the space in which the learned gate compares tokens and queries
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _case(
    segments: int, tokens: int, width: int, queries: int, dtype: torch.dtype, *, gate: bool = False, share: float = 0.25
) -> Case:
    keep = math.ceil(share * tokens)
    shape = f"{'learned gate, ' if gate else ''}B{segments} N{tokens} D{width} Q{queries} k{keep}"
    sizes = {"B": segments, "N": tokens, "D": width, "Q": queries, "keep": keep, "gate": gate}
    return Case(shape, dtype, sizes, (FORWARD, FORWARD_BACKWARD), ("tokens", "queries"))


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case(4, 96, 64, 4, torch.float32), _case(4, 96, 64, 4, torch.float32, gate=True)]
    if device == "cpu":
        return [
            *(_case(64, n, d, 8, torch.float32) for n in (196, 576) for d in (256, 1024)),
            _case(64, 576, 1024, 8, torch.float32, gate=True),
        ]
    half = torch.bfloat16
    return [
        _case(64, 576, 1024, 16, half),
        _case(64, 196, 256, 8, half),
        _case(128, 256, 3584, 16, half, share=0.125),
        _case(64, 576, 1024, 16, half, gate=True),
    ]


def inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    segments, count, width, queries = (case.sizes[name] for name in "BNDQ")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    query = normal(segments, queries, width)
    made: Inputs = {"queries": query.to(case.dtype)}
    if case.sizes["gate"]:
        w_q, w_f = (normal(SCORE_WIDTH, width) / math.sqrt(width) for _ in range(2))
        made |= {"w_q": w_q.to(case.dtype), "w_f": w_f.to(case.dtype)}
        direction = (query.mean(1) @ w_q.T) @ w_f  # [B, D]
        lift = 12 * F.normalize(direction, dim=-1)[:, None]
    else:
        lift = query[:, torch.arange(count, device=device) % queries]  # [B, N, D]
    chosen = normal(segments, count).argsort(dim=1)[:, : case.sizes["keep"]]
    stands_out = torch.zeros(segments, count, 1, device=device).scatter_(1, chosen[..., None], 1.0)
    made["tokens"] = (normal(segments, count, width) + stands_out * lift).to(case.dtype)
    return made


def reference(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    wide = {name: value.double() for name, value in inputs.items()}
    if case.sizes["gate"]:
        return _absorbed_gate(case, wide, "reference")
    return tuple(prune_tokens(wide["tokens"], wide["queries"], case.sizes["keep"], backend="reference"))


def disagreement(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    if not torch.equal(outputs[1], expected[1]):
        share = float((outputs[1] != expected[1]).float().mean())
        return f"{share:.1%} of the picks differ"
    for name, i in (("kept tokens", 0), ("score", 2)):
        error = relative_error(outputs[i], expected[i])
        if not error <= TOLERANCE[case.dtype]:
            return f"{name} have relative error {error:.1e}, allowed {TOLERANCE[case.dtype]:.0e}"
    return None


def work(case: Case, mode: str) -> Work:
    """Read every token, write the kept ones; backward reads kept rows and their gradients, writes all gradients."""
    keep, width, queries = case.sizes["keep"], case.sizes["D"], case.sizes["Q"]
    products = 1 if case.sizes["gate"] else queries  # its queries are averaged to one
    size = case.dtype.itemsize
    rows, kept = case.sizes["B"] * case.sizes["N"], case.sizes["B"] * keep
    moved, flops = size * width * (rows + kept), 2 * rows * products * width
    if mode == FORWARD_BACKWARD:
        moved += size * width * (rows + 2 * kept)
        flops += 4 * kept * products * width
    return Work(moved, flops)


def _absorbed_gate(case: Case, inputs: Inputs, backend: str | None) -> tuple[Tensor, ...]:
    query = (inputs["queries"].mean(1, keepdim=True) @ inputs["w_q"].T) @ inputs["w_f"]  # [B, 1, D]
    kept, index, score = prune_tokens(inputs["tokens"], query, case.sizes["keep"], backend=backend)
    return kept * score.softmax(dim=1).to(kept.dtype)[..., None], index, score


def _ours(backend: str | None) -> Callable[[Case, torch.device], Prepared]:
    def prepare(case: Case, device: torch.device) -> Prepared:
        if case.sizes["gate"]:
            return Prepared(lambda inputs: _absorbed_gate(case, inputs, backend))
        keep = case.sizes["keep"]
        return Prepared(lambda inputs: tuple(prune_tokens(inputs["tokens"], inputs["queries"], keep, backend=backend)))

    return prepare


def _varlen(case: Case, device: torch.device) -> Prepared:
    """The op for ragged segments, on segments of one size: what its generality costs."""
    segments, count, keep = (case.sizes[name] for name in ("B", "N", "keep"))
    starts = torch.arange(0, segments * count + 1, count, device=device, dtype=torch.int32)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        packed = prune_tokens_varlen(
            inputs["tokens"].flatten(0, 1), starts, inputs["queries"], keep, capacity=segments * keep
        )
        kept, index, score = (x.unflatten(0, (segments, keep)) for x in packed[:3])
        return kept, index - starts[:-1, None], score

    return Prepared(call)


def _pick(tokens: Tensor, score: Tensor, keep: int, flat: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of the scores [B, N], back in order, and the rows: by `gather`, or `index_select` on flat rows."""
    segments, count, width = tokens.shape
    index = score.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values
    if flat:
        start = torch.arange(0, segments * count, count, device=tokens.device)[:, None]
        kept = tokens.reshape(-1, width).index_select(0, (index + start).flatten()).view(segments, keep, width)
    else:
        kept = tokens.gather(1, index[..., None].expand(-1, -1, width))
    return kept, index, score.gather(1, index)


def _chain(flat: bool, compiled: bool) -> Callable[[Case, torch.device], Prepared]:
    def prepare(case: Case, device: torch.device) -> Prepared:
        keep = case.sizes["keep"]

        def chain(tokens: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            score = (tokens @ queries.transpose(1, 2)).amax(dim=2).float()
            return _pick(tokens, score, keep, flat)

        run = torch.compile(chain, dynamic=False) if compiled else chain
        return Prepared(lambda inputs: run(inputs["tokens"], inputs["queries"]))

    return prepare


def _projecting_gate(flat: bool, compiled: bool) -> Callable[[Case, torch.device], Prepared]:
    """The scoring of GroundVTS: (W_f x) . (W_q mean(q)), hard top-k, kept tokens times the softmax of their scores."""

    def prepare(case: Case, device: torch.device) -> Prepared:
        keep = case.sizes["keep"]

        def gate(tokens: Tensor, queries: Tensor, w_q: Tensor, w_f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            projected = F.linear(tokens, w_f)  # [B, N, SCORE_WIDTH]
            score = (projected @ F.linear(queries.mean(1), w_q)[..., None]).squeeze(-1).float()
            kept, index, weight = _pick(tokens, score, keep, flat)
            return kept * weight.softmax(dim=1).to(kept.dtype)[..., None], index, weight

        run = torch.compile(gate, dynamic=False) if compiled else gate
        return Prepared(lambda inputs: run(*(inputs[name] for name in ("tokens", "queries", "w_q", "w_f"))))

    return prepare


def providers(case: Case, device: torch.device) -> Sequence[Provider]:
    segments, count, width, queries = (case.sizes[name] for name in "BNDQ")
    tokens = torch.empty(segments, count, width, dtype=case.dtype, device="meta")
    query = torch.empty(segments, queries, width, dtype=case.dtype, device="meta")
    peer, name = (_projecting_gate, "gate of all tokens") if case.sizes["gate"] else (_chain, "matmul, topk, sort")
    return [
        *own_providers("prune_tokens", device, _ours, tokens=tokens, queries=query),
        *([] if case.sizes["gate"] else [Provider("bridge_stg, varlen", _varlen, ours=True)]),
        *(
            Provider(f"{name}, {how}{', torch.compile' if compiled else ''}", peer(flat, compiled), slow_start=compiled)
            for compiled in (False, True)
            for flat, how in ((False, "gather"), (True, "index_select"))
        ),
    ]


BENCHMARK = Benchmark(
    "prune_tokens",
    cases,
    inputs,
    providers,
    reference,
    disagreement,
    work,
    gradient_tolerance={torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2},
)
