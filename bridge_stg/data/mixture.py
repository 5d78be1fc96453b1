"""Several datasets as one endless stream, in which every place has its dataset and sample."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np


class MixtureSampler:
    """Mixes datasets by weight; the sample at a place is a function of seed and place alone.

    The stream is cut into blocks. Every block holds each dataset as often as its weight says, in an order of its own,
    so that the mix is even at any length and not only in the mean. Within a dataset every item comes once before any
    comes twice; every pass has an order of its own. Nothing depends on what was drawn before, so that a run resumes at
    any place, and ranks or loader workers share the stream by its places.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        block: int = 1000,
    ) -> None:
        """Args:
            sizes: items in each dataset, by name; the order of names is part of what determines the stream.
            weights: share of each dataset in the stream, in any unit, realised to 1 / block; None means by size.
            seed: of the stream.
            block: places in a block.

        Raises:
            ValueError: a size, weight or option is out of its range, or a weight is too small for the block.
        """
        weights = dict(sizes) if weights is None else dict(weights)
        if not sizes or set(weights) != set(sizes):
            raise ValueError(f"weights must name the datasets {', '.join(sizes)}, got {', '.join(weights)}")
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"dataset {name!r} must have at least 1 item, got {size}")
            if not (weights[name] > 0 and np.isfinite(weights[name])):
                raise ValueError(f"the weight of {name!r} must be positive, got {weights[name]}")
        if block < 1 or seed < 0:
            raise ValueError(f"block must be at least 1 and seed at least 0, got {block} and {seed}")
        self.names = tuple(sizes)
        self.sizes = tuple(sizes.values())
        self.quotas = _apportion(np.array([weights[name] for name in self.names], dtype=np.float64), block)
        if min(self.quotas) == 0:
            scarce = self.names[self.quotas.index(0)]
            raise ValueError(f"the weight of {scarce!r}, {weights[scarce]}, gives it no place in a block of {block}")
        self.seed = seed
        self.block = block
        self._mixed = dict(sizes), weights
        # Caches belong to the object, not to the class: a sampler must not keep another's permutations alive.
        self._layout = lru_cache(maxsize=8)(self._make_layout)
        self._order = lru_cache(maxsize=2 * len(self.names))(self._make_order)

    def __reduce__(self) -> tuple[Any, ...]:
        # The caches cannot be pickled; the arguments can.
        return partial(MixtureSampler, seed=self.seed, block=self.block), self._mixed

    def pick(self, place: int) -> tuple[str, int]:
        """The dataset and the item at a place of the stream.

        Raises:
            ValueError: the place is negative.
        """
        if place < 0:
            raise ValueError(f"place must be at least 0, got {place}")
        block, offset = divmod(place, self.block)
        source, before = (int(row[offset]) for row in self._layout(block))
        turn, item = divmod(block * self.quotas[source] + before, self.sizes[source])
        return self.names[source], int(self._order(source, turn)[item])

    def _make_layout(self, block: int) -> np.ndarray:
        """int64 `[2, block]`: the dataset at each place, and how often it came before in the block."""
        source = np.repeat(np.arange(len(self.quotas)), self.quotas)
        np.random.default_rng([self.seed, 0, block]).shuffle(source)
        before = np.empty_like(source)
        for dataset, quota in enumerate(self.quotas):
            before[source == dataset] = np.arange(quota)
        return np.stack([source, before])

    def _make_order(self, source: int, turn: int) -> np.ndarray:
        name = zlib.crc32(self.names[source].encode())
        return np.random.default_rng([self.seed, 1, name, turn]).permutation(self.sizes[source])


def _apportion(weights: np.ndarray, total: int) -> tuple[int, ...]:
    """Whole shares that sum to `total`, by the method of largest remainders."""
    exact = weights / weights.sum() * total
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return tuple(shares.tolist())
