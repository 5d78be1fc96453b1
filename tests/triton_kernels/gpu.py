"""What both prune ops are held to on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def loss_of(result: Any) -> Tensor:
    """One number that every floating output has a gradient of, from seeded weights."""
    generator = torch.Generator(result[0].device).manual_seed(1)
    total = result[0].new_zeros((), dtype=torch.float32)
    for output in result:
        if output.is_floating_point():
            weights = torch.randn(output.shape, device=output.device, generator=generator)
            total = total + (weights * output.float().masked_fill(output.isinf(), 0.0)).sum()
    return total


def share_of_picks(found: Tensor, expected: Tensor) -> float:
    """Share of the picks [B, k] or [k] that are among the expected ones of the same segment; -1 is none."""
    segment = torch.arange(found.shape[0] if found.dim() == 2 else 1, device=found.device).view(-1, 1) << 40
    same = torch.isin(segment + found, segment + expected) | (found < 0)
    return float(same.float().mean())


def compare(call: Callable[..., Any], tokens: Tensor, queries: Tensor) -> None:
    """Kernels against the float32 reference: picks that differ only among nearly equal scores, and gradients.

    Gradients are compared where the picks are the same; their error is within twice that of the reference in the
    dtype of the inputs.
    """

    def run(backend: str, dtype: torch.dtype) -> tuple[Any, tuple[Tensor, ...]]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (tokens, queries)]
        result = call(backend, *leaves)
        return result, torch.autograd.grad(loss_of(result), leaves)

    found, found_grads = run("triton", tokens.dtype)
    _, same_grads = run("reference", tokens.dtype)
    truth, true_grads = run("reference", torch.float32)
    assert share_of_picks(found.index, truth.index) > 0.999
    torch.testing.assert_close(found.score.sort(-1).values, truth.score.sort(-1).values, rtol=1e-4, atol=1e-4)
    if torch.equal(found.index, truth.index):
        for got, peer, want in zip(found_grads, same_grads, true_grads, strict=True):
            error, allowed = ((x.float() - want).abs().max().item() for x in (got, peer))
            assert error <= 2 * allowed + 1e-4 * want.abs().max().item()


def check_launches(call: Callable[[], Any], *leaves: Tensor) -> None:
    """No host sync forward and backward, the same bits twice, and the same again from a CUDA graph."""

    def plain() -> list[Tensor]:
        with torch.no_grad():
            return list(call())

    def step() -> tuple[Tensor, ...]:
        result = call()
        return (*result, *torch.autograd.grad(result[2].sum() + result[0].float().sum(), leaves))

    step()
    plain()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, again = step(), step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plain()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plain()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=False))
