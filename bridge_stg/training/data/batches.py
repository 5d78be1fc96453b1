"""Batches of clips of one frame size and about one length, so that little is padded and ranks wait little."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

_WINDOW = 32


class ClipShape(NamedTuple):
    """Frame size and token count of a clip, known before it is decoded.

    Attributes:
        grid: (rows, columns) of patches of a frame.
        tokens: of the LLM, text included.
    """

    grid: tuple[int, int]
    tokens: int


class LengthAwareBatches(Sampler[list[int]]):
    """Places of a stream, batch by batch; batch k goes to rank k modulo `world_size`.

    The stream is looked at in windows. In a window the clips of one grid (the vision tower takes one a batch) are
    sorted by length and cut into batches, and the batches are handed out in rounds of `world_size` of about the same
    size, the rounds in an order drawn from the seed. What does not fill a batch or a round goes on into the next
    window: every place comes once, and none is put off for long. All of it is a function of the arguments.

    Args:
        shape: of the clip at a place.
        batches: how many to make, over all ranks.
        clips: most of them in a batch.
        max_tokens: bound of clips x tokens of the longest; a clip above it has a batch for itself. None: no bound.
        world_size: number of ranks.
        window: places looked at together; None takes 32 rounds of full batches.
        seed: of the order of rounds.

    Raises:
        ValueError: a number is out of its range.
    """

    batch_size = None  # accelerate reads it; the batches have no fixed size
    drop_last = False

    def __init__(
        self,
        shape: Callable[[int], ClipShape],
        *,
        batches: int,
        clips: int,
        max_tokens: int | None = None,
        world_size: int = 1,
        window: int | None = None,
        seed: int = 0,
    ) -> None:
        window = _WINDOW * clips * world_size if window is None else window
        for name, value, least in (
            ("batches", batches, 1),
            ("clips", clips, 1),
            ("world_size", world_size, 1),
            ("max_tokens", 1 if max_tokens is None else max_tokens, 1),
            ("window", window, clips * world_size),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.shape = shape
        self.batches = batches
        self.clips = clips
        self.max_tokens = max_tokens
        self.world_size = world_size
        self.window = window
        self.seed = seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        left: list[int] = []
        made = number = 0
        while True:
            fresh = range(number * self.window, (number + 1) * self.window)
            rounds, left = self._plan([*left, *fresh], fresh.start)
            for chosen in np.random.default_rng([self.seed, number]).permutation(len(rounds)).tolist():
                for batch in rounds[chosen]:
                    yield batch
                    made += 1
                    if made == self.batches:
                        return
            number += 1

    def _plan(self, places: list[int], fresh: int) -> tuple[list[list[list[int]]], list[int]]:
        """Rounds of batches, and the places left over; places before `fresh` have been left over once already."""
        shapes = {place: self.shape(place) for place in places}
        batches: list[list[int]] = []
        left: list[int] = []
        for grid in sorted({shape.grid for shape in shapes.values()}):
            members = sorted((shapes[place].tokens, place) for place in places if shapes[place].grid == grid)
            batch: list[int] = []
            for tokens, place in members:
                if batch and not self._fits(len(batch) + 1, tokens):
                    batches.append(batch)
                    batch = []
                batch.append(place)
            if len(batch) == self.clips or min(batch) < fresh:
                batches.append(batch)
            else:
                left += batch
        batches.sort(key=min)
        even = len(batches) - len(batches) % self.world_size
        left += [place for batch in batches[even:] for place in batch]
        batches = sorted(batches[:even], key=lambda batch: (_cost(batch, shapes), batch))
        rounds = [batches[i : i + self.world_size] for i in range(0, even, self.world_size)]
        return rounds, sorted(left)

    def _fits(self, clips: int, longest: int) -> bool:
        return clips <= self.clips and (self.max_tokens is None or clips * longest <= self.max_tokens)


def _cost(batch: Sequence[int], shapes: dict[int, ClipShape]) -> int:
    """Tokens of a batch, padding included."""
    return len(batch) * max(shapes[place].tokens for place in batch)
