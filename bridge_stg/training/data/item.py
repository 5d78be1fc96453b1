"""Training items: samples with their decoded clips and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...data.frame_sampling import sample_spatial_frames


@dataclass(frozen=True, eq=False)
class TrainingItem:
    """A sample with its decoded clip, before batching. T frames the MLLM sees, S frames the spatial decoder sees.

    Attributes:
        frames: uint8 `[T, H, W, 3]`, RGB.
        times: T seconds from the clip's start.
        sentence: what happens, or a question.
        boxes: float32 `[T, 4]` xyxy in [0, 1]; NaN where there is none, or none is known.
        frame_index: int64 `[S]`, positions in the clip; -1 for padding.
        interval: frames [start, end) of the event; None when unknown, empty when the event does not happen.
        answer: what the MLLM is to say; None teaches it nothing.
        hide_answer: whether the bridging queries do not see the answer.
    """

    frames: np.ndarray
    times: Sequence[float]
    sentence: str
    boxes: np.ndarray
    frame_index: np.ndarray
    interval: tuple[int, int] | None = None
    answer: str | None = None
    hide_answer: bool = False


@dataclass(frozen=True)
class ItemOptions:
    """What is drawn for every item beside its sample.

    Attributes:
        spatial_frames: S, frames the spatial decoder sees.
        positive_ratio, negatives: see `sample_spatial_frames`.
        answer_dropout: share of clips whose answer the bridging queries do not see.
    """

    spatial_frames: int = 12
    positive_ratio: float = 0.5
    negatives: Literal["uniform", "boundary"] = "uniform"
    answer_dropout: float = 0.4

    def draw_frame_index(self, frame_count: int, interval: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Frames for the spatial decoder, int64 `[S]`, inside the event and outside; see `sample_spatial_frames`."""
        return sample_spatial_frames(
            frame_count, interval, self.spatial_frames, self.positive_ratio, self.negatives, rng
        )
