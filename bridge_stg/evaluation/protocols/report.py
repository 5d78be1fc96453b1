"""Predictions against a dataset file, as one JSON object."""

from __future__ import annotations

import os
from typing import Any, get_args

from ...data.sample import SentenceType, read_samples
from ..metrics import METRICS, Evaluation, MetricProtocol, evaluate
from ..predictions import read_predictions


def protocol_report(evaluation: Evaluation, protocol: MetricProtocol) -> dict[str, Any]:
    """The interchange form of an evaluation, ready for `json.dumps`.

    Returns:
        `{"protocol": name, "all": row, "declarative": row, "interrogative": row, "type_mean": row,
        "counts": {group: n}, "missing": [ids], "unexpected": [ids], "left_out": [ids]}`. A row is `{metric: value}`
        with the five metrics in [0, 1], None where no sample has one; `type_mean` is the mean of both sentence types.
        Missing samples scored 0, unexpected predictions answer no sample, what a protocol leaves out counts nowhere.
    """
    summary = evaluation.summary
    groups = ("all", *get_args(SentenceType))
    rows = {group: {metric: summary[group][metric] for metric in METRICS} for group in (*groups, "type_mean")}
    return {
        "protocol": protocol.name,
        **rows,
        "counts": {group: summary[group]["count"] for group in groups},
        "missing": list(evaluation.missing),
        "unexpected": list(evaluation.unexpected),
        "left_out": list(evaluation.left_out),
    }


def score_files(
    dataset: str | os.PathLike[str], predictions: str | os.PathLike[str], protocol: MetricProtocol
) -> dict[str, Any]:
    """`protocol_report` of a predictions file against a dataset file; needs no model and no video.

    Raises:
        SampleError: a file cannot be read, a line breaks its schema, an id comes twice, or a sample has no interval.
    """
    samples = read_samples(dataset)
    return protocol_report(evaluate(samples, read_predictions(predictions), protocol), protocol)
