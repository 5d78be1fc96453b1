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

from ..data import GroundingSample, read_samples
from ..data.clip import check_shape, load_clip
from ..data.time_base import align_to_video
from ..data.video import VideoInfo, probe
from ..errors import SampleError, reason_of
from ..evaluation import Prediction
from ..files import beside
from ..json_text import dump_json, parse_json
from ..models import BridgeSTGForVideoGrounding, BridgeSTGProcessor
from ..models.grounding import ClipPrediction, source_tube
from .resumable_jsonl import Parts, Progress


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
    _check_scorable(samples)
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
    `out` with `.run` behind it. Any number of processes may go on with what any other number left; with the same
    batch size the files are those of a run that nothing interrupts. A failure is a result, and not tried again before
    `.failed` is removed.

    An output is never replaced by one made with something else: whether it is finished or begun, such a run is refused
    until `out` and its parts are removed.

    Args:
        made_with: what a prediction depends on: model, settings, samples.
        rank, world_size: this process grounds the batches whose place modulo `world_size` is `rank`.
        progress: called with (samples of this process done, all of this process).

    Returns:
        all results in the order of `samples`, to one process: one that finds them complete after its own work, or
        rank 0 where nothing was left to do. None to the others, and while some are missing.

    Raises:
        SampleError: a sample has no interval to be scored against, or `out` holds predictions for other samples.
        OutputError: `out` cannot be written, or was made with something else.
    """
    _check_scorable(samples)
    out = Path(out)
    by_id = {sample.id: sample for sample in samples}

    def make(names: list[str]) -> Iterator[dict[str, Any]]:
        for found in ground_samples(model, [by_id[name] for name in names], batch_size=batch_size):
            yield found.to_record()

    with Parts(
        out,
        list(by_id),
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        split={"error": beside(out, ".failed")},
        made_with=made_with,
    ) as parts:
        if not parts.work(make, progress):
            return None
        return [
            Failure(record["id"], record["error"]) if "error" in record else Prediction.from_record(record)
            for record in parts.results()
        ]


def model_fingerprint(folder: str | os.PathLike[str]) -> str:
    """Sixteen hex digits of a model folder: its configurations, and the first and last bytes of every tensor."""
    folder, digest = Path(folder), hashlib.sha256()
    for path in sorted(path for pattern in _CONFIGURATIONS for path in folder.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(path.name.encode() + header)
            begin = file.tell()
            tensors = parse_json(header)
            for first, last in sorted(entry["data_offsets"] for name, entry in tensors.items() if name[:2] != "__"):
                for place in (first, max(first, last - _BLOCK)):
                    file.seek(begin + place)
                    digest.update(file.read(min(_BLOCK, last - first)))
    return digest.hexdigest()[:16]


_CONFIGURATIONS, _BLOCK = ("*config.json", "*adapter.json", "tokenizer.json"), 4096


def samples_fingerprint(samples: Sequence[GroundingSample]) -> str:
    """Sixteen hex digits of what predictions depend on in samples: not where the videos lie, and no true boxes."""
    digest = hashlib.sha256()
    for sample in samples:
        record = replace(sample, boxes={}).to_record() | {"video": ""}
        digest.update(dump_json(record, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _check_scorable(samples: Sequence[GroundingSample]) -> None:
    for sample in samples:
        if sample.interval is None:
            raise SampleError(f"{sample.id} has no interval: only samples with one can be scored.")


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
        check_shape(info)  # before the annotation is compared with it: this says more of what is wrong
        segment = align_to_video(replace(sample, boxes={}), info).segment
        clip = load_clip(info, segment=segment, fps=processor.fps, max_frames=processor.max_frames)
        first, end = sample.segment or (0, sample.frame_count)
        clock = _annotated_clock(sample, info)[first:end]
        return _Clip(sample, clip.begin, clip.frames, clip.times, clip.duration, clock, first)
    except Exception as error:  # of whatever kind: it is this sample's, and must not end the others
        return Failure(sample.id, reason_of(error, sample.id))


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
        return [_to_prediction(*each) for each in zip(clips, predictions, strict=True)]
    except Exception as error:  # of whatever kind: it is this batch's, and must not end the others
        reason = reason_of(error, clips[0].sample.id)
    if len(clips) == 1:
        return [Failure(clips[0].sample.id, reason)]
    return [found for clip in clips for found in _predict(model, [clip])]


def _true_interval(clip: _Clip) -> tuple[float, float]:
    """Of the sample, seconds from the clip's start."""
    assert clip.sample.interval is not None
    start, end = clip.sample.interval
    return start - clip.begin, end - clip.begin


def _to_prediction(clip: _Clip, found: ClipPrediction) -> Prediction:
    assert found.oracle_frames is not None and found.oracle_boxes is not None
    if not all(np.isfinite(boxes).all() for boxes in (found.boxes, found.oracle_boxes)):
        raise SampleError("The predicted boxes are not finite; the model's weights may not be either.")
    size = clip.sample.width, clip.sample.height
    clock = clip.clock - clip.begin

    def tube(interval: tuple[float, float], positions: np.ndarray, boxes: np.ndarray) -> dict[int, Any]:
        frames, pixels = source_tube(clock, size, interval, clip.times[positions], boxes)
        return {clip.first + int(f): tuple(float(side) for side in box) for f, box in zip(frames, pixels, strict=True)}

    boxes = tube(found.interval, found.frames, found.boxes)
    oracle = tube(_true_interval(clip), found.oracle_frames, found.oracle_boxes)
    return Prediction(id=clip.sample.id, interval=(min(boxes), max(boxes) + 1), boxes=boxes, oracle_boxes=oracle)
