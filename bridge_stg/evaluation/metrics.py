"""m_tIoU, m_vIoU, vIoU@R and gt_vIoU of spatio-temporal video grounding, from samples and predictions.

Definitions, with S the true and P the predicted frames of a sample (both end-exclusive):
tIoU = |S and P| / |S or P|; vIoU = sum of box IoU over the frames in both / |S or P|; m_ = mean over samples;
vIoU@R = share of samples with vIoU > R; gt_vIoU = mean box IoU over S, the time being given.
They are those of TubeDETR (Yang et al., CVPR 2022). Public code applies them to different frames; a
`MetricProtocol` is one such choice, and `EVERY_FRAME` is this project's own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from ..data.sample import Box, GroundingSample, SentenceType, to_frame_range
from ..errors import SampleError
from .predictions import Prediction

THRESHOLDS = (0.3, 0.5)
METRICS = ("m_tIoU", "m_vIoU", *(f"vIoU@{threshold}" for threshold in THRESHOLDS), "gt_vIoU")


@dataclass(frozen=True)
class SampleScore:
    """Scores of one sample, each in [0, 1].

    Attributes:
        id, sentence_type, tier: of the sample.
        tIoU: temporal IoU.
        vIoU, gt_vIoU: tube IoU, and that with the time given; None for a sample without boxes.
        missing: no prediction was made, so that every score is 0.
    """

    id: str
    tIoU: float
    vIoU: float | None
    gt_vIoU: float | None
    sentence_type: SentenceType = "declarative"
    tier: str | None = None
    missing: bool = False


def temporal_iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    """IoU of two intervals [start, end) in the same unit; 0 where both are empty."""
    overlap = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - overlap
    return float(overlap / union) if union > 0 else 0.0


def box_iou(a: np.ndarray | Sequence[Any], b: np.ndarray | Sequence[Any]) -> np.ndarray:
    """IoU of boxes, element by element.

    Args:
        a, b: `[..., 4]` xyxy in continuous coordinates, broadcast against each other.

    Returns:
        float64 `[...]`; 0 where both boxes are empty.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    overlap = np.prod(
        np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None), axis=-1
    )
    union = np.prod(a[..., 2:] - a[..., :2], axis=-1) + np.prod(b[..., 2:] - b[..., :2], axis=-1) - overlap
    return np.divide(overlap, union, out=np.zeros_like(union), where=union > 0)


def score_sample(sample: GroundingSample, prediction: Prediction) -> SampleScore:
    """Score every original frame; a frame in which either side lacks its box counts 0.

    The time in gt_vIoU is the true one: `prediction.oracle_boxes` where given, else `prediction.boxes`.

    Raises:
        SampleError: the sample has no interval, or the prediction answers another sample.
    """
    if prediction.id != sample.id:
        raise SampleError(f"prediction {prediction.id!r} cannot be scored on sample {sample.id!r}; the ids must agree.")
    true = true_frames(sample)
    tiou = temporal_iou(true, prediction.interval)
    viou = gt_viou = None
    if sample.boxes:
        tube = tube_frames(sample.boxes, *true)
        shared = [frame for frame in tube if prediction.interval[0] <= frame < prediction.interval[1]]
        union = max(true[1], prediction.interval[1]) - min(true[0], prediction.interval[0])
        viou = sum_iou(sample.boxes, prediction.boxes, shared) / union
        gt_viou = sum_iou(sample.boxes, prediction.boxes_in_truth, tube) / (true[1] - true[0])
    return SampleScore(sample.id, tiou, viou, gt_viou, sample.sentence_type, sample.tier)


def true_frames(sample: GroundingSample) -> tuple[int, int]:
    """The true interval as frames [start, end), at least one.

    Raises:
        SampleError: the sample has no interval.
    """
    if sample.interval is None:
        raise SampleError(f"sample {sample.id!r} has no interval; only samples with one can be scored in time.")
    return to_frame_range(sample.interval, sample.fps, sample.frame_count)


def tube_frames(boxes: Mapping[int, Box], start: int, end: int) -> list[int]:
    """The frames in [start, end) that have a box, ascending; takes as long as there are boxes, not frames."""
    return sorted(frame for frame in boxes if start <= frame < end)


@dataclass(frozen=True)
class MetricProtocol:
    """One public choice of how the definitions meet frames.

    Attributes:
        name: what reports call it.
        score: scores one prediction.
        exceeds: what vIoU@R asks of (vIoU, R).
        admits: which samples count at all; None means all of them.
    """

    name: str
    score: Callable[[GroundingSample, Prediction], SampleScore]
    exceeds: Callable[[float, float], bool] = operator.gt
    admits: Callable[[GroundingSample], bool] | None = None


EVERY_FRAME = MetricProtocol("every_frame", score_sample)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a list of samples, in its order.

    Attributes:
        scores: one for each sample.
        missing: ids of samples without a prediction, scored 0.
        unexpected: ids of predictions without a sample, not scored.
        summary: what `summarise` makes of the scores.
        left_out: ids of samples that the protocol does not admit; they count nowhere.
    """

    scores: tuple[SampleScore, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    summary: dict[str, Any]
    left_out: tuple[str, ...] = ()


def evaluate(
    samples: Iterable[GroundingSample],
    predictions: Iterable[Prediction],
    protocol: MetricProtocol = EVERY_FRAME,
) -> Evaluation:
    """Score predictions, matched to samples by id; what is missing scores 0 and is listed.

    Raises:
        SampleError: an id comes twice, or a sample has no interval.
    """
    by_id: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.id in by_id:
            raise SampleError(f"prediction {prediction.id!r} comes twice; ids must be unique.")
        by_id[prediction.id] = prediction
    scores: dict[str, SampleScore] = {}
    left_out: dict[str, None] = {}
    for sample in samples:
        if sample.id in scores or sample.id in left_out:
            raise SampleError(f"sample {sample.id!r} comes twice; ids must be unique.")
        if protocol.admits is not None and not protocol.admits(sample):
            left_out[sample.id] = None
            continue
        found = by_id.get(sample.id)
        scores[sample.id] = protocol.score(sample, found) if found is not None else _missing_score(sample)
    ordered = tuple(scores.values())
    return Evaluation(
        scores=ordered,
        missing=tuple(score.id for score in ordered if score.missing),
        unexpected=tuple(id for id in by_id if id not in scores and id not in left_out),
        summary=summarise(ordered, protocol),
        left_out=tuple(left_out),
    )


def summarise(scores: Iterable[SampleScore], protocol: MetricProtocol = EVERY_FRAME) -> dict[str, Any]:
    """Mean metrics, ready for `json.dumps`.

    Returns:
        `{"all": row, "declarative": row, "interrogative": row, "type_mean": row}`, and `"tiers": {tier: row}`
        where samples have tiers. A row is `{"count", *METRICS}`; a metric that no sample has is None, so that
        the keys are always the same. `type_mean` is the mean of both sentence types, None where one lacks it.
    """
    scores = list(scores)
    summary: dict[str, Any] = {"all": _row(scores, protocol)}
    types = get_args(SentenceType)
    for sentence_type in types:
        summary[sentence_type] = _row([s for s in scores if s.sentence_type == sentence_type], protocol)
    summary["type_mean"] = {"count": len(scores)}
    for metric in METRICS:
        values = [summary[sentence_type][metric] for sentence_type in types]
        summary["type_mean"][metric] = None if None in values else float(np.mean(values))
    tiers = dict.fromkeys(score.tier for score in scores if score.tier is not None)
    if tiers:
        summary["tiers"] = {tier: _row([s for s in scores if s.tier == tier], protocol) for tier in tiers}
    return summary


def _row(scores: list[SampleScore], protocol: MetricProtocol) -> dict[str, float | int | None]:
    tubes = [score.vIoU for score in scores if score.vIoU is not None]
    row: dict[str, float | int | None] = {
        "count": len(scores),
        "m_tIoU": _mean([score.tIoU for score in scores]),
        "m_vIoU": _mean(tubes),
    }
    for threshold in THRESHOLDS:
        row[f"vIoU@{threshold}"] = _mean([float(protocol.exceeds(viou, threshold)) for viou in tubes])
    row["gt_vIoU"] = _mean([score.gt_vIoU for score in scores if score.gt_vIoU is not None])
    return row


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _missing_score(sample: GroundingSample) -> SampleScore:
    true_frames(sample)
    tube = 0.0 if sample.boxes else None
    return SampleScore(sample.id, 0.0, tube, tube, sample.sentence_type, sample.tier, missing=True)


def sum_iou(true: Mapping[int, Box], predicted: Mapping[int, Box], frames: Iterable[int]) -> float:
    """Sum of box IoU over those of `frames` in which both sides have a box."""
    both = [frame for frame in frames if frame in true and frame in predicted]
    if not both:
        return 0.0
    return float(box_iou([true[f] for f in both], [predicted[f] for f in both]).sum())
