"""Calls of `prune_tokens` on the compiled CPU kernels, held against the reference; also a program, for SIMD levels."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge_stg.ops import prune_tokens

OPTIONS = list(product(("dot", "cosine"), ("max", "mean", "logsumexp")))
GRADIENT_TOLERANCE = {torch.float32: (1e-4, 2e-5), torch.bfloat16: (1.6e-2, 1e-5), torch.float16: (2e-3, 1e-4)}


class Shape(NamedTuple):
    segments: int
    tokens: int
    width: int
    queries: int
    keep: int


SHAPES = [
    Shape(3, 17, 24, 4, 5),
    Shape(1, 1, 8, 1, 1),
    Shape(2, 70, 33, 9, 70),
    Shape(2, 131, 3584, 3, 32),
    Shape(1, 700, 129, 64, 600),  # parts of a segment, more than one of them in the backward too
    Shape(5, 67, 7, 5, 1),
]


def run(leaves: tuple[Tensor, Tensor], keep: int, backend: str | None, **options: Any) -> list[Tensor]:
    """Outputs, then the gradients of tokens and queries from gradients of all outputs."""
    tokens, queries = (leaf.detach().requires_grad_() for leaf in leaves)
    tokens_out, index, *scores = prune_tokens(tokens, queries, keep, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    outputs = [tokens_out, *scores]
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return [index, *(o.detach() for o in outputs), *torch.autograd.grad(outputs, (tokens, queries), weights)]


def integers(shape: Shape, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and queries whose scores are exact in every order of summation, with many ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        return torch.randint(-2, 3, (shape.segments, rows, shape.width), generator=generator).to(dtype)

    return draw(shape.tokens), draw(shape.queries)


def check(shape: Shape, dtype: torch.dtype, *, masked: bool, dense: bool) -> None:
    """Real values, all scorings and reduces: equal picks where no two scores are within rounding, close the rest."""
    generator = torch.Generator().manual_seed(shape.width)
    tokens = torch.randn(shape.segments, shape.tokens, shape.width, generator=generator).to(dtype)
    queries = torch.randn(shape.segments, shape.queries, shape.width, generator=generator).to(dtype)
    mask = torch.rand(shape.segments, shape.tokens, generator=generator) > 0.3 if masked else None
    for scoring, reduce in OPTIONS:
        options: dict[str, Any] = {"scoring": scoring, "reduce": reduce, "scale": 0.3, "mask": mask}
        ours, theirs = (
            run((tokens, queries), shape.keep, name, return_scores=dense, **options) for name in ("native", "reference")
        )
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        for a, b in zip(ours[2:-2], theirs[2:-2], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        rtol, atol = GRADIENT_TOLERANCE[dtype]
        for a, b in zip(ours[-2:], theirs[-2:], strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(1.0, float(b.float().abs().max())))


def check_integers(shape: Shape, dtype: torch.dtype, seed: int = 0, **options: Any) -> None:
    """Integer values: the same picks and the same scores, to the bit."""
    leaves = integers(shape, dtype, seed)
    ours, theirs = (prune_tokens(*leaves, shape.keep, backend=name, **options) for name in ("native", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_all() -> None:
    for shape, dtype in product(SHAPES, GRADIENT_TOLERANCE):
        check(shape, dtype, masked=shape.width % 2 == 0, dense=shape.queries % 2 == 1)
        check(shape, dtype, masked=shape.width % 2 == 1, dense=shape.queries % 2 == 0)
        check_integers(shape, dtype)


if __name__ == "__main__":
    check_all()
