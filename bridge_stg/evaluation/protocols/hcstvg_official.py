"""`hcstvg_official`: the HC-STVG challenge counts frames that carry a box on both sides, in time as in space.

Source: tzhhhh123/HC-STVG, eval_hcvg.py. It knows inclusive ends; here ends are exclusive, so that its
`max_ed - min_st + 1` is `max_end - min_start`.
"""

from __future__ import annotations

from ...data.sample import GroundingSample
from ..metrics import MetricProtocol, SampleScore, sum_iou, true_frames, tube_frames
from ..predictions import Prediction


def score_hcstvg_official(sample: GroundingSample, prediction: Prediction) -> SampleScore:
    """tIoU = frames with a true and a predicted box / hull of both intervals; vIoU = their sum of IoU / the same.

    A predicted box outside the predicted interval is not part of the answer. gt_vIoU, which the original lacks, is the
    mean over the true tube, from `oracle_boxes` where given. A sample without boxes has tIoU 0 by this definition.

    Raises:
        SampleError: the sample has no interval.
    """
    true, predicted = true_frames(sample), prediction.interval
    tube = tube_frames(sample.boxes, *true)
    shared = [frame for frame in tube if predicted[0] <= frame < predicted[1] and frame in prediction.boxes]
    hull = max(true[1], predicted[1]) - min(true[0], predicted[0])
    viou = gt_viou = None
    if sample.boxes:
        viou = sum_iou(sample.boxes, prediction.boxes, shared) / hull
        gt_viou = sum_iou(sample.boxes, prediction.boxes_in_truth, tube) / max(len(tube), 1)
    return SampleScore(sample.id, len(shared) / hull, viou, gt_viou, sample.sentence_type, sample.tier)


HCSTVG_OFFICIAL = MetricProtocol("hcstvg_official", score_hcstvg_official)
