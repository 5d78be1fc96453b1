"""The ops on their Triton kernels are one graph for `torch.compile`, and compute in it what they compute outside."""

from __future__ import annotations

import pytest
import torch

from bridge_stg.ops import attend_memory, prune_tokens, prune_tokens_varlen


def pruned(tokens, queries):
    kept = prune_tokens(tokens, queries, 3, backend="triton")
    return kept.tokens, kept.score


def packed(tokens, queries):
    offsets = torch.tensor([0, tokens.shape[1]])
    kept = prune_tokens_varlen(tokens[0], offsets, queries[:1], 3, policy="per_segment", capacity=4, backend="triton")
    return kept.tokens, kept.score


def attended(tokens, queries):
    return attend_memory(queries, tokens, scale=0.3, backend="triton")


@pytest.mark.parametrize("function", [pruned, packed, attended], ids=lambda function: function.__name__)
def test_one_graph_forward_and_backward(function):
    torch._dynamo.reset()
    tokens, queries = (torch.randn(2, rows, 16, requires_grad=True) for rows in (9, 4))
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        outputs = run(tokens, queries)
        loss = sum(out.square().sum() for out in outputs if out.requires_grad)
        results.append([*outputs, *torch.autograd.grad(loss, (tokens, queries))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
