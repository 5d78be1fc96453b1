"""Several datasets as one endless stream: which sample of which of them comes at which place."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np


class MixtureSampler:
    """Mixes datasets by weight; what comes at a place is a function of seed and place alone.

    The stream is cut into blocks. Every block holds each dataset as often as its weight says, in an order of its own,
    so that the mix is even at any length and not only in the mean. Within a dataset every item comes once before any
    comes twice; every pass has an order of its own. Nothing depends on what was drawn before: a run resumes from one
    number, and ranks or loader workers share the stream by its places.

    Iterating yields (dataset name, item) from `position` on, every `world_size`-th place from `rank`, without end.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        block: int = 1000,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Args:
            sizes: items in each dataset, by name; the order of names is part of what determines the stream.
            weights: share of each dataset in the stream, in any unit, realised to 1 / block; None means by size.
            seed: of the stream.
            block: places in a block.
            rank, world_size: this process, and how many share the stream.

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
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        self.names = tuple(sizes)
        self.sizes = tuple(sizes.values())
        self.quotas = _apportion(np.array([weights[name] for name in self.names], dtype=np.float64), block)
        if min(self.quotas) == 0:
            scarce = self.names[self.quotas.index(0)]
            raise ValueError(f"the weight of {scarce!r}, {weights[scarce]}, gives it no place in a block of {block}")
        self.seed = seed
        self.block = block
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        # Caches belong to the object, not to the class: a sampler must not keep another's permutations alive.
        self._layout = lru_cache(maxsize=8)(self._make_layout)
        self._order = lru_cache(maxsize=2 * len(self.names))(self._make_order)

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

    def __iter__(self) -> Iterator[tuple[str, int]]:
        while True:
            place = self.position * self.world_size + self.rank
            self.position += 1
            yield self.pick(place)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs; the same on every rank that has drawn equally often."""
        return {"position": self.position, "seed": self.seed, "block": self.block, "sizes": dict(self._sizes())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the number of ranks may have changed if `position` is set accordingly.

        Raises:
            ValueError: the state is of another stream.
        """
        mine = {"seed": self.seed, "block": self.block, "sizes": dict(self._sizes())}
        for key, value in mine.items():
            if state.get(key) != value:
                raise ValueError(f"the state is of another stream: its {key} is {state.get(key)}, this one's {value}")
        self.position = int(state["position"])

    def _sizes(self) -> Iterator[tuple[str, int]]:
        return zip(self.names, self.sizes, strict=True)

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
    """Whole shares that sum to `total`, by largest remainder."""
    exact = weights / weights.sum() * total
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return tuple(shares.tolist())
