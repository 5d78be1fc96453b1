"""Trivial baselines: answers that are given without looking at the video, to be scored beside every result."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.sample import Box, GroundingSample, to_frame_range
from ..errors import SampleError
from .metrics import true_frames, tube_frames
from .predictions import Prediction, StillTube

_MOST_CANDIDATES = 64


@dataclass(frozen=True)
class ConstantFloor:
    """The best constant answer: one interval, and a box of mean size in the middle of the frame.

    Attributes:
        interval: (start, end) as fractions of the clip.
        box_size: (width, height) of the box as fractions of the frame's.
    """

    interval: tuple[float, float]
    box_size: tuple[float, float]

    @classmethod
    def fit(cls, samples: Sequence[GroundingSample]) -> ConstantFloor:
        """Take the interval of highest mean tIoU on `samples`, and the mean size of their boxes in the event.

        In each end of the answer, mean tIoU is convex between neighbouring true ends, so that the best answer
        starts and ends where some true one does. Those are tried, or their 64 quantiles where there are more.
        Where no sample has boxes, the box is the whole frame.

        Raises:
            SampleError: there are no samples, or one has no interval.
        """
        if not samples:
            raise SampleError("a constant answer cannot be fitted on 0 samples; at least one is needed.")
        true = np.array([_clip_fractions(sample) for sample in samples])  # [n, 2]
        best, best_tiou = (0.0, 1.0), -1.0
        for start in _candidates(true[:, 0]):
            for end in _candidates(true[:, 1]):
                if end <= start:
                    continue
                overlap = np.clip(np.minimum(end, true[:, 1]) - np.maximum(start, true[:, 0]), 0, None)
                tiou = float(np.mean(overlap / (end - start + true[:, 1] - true[:, 0] - overlap)))
                if tiou > best_tiou + 1e-12:
                    best, best_tiou = (float(start), float(end)), tiou
        sizes = [size for sample in samples if (size := _mean_box_size(sample)) is not None]
        width, height = np.mean(sizes, axis=0) if sizes else (1.0, 1.0)
        return cls(best, (float(width), float(height)))

    def predict(self, samples: Sequence[GroundingSample]) -> list[Prediction]:
        """The constant answer to every sample."""
        predictions = []
        for sample in samples:
            first, last = _clip_range(sample)
            start, end = (first + fraction * (last - first) for fraction in self.interval)
            x, y = sample.width / 2, sample.height / 2
            dx, dy = sample.width * self.box_size[0] / 2, sample.height * self.box_size[1] / 2
            interval = to_frame_range((start, end), 1.0)
            predictions.append(_constant_tube(sample, interval, (x - dx, y - dy, x + dx, y + dy)))
        return predictions


def random_floor(samples: Sequence[GroundingSample], seed: int = 0) -> list[Prediction]:
    """A random interval and a random box for every sample: each pair of ends uniform over all there are.

    A sample's answer depends on its id and on `seed` alone, not on the other samples or their order.
    """
    predictions = []
    for sample in samples:
        rng = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(sample.id.encode())]))
        first, last = _clip_range(sample)
        start, end = sorted((first + rng.choice(last + 1 - first, size=2, replace=False)).tolist())
        x1, x2 = sorted((rng.random(2) * sample.width).tolist())
        y1, y2 = sorted((rng.random(2) * sample.height).tolist())
        predictions.append(_constant_tube(sample, (start, end), (x1, y1, x2, y2)))
    return predictions


def _constant_tube(sample: GroundingSample, interval: tuple[int, int], box: Box) -> Prediction:
    return Prediction(
        sample.id, interval, StillTube(range(*interval), box), StillTube(range(*true_frames(sample)), box)
    )


def _clip_range(sample: GroundingSample) -> tuple[int, int]:
    return sample.segment or (0, sample.frame_count)


def _clip_fractions(sample: GroundingSample) -> tuple[float, float]:
    first, last = _clip_range(sample)
    start, end = true_frames(sample)
    return (start - first) / (last - first), (end - first) / (last - first)


def _candidates(values: np.ndarray) -> np.ndarray:
    unique = np.unique(values)
    if len(unique) <= _MOST_CANDIDATES:
        return unique
    return np.unique(np.quantile(values, np.linspace(0, 1, _MOST_CANDIDATES)))


def _mean_box_size(sample: GroundingSample) -> np.ndarray | None:
    boxes = np.array([sample.boxes[frame] for frame in tube_frames(sample.boxes, *true_frames(sample))])
    if not len(boxes):
        return None
    return np.mean(boxes[:, 2:] - boxes[:, :2], axis=0) / (sample.width, sample.height)
