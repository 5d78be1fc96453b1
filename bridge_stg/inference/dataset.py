"""Annotated samples through one model: decoding, batching, and predictions in the annotation's frames."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data import GroundingSample, align_to_video, probe, read_samples
from ..data.clip import Clip, check_shape, load_clip
from ..errors import SampleError
from ..evaluation import Prediction
from ..models import BridgeSTGForVideoGrounding, BridgeSTGProcessor
from ..models.grounding import ClipPrediction, source_tube
from .outcome import Outcome, answer_together
from .resumable_jsonl import Progress, ResumableJsonl


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
    model: BridgeSTGForVideoGrounding, samples: Sequence[GroundingSample], *, batch_size: int = 16
) -> list[Prediction]:
    """Ground samples as `ground_samples` does, and raise the first failure.

    Raises:
        SampleError: a sample has no interval to be scored against, or cannot be grounded.
    """
    predictions = []
    for outcome in ground_samples(model, samples, batch_size=batch_size):
        if outcome.answer is None:
            raise SampleError(f"{outcome.id} cannot be grounded: {outcome.reason}")
        predictions.append(outcome.answer)
    return predictions


def ground_samples(
    model: BridgeSTGForVideoGrounding, samples: Sequence[GroundingSample], *, batch_size: int = 16
) -> Iterator[Outcome[Prediction]]:
    """Ground samples one batch at a time, in order; decodes and holds one batch.

    A clip is the sample's segment or the whole video. Frames and pixels of a prediction are the annotation's, whatever
    the decoded video has: times are what both share. A prediction has boxes at every frame of the predicted interval,
    and `oracle_boxes` at every frame of the true one, from a second pass of the spatial decoder that is given it.

    Raises:
        SampleError: a sample has no interval to be scored against.
    """
    _check_scorable(samples)
    for start in range(0, len(samples), batch_size):
        loaded = [
            outcome
            for sample in samples[start : start + batch_size]
            for outcome in answer_together([sample], lambda alone: [_load(model.processor, alone[0])])
        ]
        clips = [outcome.answer for outcome in loaded if outcome.answer is not None]
        predicted = iter(answer_together(clips, lambda batch: _predict(model, batch)))
        for outcome in loaded:
            yield Outcome(outcome.id, reason=outcome.reason) if outcome.answer is None else next(predicted)


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
) -> list[Outcome[Prediction]] | None:
    """Ground this rank's share of the samples and write every outcome down as it comes; call again to go on.

    The predictions end up in `out`, what could not be grounded in `out` with `.failed` behind it, what made them in
    `out` with `.run` behind it. Any number of ranks may go on with what any other number left; with the same batch
    size the files are those of a run that nothing interrupts. After a run on fewer samples they agree up to rounding,
    because its last batch may have been smaller. A failure is an outcome too, and not tried again before
    `.failed` is removed.

    An output is never replaced by one made with something else: whether it is finished or begun, such a run is refused
    until `out` and the folder beside it, `out` with `.parts` behind it, are removed.

    Args:
        made_with: what a prediction depends on: model, settings, samples.
        rank, world_size: this rank grounds the batches whose place modulo `world_size` is `rank`.
        progress: called with (samples of this rank done, all of this rank).

    Returns:
        all outcomes in the order of `samples`, to one rank: one that finds them complete after its own work, or rank 0
        where nothing was left to do. None to the others, and while some are missing.

    Raises:
        SampleError: a sample has no interval to be scored against, or `out` holds predictions for other samples.
        OutputError: `out` cannot be written, or was made with something else.
    """
    _check_scorable(samples)
    by_id = {sample.id: sample for sample in samples}

    def ground(names: list[str]) -> Iterator[Outcome[dict[str, Any]]]:
        for outcome in ground_samples(model, [by_id[name] for name in names], batch_size=batch_size):
            yield outcome.map(Prediction.to_record)

    with ResumableJsonl(
        out,
        list(by_id),
        made_with=made_with,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        failures_apart=True,
    ) as output:
        if not output.work(ground, progress):
            return None
        return [outcome.map(Prediction.from_record) for outcome in output.outcomes()]


def _check_scorable(samples: Sequence[GroundingSample]) -> None:
    for sample in samples:
        if sample.interval is None:
            raise SampleError(f"{sample.id} has no interval: only samples with one can be scored.")


@dataclass(frozen=True)
class _SampleClip:
    """A sample and its decoded clip.

    Attributes:
        clock: float64 `[n]`, seconds from the clip's start at every annotated frame of the clip.
        first: the annotated frame that `clock` begins with.
    """

    sample: GroundingSample
    clip: Clip
    clock: np.ndarray
    first: int

    @property
    def id(self) -> str:
        return self.sample.id

    @property
    def true_interval(self) -> tuple[float, float]:
        """Seconds from the clip's start."""
        assert self.sample.interval is not None
        start, end = self.sample.interval
        return start - self.clip.begin, end - self.clip.begin


def _load(processor: BridgeSTGProcessor, sample: GroundingSample) -> _SampleClip:
    info = probe(sample.video)
    check_shape(info)  # before the annotation is compared with it: this says more of what is wrong
    segment = align_to_video(replace(sample, boxes={}), info).segment
    clip = load_clip(info, segment=segment, fps=processor.fps, max_frames=processor.max_frames)
    first, end = sample.segment or (0, sample.frame_count)
    clock = info.times if sample.frame_count == info.frame_count else np.arange(sample.frame_count) / sample.fps
    return _SampleClip(sample, clip, clock[first:end] - clip.begin, first)


def _predict(model: BridgeSTGForVideoGrounding, batch: Sequence[_SampleClip]) -> list[Prediction]:
    predictions = model.predict(
        [each.clip.frames for each in batch],
        [each.clip.times.tolist() for each in batch],
        [each.sample.sentence for each in batch],
        durations=[each.clip.duration for each in batch],
        oracle_intervals=[each.true_interval for each in batch],
    )
    return [_to_prediction(*each) for each in zip(batch, predictions, strict=True)]


def _to_prediction(source: _SampleClip, found: ClipPrediction) -> Prediction:
    """The prediction in frames and pixels of the annotation."""
    assert found.oracle_frames is not None and found.oracle_boxes is not None
    if not all(np.isfinite(boxes).all() for boxes in (found.boxes, found.oracle_boxes)):
        raise SampleError("The predicted boxes are not finite; the model's weights may not be either.")
    size = source.sample.width, source.sample.height

    def tube(interval: tuple[float, float], positions: np.ndarray, boxes: np.ndarray) -> dict[int, Any]:
        frames, pixels = source_tube(source.clock, size, interval, source.clip.times[positions], boxes)
        return {
            source.first + int(frame): tuple(float(side) for side in box)
            for frame, box in zip(frames, pixels, strict=True)
        }

    boxes = tube(found.interval, found.frames, found.boxes)
    oracle = tube(source.true_interval, found.oracle_frames, found.oracle_boxes)
    return Prediction(id=source.id, interval=(min(boxes), max(boxes) + 1), boxes=boxes, oracle_boxes=oracle)
