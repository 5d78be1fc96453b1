"""`tubedetr`: time on raw frame numbers, boxes on a grid of five frames a second.

Source: antoyang/TubeDETR, datasets/{vidstg,hcstvg}_eval.py (Apache-2.0), in the revision whose union of frames ends at
the later of both ends.
"""

from __future__ import annotations

import math

from ...data.sample import GroundingSample
from ..metrics import MetricProtocol, SampleScore, sum_iou, temporal_iou, true_frames
from ..predictions import Prediction

GRID_FPS = 5
MAX_FRAMES = 200


def grid_frames(sample: GroundingSample) -> list[int]:
    """Frames that the original decodes: of the clip, the first and every one that begins a fifth of a second.

    Fifths are counted from frame 0 of the video, not of the clip; more than 200 frames are thinned evenly.
    """
    start, end = sample.segment or (0, sample.frame_count)
    fifths = GRID_FPS / sample.fps  # a frame
    if fifths >= 1:
        count = end - start
    else:
        first = int(start * fifths)
        count = int((end - 1) * fifths) - first + 1

    def kept(index: int) -> int:
        if index == 0 or fifths >= 1:
            return start + index
        frame = math.ceil((first + index) / fifths)
        # The division rounds; what counts is the product, as the original has it.
        while int((frame - 1) * fifths) >= first + index:
            frame -= 1
        while int(frame * fifths) < first + index:
            frame += 1
        return frame

    if count > MAX_FRAMES:
        return [kept(place * count // MAX_FRAMES) for place in range(MAX_FRAMES)]
    return [kept(index) for index in range(count)]


def score_tubedetr(sample: GroundingSample, prediction: Prediction) -> SampleScore:
    """tIoU over frame numbers; vIoU = sum of IoU over grid frames in both intervals / grid frames in their hull.

    gt_vIoU is the mean over grid frames in the true interval, from `oracle_boxes` where given. A grid frame without
    a predicted box counts 0; an event between two grid frames has vIoU and gt_vIoU 0.

    Raises:
        SampleError: the sample has no interval.
    """
    true, predicted = true_frames(sample), prediction.interval
    tiou = temporal_iou(true, predicted)
    viou = gt_viou = None
    if sample.boxes:
        grid = grid_frames(sample)
        tube = [frame for frame in grid if true[0] <= frame < true[1] and frame in sample.boxes]
        shared = [frame for frame in tube if predicted[0] <= frame < predicted[1]]
        first, last = min(true[0], predicted[0]), max(true[1], predicted[1])
        union = sum(first <= frame < last for frame in grid)
        viou = sum_iou(sample.boxes, prediction.boxes, shared) / max(union, 1)
        gt_viou = sum_iou(sample.boxes, prediction.boxes_in_truth, tube) / max(len(tube), 1)
    return SampleScore(sample.id, tiou, viou, gt_viou, sample.sentence_type, sample.tier)


TUBEDETR = MetricProtocol("tubedetr", score_tubedetr)
