"""Evaluation: predictions and their files, metric protocols, trivial floors. Knows no model."""

from .floors import ConstantFloor, random_floor
from .metrics import (
    EVERY_FRAME,
    METRICS,
    THRESHOLDS,
    Evaluation,
    MetricProtocol,
    SampleScore,
    box_iou,
    evaluate,
    score_sample,
    summarise,
    temporal_iou,
)
from .predictions import Prediction, read_predictions, to_frame_range, write_predictions

__all__ = [
    "EVERY_FRAME",
    "METRICS",
    "THRESHOLDS",
    "ConstantFloor",
    "Evaluation",
    "MetricProtocol",
    "Prediction",
    "SampleScore",
    "box_iou",
    "evaluate",
    "random_floor",
    "read_predictions",
    "score_sample",
    "summarise",
    "temporal_iou",
    "to_frame_range",
    "write_predictions",
]
