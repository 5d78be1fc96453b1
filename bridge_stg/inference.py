"""Many samples through one model: decoding, batching, and predictions in the interchange format."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import GroundingSample, read_samples
from .data.frame_sampling import clip_frames
from .data.time_base import align_to_video
from .data.video import VideoInfo, decode_frames, probe
from .errors import SampleError, VideoError
from .evaluation import Prediction
from .models import BridgeSTGForVideoGrounding, BridgeSTGProcessor
from .models.grounding import ClipPrediction, source_tube
from .parts import Parts, Progress, agree


@dataclass(frozen=True)
class Failure:
    """A sample that cannot be grounded, and why."""

    id: str
    reason: str

    def to_record(self) -> dict[str, Any]:
        return {"id": self.id, "error": self.reason}


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
    progress: Progress | None = None,
) -> list[Prediction]:
    """`ground_samples`, with the first failure as an error.

    Raises:
        SampleError: a sample has no interval to be scored against, or cannot be grounded.
    """
    predictions = []
    for found in ground_samples(model, samples, batch_size=batch_size):
        if isinstance(found, Failure):
            raise SampleError(f"{found.id} cannot be grounded: {found.reason}")
        predictions.append(found)
        if progress is not None:
            progress(len(predictions), len(samples))
    return predictions


def ground_samples(
    model: BridgeSTGForVideoGrounding, samples: Sequence[GroundingSample], *, batch_size: int = 16
) -> Iterator[Prediction | Failure]:
    """Ground samples one batch at a time, in order; decodes and holds one batch.

    A clip is the sample's segment or the whole video. Frames and pixels of a prediction are the annotation's, whatever
    the decoded video has: times are what both share. A prediction has boxes at every frame of the predicted interval,
    and `oracle_boxes` at every frame of the true one, from a second pass of the spatial decoder that is given it.

    Raises:
        SampleError: a sample has no interval to be scored against.
    """
    for sample in samples:
        if sample.interval is None:
            raise SampleError(f"{sample.id} has no interval: only samples with one can be scored.")
    for start in range(0, len(samples), batch_size):
        loaded = [_load(model.processor, sample) for sample in samples[start : start + batch_size]]
        predictions = iter(_predict(model, [clip for clip in loaded if isinstance(clip, _Clip)]))
        yield from (clip if isinstance(clip, Failure) else next(predictions) for clip in loaded)


def ground_dataset(
    model: BridgeSTGForVideoGrounding,
    samples: Sequence[GroundingSample],
    out: str | os.PathLike[str],
    *,
    made_with: Mapping[str, Any],
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> list[Prediction | Failure] | None:
    """`ground_samples` of this process's share, written down as it goes; run again to go on.

    The predictions end up in `out`, what could not be grounded in `out` with `.failed` behind it, what made them in
    `out` with `.run` behind it. Any number of processes may go on with what any other number left.

    Args:
        made_with: what a prediction depends on, such as the model; a run with something else is refused.
        rank, world_size: this process grounds the samples whose place modulo `world_size` is `rank`.

    Returns:
        all results in the order of `samples`; None while those of other processes are missing.

    Raises:
        SampleError: a sample has no interval to be scored against, or `out` holds predictions for other samples.
        OutputError: `out` cannot be written, or was made with something else.
    """
    path = Path(out)
    by_id = {sample.id: sample for sample in samples}
    failed = path.with_name(f"{path.name}.failed")
    with Parts(path, list(by_id), rank=rank, world_size=world_size, split={"error": failed}) as parts:
        agree(path.with_name(f"{path.name}.run"), path, made_with)
        done = parts.done()
        left = [by_id[name] for name in parts.mine if name not in done]
        before = len(parts.mine) - len(left)
        for count, found in enumerate(ground_samples(model, left, batch_size=batch_size), start=1):
            parts.append(found.to_record())
            if progress is not None:
                progress(before + count, len(parts.mine))
        records = parts.merge()
    if records is None:
        return None
    return [
        Failure(name, record["error"]) if "error" in record else Prediction.from_record(record)
        for name, record in records.items()
    ]


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Sixteen hex digits of a model folder: its configuration and a sample of its weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.json")) + sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(_SAMPLED_BLOCKS):
                file.seek(place * size // _SAMPLED_BLOCKS)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


_SAMPLED_BLOCKS, _BLOCK = 64, 4096


@dataclass(frozen=True)
class _Clip:
    """A sample, decoded.

    Attributes:
        begin: seconds of the video at which the clip starts.
        frames: uint8 `[T, H, W, 3]`.
        times: `[T]`, seconds from the clip's start.
        duration: seconds.
        clock: `[n]`, seconds of the video at every annotated frame of the clip, whose first is `first`.
    """

    sample: GroundingSample
    begin: float
    frames: torch.Tensor
    times: np.ndarray
    duration: float
    clock: np.ndarray
    first: int


def _load(processor: BridgeSTGProcessor, sample: GroundingSample) -> _Clip | Failure:
    try:
        info = probe(sample.video)
        segment = align_to_video(replace(sample, boxes={}), info).segment
        index, times, duration = clip_frames(info, segment, processor.fps, processor.max_frames)
        begin = float(info.times[segment[0]]) if segment else 0.0
        frames = decode_frames(info, index)
    except (VideoError, SampleError) as error:
        return Failure(sample.id, str(error))
    first, end = sample.segment or (0, sample.frame_count)
    return _Clip(sample, begin, frames, times, duration, _annotated_clock(sample, info)[first:end], first)


def _annotated_clock(sample: GroundingSample, info: VideoInfo) -> np.ndarray:
    """Seconds of every frame that the annotation counts, float64 `[frame_count]`."""
    if sample.frame_count == info.frame_count:
        return info.times
    return np.arange(sample.frame_count) / sample.fps


def _predict(model: BridgeSTGForVideoGrounding, clips: Sequence[_Clip]) -> list[Prediction | Failure]:
    """One batch; where it cannot be grounded as one, sample by sample."""
    if not clips:
        return []
    try:
        predictions = model.predict(
            [clip.frames for clip in clips],
            [clip.times.tolist() for clip in clips],
            [clip.sample.sentence for clip in clips],
            durations=[clip.duration for clip in clips],
            oracle_intervals=[_true_interval(clip) for clip in clips],
        )
    except SampleError as error:
        if len(clips) == 1:
            return [Failure(clips[0].sample.id, str(error))]
        return [found for clip in clips for found in _predict(model, [clip])]
    return [_to_prediction(*each) for each in zip(clips, predictions, strict=True)]


def _true_interval(clip: _Clip) -> tuple[float, float]:
    """Of the sample, seconds from the clip's start."""
    assert clip.sample.interval is not None
    start, end = clip.sample.interval
    return start - clip.begin, end - clip.begin


def _to_prediction(clip: _Clip, found: ClipPrediction) -> Prediction:
    assert found.oracle_frames is not None and found.oracle_boxes is not None
    size = clip.sample.width, clip.sample.height
    clock = clip.clock - clip.begin

    def tube(interval: tuple[float, float], positions: np.ndarray, boxes: np.ndarray) -> dict[int, Any]:
        frames, pixels = source_tube(clock, size, interval, clip.times[positions], boxes)
        return {clip.first + int(f): tuple(float(side) for side in box) for f, box in zip(frames, pixels, strict=True)}

    boxes = tube(found.interval, found.frames, found.boxes)
    oracle = tube(_true_interval(clip), found.oracle_frames, found.oracle_boxes)
    return Prediction(id=clip.sample.id, interval=(min(boxes), max(boxes) + 1), boxes=boxes, oracle_boxes=oracle)
