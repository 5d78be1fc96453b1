"""`stcat`: every original frame counts, predicted boxes are interpolated between the frames that have one.

Source: jy0205/STCAT, datasets/evaluation/{vidstg,hcstvg}_eval.py and `linear_interp` of engine/evaluate.py. CG-STVG and
TA-STVG score by the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ...data.sample import Box, GroundingSample
from ..metrics import MetricProtocol, SampleScore, sum_iou, temporal_iou, true_frames, tube_frames
from ..predictions import Prediction, StillTube


def interpolate_boxes(boxes: Mapping[int, Box], frames: Iterable[int]) -> dict[int, Box]:
    """Boxes at `frames`, linear between the nearest given ones on both sides; none outside the given ones."""
    if isinstance(boxes, StillTube):
        return {frame: boxes.box for frame in frames if frame in boxes.frames}
    known = sorted(boxes)
    wanted = [frame for frame in frames if known and known[0] <= frame <= known[-1]]
    if not wanted:
        return {}
    values = np.array([boxes[frame] for frame in known], dtype=np.float64)
    columns = [np.interp(wanted, known, values[:, side]).tolist() for side in range(4)]
    return {frame: (x1, y1, x2, y2) for frame, x1, y1, x2, y2 in zip(wanted, *columns, strict=True)}


def score_stcat(sample: GroundingSample, prediction: Prediction) -> SampleScore:
    """tIoU over frame numbers; vIoU = sum of IoU over frames in both intervals / frames in their hull.

    gt_vIoU is the mean over the true tube, from `oracle_boxes` where given. The true tube is that in the true
    interval; a last box exactly at its end belongs to it too, for STCAT stores the end of some events inclusive and
    uses it as exclusive (samples read with `convention="stcat"`).

    Raises:
        SampleError: the sample has no interval.
    """
    true, predicted = true_frames(sample), prediction.interval
    tiou = temporal_iou(true, predicted)
    viou = gt_viou = None
    if sample.boxes:
        inclusive = max(sample.boxes) == true[1]
        tube = tube_frames(sample.boxes, true[0], true[1] + inclusive)
        shared = [frame for frame in tube if predicted[0] <= frame < predicted[1] and frame < true[1]]
        union = max(true[1], predicted[1]) - min(true[0], predicted[0])
        viou = sum_iou(sample.boxes, interpolate_boxes(prediction.boxes, shared), shared) / max(union, 1)
        gt_viou = sum_iou(sample.boxes, interpolate_boxes(prediction.boxes_in_truth, tube), tube) / max(len(tube), 1)
    return SampleScore(sample.id, tiou, viou, gt_viou, sample.sentence_type, sample.tier)


STCAT = MetricProtocol("stcat", score_stcat)
