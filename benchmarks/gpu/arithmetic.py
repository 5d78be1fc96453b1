"""What each kernel of the target shapes has to move and to compute, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

from .launches import ATTEND, LAYERS, PRUNE, Launch

HALF, FLOAT, LONG = 2, 4, 8  # bytes of a value


@dataclass(frozen=True)
class Work:
    """Of one launch.

    Attributes:
        read, written: bytes from and to memory, each value once; what is known to lie in the L2 cache does not count.
        loaded: bytes that one program loads, from memory or the L2 cache.
        flops: of its products, of matrices or not.
        outputs: values that it is there to make.
    """

    read: int
    written: int
    loaded: int
    flops: int
    outputs: int


def _prune() -> dict[str, Callable[[Launch], Work]]:
    b, n, d, q, keep = PRUNE.values()
    tokens, queries, kept = b * n * d * HALF, b * q * d * HALF, b * keep * d * HALF
    scores, picks, coefficients = b * n * FLOAT, b * keep * (LONG + FLOAT), b * keep * q * FLOAT

    def rows(launch: Launch) -> int:
        return int(launch.options["BLOCK_N"])

    def score(launch: Launch) -> Work:
        loaded = (rows(launch) + q) * d * HALF
        return Work(tokens + queries, scores, loaded, 2 * b * n * q * d, b * n)

    def copy(launch: Launch) -> Work:
        loaded = n * FLOAT + 32 * d * HALF
        return Work(kept + scores, kept + picks, loaded, 0, b * keep * d)

    def coefficient(launch: Launch) -> Work:
        loaded = (rows(launch) + q) * d * HALF
        return Work(kept + queries, 2 * coefficients, loaded, 2 * b * keep * q * d, b * keep * q)

    def query(launch: Launch) -> Work:
        loaded = keep * (int(launch.options["BLOCK_D"]) * HALF + q * FLOAT)
        return Work(kept + coefficients, queries, loaded, 4 * b * keep * q * d, b * q * d)

    def token(launch: Launch) -> Work:
        steps = ceil(d / int(launch.options["BLOCK_D"]))
        loaded = rows(launch) * (q * FLOAT * steps + d * HALF) + q * d * HALF
        return Work(kept + queries + coefficients, tokens, loaded, 4 * b * n * q * d, b * n * d)

    def small(launch: Launch) -> Work:
        return Work(scores, picks, n * FLOAT, 0, b * keep)

    return {
        "score_kernel": score,
        "select_copy_kernel": copy,
        "pack_kernel": copy,
        "coefficient_kernel": coefficient,
        "query_kernel": query,
        "token_kernel": token,
        **dict.fromkeys(("bounds_kernel", "select_rows_kernel", "offsets_kernel"), small),
    }


def _attend(batch: int) -> dict[str, Callable[[Launch], Work]]:
    m, c, h, q = ATTEND.values()
    r = h * q
    memory, rows, levels = batch * m * c * HALF, batch * r * c * HALF, batch * r * FLOAT
    products = 2 * batch * r * m * c

    def splits(launch: Launch) -> int:
        return max(1, launch.programs // (batch * ceil(r / int(launch.options["BLOCK_R"]))))

    def pass_over(launch: Launch, operands: int, products_: int) -> Work:
        """One pass over the memory by all rows, with `operands` tensors of rows, one partial result a split."""
        parts = splits(launch)
        loaded = (m // parts + operands * int(launch.options["BLOCK_R"])) * c * HALF
        written = rows + levels if parts == 1 else batch * parts * r * (c + 1) * FLOAT
        return Work(memory + operands * rows, written, loaded, products_ * products, batch * r * c)

    def merge(launch: Launch) -> Work:
        parts = max(1, 128 // (batch * 2))  # splits of 128 programs over two tiles of rows
        # The parts were written just before: they lie in the L2 cache.
        return Work(0, rows + levels, parts * c * FLOAT, 0, batch * r * c)

    def shared(launch: Launch) -> Work:
        loaded = LAYERS * r * (2 * c * HALF + 2 * FLOAT) + int(launch.options["BLOCK_K"]) * c * HALF
        read = memory + 2 * LAYERS * rows
        return Work(read, memory, loaded, 4 * LAYERS * products, batch * m * c)

    return {
        "attend_memory_forward": lambda launch: pass_over(launch, 1, 2),
        "attend_memory_query_gradient": lambda launch: pass_over(launch, 2, 3),
        "attend_memory_merge": merge,
        "attend_memory_delta": lambda launch: Work(2 * rows, levels, 8 * c * HALF * 2, 2 * batch * r * c, batch * r),
        "attend_memory_memory_gradient": shared,
    }


WORK: Mapping[str, Mapping[str, Callable[[Launch], Work]]] = {
    "prune_tokens": _prune(),
    "prune_tokens_varlen": _prune(),
    "attend_memory B1": _attend(1),
    "attend_memory B16": _attend(16),
}

# patchify_frames: frames, source and target heights and widths.
FRAMES, SOURCE, TARGET = 64, (1080, 1920), (560, 1008)
PATCHIFY = Work(
    read=3 * FRAMES * SOURCE[0] * SOURCE[1],
    written=3 * FRAMES * TARGET[0] * TARGET[1] * HALF,
    loaded=0,
    flops=3 * FRAMES * 2 * (SOURCE[0] * TARGET[1] * 8 + TARGET[0] * TARGET[1] * 8),
    outputs=3 * FRAMES * TARGET[0] * TARGET[1],
)
