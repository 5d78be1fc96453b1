"""Many samples through one model: decoding, batching, and predictions in the interchange format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from .data import GroundingSample, read_samples
from .data.frame_sampling import uniform_frame_index
from .data.video import VideoInfo, decode_frames, probe
from .errors import SampleError
from .evaluation import Prediction
from .models import BridgeSTGForVideoGrounding, BridgeSTGProcessor
from .models.grounding import source_tube


def find_samples(data: str | os.PathLike[str], split: str) -> list[GroundingSample]:
    """Samples of a JSONL file, or of `split`.jsonl in a folder.

    Raises:
        SampleError: neither exists, or a record breaks the schema.
    """
    path = Path(data)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    if not path.is_file():
        raise SampleError(f"{path} does not exist: --data takes a JSONL file or a folder that holds {split}.jsonl.")
    return read_samples(path)


def predict_samples(
    model: BridgeSTGForVideoGrounding,
    samples: Sequence[GroundingSample],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Ground every sample; clips of equal size and length are batched, order is kept.

    A sample's prediction has boxes at every source frame of the predicted interval, and `oracle_boxes` at every
    source frame of the true one, from a second pass of the spatial decoder that is given the true interval.

    Args:
        progress: called with (samples done, samples).

    Raises:
        VideoError: a video cannot be read.
        SampleError: a sample has no interval to be scored against.
    """
    predictions: list[Prediction] = []
    for batch in _batches(model.processor, samples, batch_size):
        for sample, _, _, _ in batch:
            if sample.interval is None:
                raise SampleError(f"{sample.id} has no interval: only samples with one can be scored.")
        found = model.predict(
            [frames for _, _, _, frames in batch],
            [info.times[index].tolist() for _, info, index, _ in batch],
            [sample.sentence for sample, _, _, _ in batch],
            durations=[info.duration for _, info, _, _ in batch],
            oracle_intervals=[sample.interval for sample, _, _, _ in batch if sample.interval is not None],
        )
        for (sample, info, index, _), prediction in zip(batch, found, strict=True):
            assert sample.interval is not None and prediction.oracle_frames is not None
            assert prediction.oracle_boxes is not None
            frames, boxes = source_tube(info, prediction.interval, index, prediction.frames, prediction.boxes)
            oracle = source_tube(info, sample.interval, index, prediction.oracle_frames, prediction.oracle_boxes)
            predictions.append(
                Prediction(
                    id=sample.id,
                    interval=(int(frames[0]), int(frames[-1]) + 1),
                    boxes=_by_frame(frames, boxes),
                    oracle_boxes=_by_frame(*oracle),
                )
            )
        if progress is not None:
            progress(len(predictions), len(samples))
    return predictions


_Loaded = tuple[GroundingSample, VideoInfo, np.ndarray, torch.Tensor]


def _batches(
    processor: BridgeSTGProcessor, samples: Sequence[GroundingSample], batch_size: int
) -> Iterator[list[_Loaded]]:
    """Consecutive samples whose decoded clips have one shape, at most `batch_size` of them."""
    batch: list[_Loaded] = []
    for sample in samples:
        info = probe(sample.video)
        index = np.asarray(uniform_frame_index(info.times, processor.fps, processor.max_frames))
        frames = decode_frames(info, index)
        if batch and (len(batch) == batch_size or batch[0][3].shape != frames.shape):
            yield batch
            batch = []
        batch.append((sample, info, index, frames))
    if batch:
        yield batch


def _by_frame(frames: np.ndarray, boxes: np.ndarray) -> dict[int, tuple[float, float, float, float]]:
    return {
        int(frame): (float(b[0]), float(b[1]), float(b[2]), float(b[3])) for frame, b in zip(frames, boxes, strict=True)
    }
