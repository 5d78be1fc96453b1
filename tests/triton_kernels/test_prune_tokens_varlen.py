"""The Triton kernels of `prune_tokens_varlen`: that all that the rules can choose compiles, and results on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from bridge_stg.triton_kernels.prune_tokens import varlen as kernels
from bridge_stg.triton_kernels.prune_tokens.records import PruneBackward, ScoreOptions

from benchmarks.gpu.ahead_of_time import ARCHITECTURES, compile_variant, distinct, record
from bridge_stg.ops import prune_tokens_varlen

from . import gpu
from .resource_tables import gate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BUDGETS = {"per_segment": 40, "per_clip": 300, "top_p": 0.7, "threshold": 0.3}


def launch(segments, length, query_count, dtype, policy, *, backward=True, reduce="logsumexp"):
    """A call on meta tensors that uses everything: cosine, a budget for each segment, all gradients."""

    def run(width=64):
        rows = segments * length
        tokens = torch.empty(rows, width, device="meta", dtype=dtype)
        queries = torch.empty(segments, query_count, width, device="meta", dtype=dtype)
        cu_seqlens = torch.empty(segments + 1, device="meta", dtype=torch.int32)
        counts = policy in ("per_segment", "per_clip")
        budget = torch.empty(
            () if policy == "per_clip" else segments, device="meta", dtype=torch.int64 if counts else torch.float64
        )
        options = ScoreOptions("cosine", reduce, 0.5)
        packed, index, score, *_ = kernels.forward(tokens, cu_seqlens, queries, budget, policy, rows // 4, options)
        if backward:
            saved = (packed, index, queries, rows)
            kernels.backward(PruneBackward(packed, score, *saved, options, True, True, cu_seqlens=cu_seqlens))

    return run


LAUNCHES = {
    "per_segment-q16-bf16": launch(64, 196, 16, BF16, "per_segment"),
    "per_segment-long-q64-bf16": launch(4, 8192, 64, BF16, "per_segment"),
    "per_segment-mean-bf16": launch(64, 196, 16, BF16, "per_segment", reduce="mean"),
    "per_clip-q16-fp32": launch(2, 500, 16, FP32, "per_clip"),
    "per_clip-long-q64-fp32": launch(64, 196, 64, FP32, "per_clip"),
    "top_p-q16-bf16": launch(64, 196, 16, BF16, "top_p", backward=False),
    "top_p-long-q16-bf16": launch(4, 8192, 16, BF16, "top_p", backward=False),
    "threshold-q16-bf16": launch(64, 196, 16, BF16, "threshold", backward=False),
    "threshold-long-q16-bf16": launch(4, 8192, 16, BF16, "threshold", backward=False),
    "per_segment-q64-fp16": launch(64, 196, 64, FP16, "per_segment", backward=False),
}


def variants_of(width):
    return distinct([variant for name, run in LAUNCHES.items() for variant in record(partial(run, width), name)])


VARIANTS = variants_of(1024)
# Without the hint of alignment sm_80 has the hardest time.
COMPILED = [(variant, cc) for variant in VARIANTS for cc in ARCHITECTURES]
COMPILED += [(variant.plain(), 80) for variant in variants_of(1000)]


@pytest.mark.parametrize(("variant", "cc"), COMPILED, ids=lambda value: getattr(value, "name", None))
def test_compiles_within_its_resources(variant, cc):
    gate("prune_tokens_varlen", variant.name, cc, compile_variant(variant, cc))


def test_launches():
    kernels_of = [variant.kernel.__name__ for variant in record(launch(8, 100, 4, BF16, "top_p"))]
    assert kernels_of[:5] == ["bounds_kernel", "score_kernel", "select_rows_kernel", "offsets_kernel", "pack_kernel"]
    assert kernels_of[5:] == ["bounds_kernel", "coefficient_kernel", "query_kernel", "token_kernel"]


def ragged(device, dtype):
    lengths = torch.tensor([0, 196, 1, 577, 40, 3000, 0, 64])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
    tokens = torch.randn(int(lengths.sum()), 256, device=device).to(dtype)
    return tokens, cu_seqlens, (torch.randn(len(lengths), 8, 256, device=device) / 16).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("policy", BUDGETS)
@pytest.mark.parametrize(("scoring", "reduce"), [("dot", "max"), ("cosine", "logsumexp"), ("dot", "mean")])
def test_on_a_gpu(dtype, policy, scoring, reduce):
    tokens, cu_seqlens, queries = ragged("cuda", dtype)

    def call(backend, tokens, queries):
        return prune_tokens_varlen(
            tokens,
            cu_seqlens,
            queries,
            BUDGETS[policy],
            policy=policy,
            capacity=tokens.shape[0],
            scoring=scoring,
            reduce=reduce,
            backend=backend,
        )

    gpu.compare(call, tokens, queries)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", BUDGETS)
def test_selects_exactly_on_a_gpu(policy):
    tokens, cu_seqlens, queries = ragged("cuda", FP32)
    tokens, queries = tokens.round(), (queries * 16).round()
    for capacity in (tokens.shape[0], 100):
        found, expected = (
            prune_tokens_varlen(
                tokens, cu_seqlens, queries, BUDGETS[policy], policy=policy, capacity=capacity, backend=backend
            )
            for backend in ("triton", "reference")
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", BUDGETS)
def test_no_sync_captured_and_reproducible(policy):
    tokens, cu_seqlens, queries = ragged("cuda", BF16)
    tokens.requires_grad_()
    queries.requires_grad_()
    counts = policy in ("per_segment", "per_clip")
    budget = torch.tensor(BUDGETS[policy], device="cuda", dtype=torch.int64 if counts else torch.float64)

    def call():
        return prune_tokens_varlen(
            tokens, cu_seqlens, queries, budget, policy=policy, capacity=2000, scoring="cosine", backend="triton"
        )

    gpu.check_launches(call, tokens, queries)
