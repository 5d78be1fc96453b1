"""The Triton kernels of `prune_tokens`: what the rules choose, that all of it compiles, and results on a GPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from bridge_stg.triton_kernels.common import configs, tuning
from bridge_stg.triton_kernels.common.nvtx import nvtx_range
from bridge_stg.triton_kernels.prune_tokens import dense as kernels
from bridge_stg.triton_kernels.prune_tokens.records import PruneBackward, ScoreOptions

from benchmarks.gpu.ahead_of_time import ARCHITECTURES, compile_variant, distinct, record
from bridge_stg.ops import prune_tokens
from bridge_stg.ops.core.backends import choose_backend

from . import gpu
from .resource_tables import gate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def launch(batch, length, query_count, dtype, *, keep=None, backward=True, dense=False, reduce="logsumexp"):
    """A call on meta tensors that uses everything: cosine, mask, all gradients."""

    def run(width=64):
        tokens = torch.empty(batch, length, width, device="meta", dtype=dtype)
        queries = torch.empty(batch, query_count, width, device="meta", dtype=dtype)
        mask = torch.empty(batch, length, device="meta", dtype=torch.bool)
        options = ScoreOptions("cosine", reduce, 0.5, masked=True)
        kept, index, score, scores = kernels.forward(tokens, queries, keep or length // 4, options, mask, True)
        if backward:
            call = PruneBackward(kept, score, kept, index, queries, length, options, True, True, score, tokens, scores)
            kernels.backward(replace(call, grad_scores=scores if dense else None))

    return run


FUSED, SPLIT = 512, 8  # segments
LAUNCHES = {
    f"fused-{span}-q{query_count}-{name}": launch(FUSED, span, query_count, dtype, backward=False)
    for span in configs.SELECT_SPANS
    if span <= configs.FUSED_LENGTH
    for query_count, name, dtype in ((16, "bf16", BF16), (64, "bf16", BF16), (16, "fp32", FP32), (64, "fp32", FP32))
} | {
    "split-256-q16-bf16": launch(SPLIT, 256, 16, BF16),
    "split-1024-q16-fp32-dense": launch(SPLIT, 1024, 16, FP32, dense=True),
    "split-4096-q64-bf16-dense": launch(SPLIT, 4096, 64, BF16, dense=True),
    "split-1024-q64-fp16": launch(SPLIT, 1024, 64, FP16),
    "split-long-q64-fp32": launch(1, 262144, 64, FP32),
    "fused-1024-mean-bf16": launch(FUSED, 1024, 16, BF16, backward=False, reduce="mean"),
    "split-256-mean-bf16": launch(SPLIT, 256, 16, BF16, reduce="mean"),
    "split-1024-mean-fp32-dense": launch(SPLIT, 1024, 64, FP32, dense=True, reduce="mean"),
}


def variants_of(width):
    return distinct([variant for name, run in LAUNCHES.items() for variant in record(partial(run, width), name)])


VARIANTS = variants_of(1024)
# Without the hint of alignment sm_80 has the hardest time.
COMPILED = [(variant, cc) for variant in VARIANTS for cc in ARCHITECTURES]
COMPILED += [(variant.plain(), 80) for variant in variants_of(1000)]


@pytest.mark.parametrize(("variant", "cc"), COMPILED, ids=lambda value: getattr(value, "name", None))
def test_compiles_within_its_resources(variant, cc):
    gate("prune_tokens", variant.name, cc, compile_variant(variant, cc))


def launched(run):
    return [variant.kernel.__name__ for variant in record(run)]


def test_launches():
    """One where segments fill the machine, two where they do not, three for long ones; none synchronises."""
    assert launched(launch(132, 196, 8, BF16, backward=False)) == ["fused_kernel"]
    assert launched(launch(131, 196, 8, BF16, backward=False)) == ["score_kernel", "select_copy_kernel"]
    assert launched(launch(500, 1025, 8, BF16, backward=False)) == ["score_kernel", "select_copy_kernel"]
    assert launched(launch(1, 5000, 8, BF16, backward=False)) == [
        "score_kernel",
        "select_long_kernel",
        "select_copy_kernel",
    ]
    assert launched(launch(8, 256, 8, BF16))[2:] == ["coefficient_kernel", "query_kernel", "token_kernel"]


def test_sizes_do_not_specialise():
    """One compilation serves every N, K and Q of a width and a bucket of lengths."""
    runs = [
        launch(8, length, query_count, BF16, keep=keep)
        for length, query_count, keep in ((257, 1, 1), (512, 16, 16), (1024, 3, 77))
    ]
    variants = [record(run) for run in runs]
    for position in range(len(variants[0])):
        signatures = [
            {name: kind for name, kind in found[position].signature.items() if "stride" not in name}
            for found in variants
        ]
        assert all(signature == signatures[0] for signature in signatures)


def test_frozen_sides_are_skipped():
    def run(need_tokens, need_queries, score_gradient=True):
        kept, queries = torch.empty(4, 16, 64, device="meta"), torch.empty(4, 2, 64, device="meta")
        index, score = torch.empty(4, 16, device="meta", dtype=torch.int64), torch.empty(4, 16, device="meta")
        grad_score = score if score_gradient else None
        needs = (need_tokens, need_queries)
        call = PruneBackward(kept, grad_score, kept, index, queries, 99, ScoreOptions(), *needs, score)
        return lambda: kernels.backward(call)

    assert launched(run(False, True)) == ["coefficient_kernel", "query_kernel"]
    assert launched(run(True, False)) == ["coefficient_kernel", "token_kernel"]
    assert launched(run(True, True, score_gradient=False)) == ["token_kernel"]


def test_tuned_table_overrules(tmp_path, monkeypatch):
    tokens, queries = torch.empty(8, 196, 1024, dtype=BF16), torch.empty(8, 5, 1024, dtype=BF16)
    key = configs.tuned_key("prune_tokens", (9, 0), BF16, 8, 196, 1024, 5)
    assert key == "prune_tokens/sm_90/bfloat16/B8-N256-D1024-Q8"
    before = configs.choose_config("prune_tokens", tokens, queries, 8, 196)
    assert not before.fused and before.block_n == 32
    table = tmp_path / "tuned.json"
    table.write_text(json.dumps({key: {"block_n": 128, "num_warps": 8, "fused": True}}))
    monkeypatch.setenv("BRIDGE_STG_TUNED", str(table))
    after = configs.choose_config("prune_tokens", tokens, queries, 8, 196)
    assert (after.block_n, after.num_warps, after.fused, after.block_d) == (128, 8, True, before.block_d)
    # What was never held by one program is not fused, whatever a table says.
    assert not configs.choose_config("prune_tokens", tokens, queries, 8, 2000).fused


def test_ranges_cost_nothing_unless_asked_for(monkeypatch):
    def function():
        return 3

    assert nvtx_range("name")(function) is function
    monkeypatch.setenv("BRIDGE_STG_NVTX", "1")
    entered = []
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: entered.append(name) or nullcontext())
    assert nvtx_range("name")(function)() == 3 and entered == ["name"]


@pytest.mark.gpu
def test_tune_writes_what_choose_config_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "DTYPES", (BF16,))
    tuning.tune("prune_tokens", tmp_path / "tuned.json", ((8, 196, 256, 8),))
    monkeypatch.setenv("BRIDGE_STG_TUNED", str(tmp_path / "tuned.json"))
    tokens, queries = (torch.randn(8, n, 256, device="cuda", dtype=BF16) for n in (196, 8))
    chosen = configs.choose_config("prune_tokens", tokens, queries, 8, 196)
    for fields in json.loads((tmp_path / "tuned.json").read_text()).values():
        assert {name: getattr(chosen, name) for name in fields} == fields
    found, expected = (prune_tokens(tokens, queries, 49, backend=name) for name in ("triton", "reference"))
    assert gpu.share_of_picks(found.index, expected.index) > 0.999


def test_a_gpu_picks_the_kernels_but_not_for_float64():
    tokens, queries = torch.empty(1, 4, 8), torch.empty(1, 1, 8)
    assert choose_backend("prune_tokens", None, "cuda", tokens=tokens, queries=queries) == "triton"
    wide = tokens.double()
    assert choose_backend("prune_tokens", None, "cuda", tokens=wide, queries=queries) == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("batch", "length", "width", "query_count"),
    [
        (200, 196, 256, 8),
        (16, 576, 1024, 16),
        (3, 1000, 72, 1),
        (2, 3000, 3584, 64),
        (1, 20001, 128, 5),
        (7, 1, 8, 2),
    ],
)
@pytest.mark.parametrize(("scoring", "reduce"), [("dot", "max"), ("cosine", "logsumexp"), ("dot", "mean")])
def test_on_a_gpu(dtype, batch, length, width, query_count, scoring, reduce):
    tokens = torch.randn(batch, length, width, device="cuda").to(dtype)
    queries = (torch.randn(batch, query_count, width, device="cuda") / width**0.5).to(dtype)
    mask = torch.rand(batch, length, device="cuda") > 0.2
    options = {"scoring": scoring, "reduce": reduce, "mask": mask}
    gpu.compare(
        lambda backend, *leaves: prune_tokens(*leaves, max(1, length // 4), backend=backend, **options),
        tokens,
        queries,
    )


@pytest.mark.gpu
def test_selects_exactly_on_a_gpu():
    for dtype in (BF16, FP16, FP32):
        for batch, length in ((150, 300), (5, 4000), (2, 70000)):
            tokens = torch.randint(-2, 3, (batch, length, 16), device="cuda").to(dtype)
            queries = torch.randint(-2, 3, (batch, 4, 16), device="cuda").to(dtype)
            for keep in (1, length // 3, length):
                found = prune_tokens(tokens, queries, keep, backend="triton")
                expected = prune_tokens(tokens, queries, keep, backend="reference")
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [4, 200])
def test_no_sync_captured_and_reproducible(batch):
    tokens = torch.randn(batch, 196, 256, device="cuda", dtype=BF16, requires_grad=True)
    queries = torch.randn(batch, 8, 256, device="cuda", dtype=BF16, requires_grad=True)
    gpu.check_launches(lambda: prune_tokens(tokens, queries, 49, scoring="cosine", backend="triton"), tokens, queries)


@pytest.mark.gpu
def test_more_than_two_billion_elements():
    tokens = torch.randn(17, 131072, 1024, device="cuda", dtype=BF16)
    queries = torch.randn(17, 4, 1024, device="cuda", dtype=BF16) / 32
    found = prune_tokens(tokens, queries, 1000, backend="triton")
    expected = prune_tokens(tokens[-1:], queries[-1:], 1000, backend="reference")
    assert gpu.share_of_picks(found.index[-1:], expected.index) > 0.99
    assert torch.equal(found.tokens[-1], tokens[-1, found.index[-1]])
