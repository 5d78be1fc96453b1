"""Evaluation: predictions and their files, metric protocols, trivial baselines. Knows no model."""

from ..data.sample import to_frame_range
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
from .predictions import Prediction, read_predictions, write_predictions
from .protocols import PROTOCOLS, protocol_report, score_files
from .trivial_baselines import ConstantFloor, random_floor

__all__ = [
    "EVERY_FRAME",
    "METRICS",
    "PROTOCOLS",
    "THRESHOLDS",
    "ConstantFloor",
    "Evaluation",
    "MetricProtocol",
    "Prediction",
    "SampleScore",
    "box_iou",
    "evaluate",
    "protocol_report",
    "random_floor",
    "read_predictions",
    "score_files",
    "score_sample",
    "summarise",
    "temporal_iou",
    "to_frame_range",
    "write_predictions",
]
