"""`ptd`: time and boxes on two frames a second, at most 64, with coordinates in thousandths of the frame.

Source: mbzuai-oryx/ParallelTubeDecoding, data/prepare_{vidstg,hcstvg}_eval.py for the frames and the rounding,
evaluation/lmms_eval/lmms_eval/tasks/{vidstg,hcstvg}/utils.py for the metrics.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from ...data.sample import Box, GroundingSample
from ..metrics import MetricProtocol, SampleScore, sum_iou, temporal_iou, true_frames
from ..predictions import Prediction

SAMPLE_FPS = 2.0
MIN_FRAMES, MAX_FRAMES = 4, 64
COORDINATES = 1000


def sampled_frames(sample: GroundingSample) -> list[int]:
    """Frames that the original shows the model: evenly spaced over the clip, its first and last included."""
    start, end = sample.segment or (0, sample.frame_count)
    count = min(max(int((end - start) / sample.fps * SAMPLE_FPS), MIN_FRAMES), MAX_FRAMES, end - start)
    if count == 1:
        return [start]
    return [round(start + index * (end - 1 - start) / (count - 1)) for index in range(count)]


def score_ptd(sample: GroundingSample, prediction: Prediction) -> SampleScore:
    """tIoU over time indices (places among the sampled frames); vIoU = sum of IoU / indices with a box on either side.

    The true interval is from the first to the last index with a true box, the predicted one holds the indices whose
    frame lies in it. gt_vIoU, which the original lacks, is the mean over indices with a true box, from `oracle_boxes`
    where given. A sample without boxes is scored in time alone, by the indices in its interval.

    Raises:
        SampleError: the sample has no interval.
    """
    frames = sampled_frames(sample)
    inside = [index for index, frame in enumerate(frames) if prediction.interval[0] <= frame < prediction.interval[1]]
    true = _true_tube(sample, frames)
    event = list(true) if sample.boxes else _true_indices(sample, frames)
    tiou = temporal_iou(_hull(event), _hull(inside)) if event and inside else 0.0
    viou = gt_viou = None
    if sample.boxes:
        predicted = _quantise(sample, {index: frames[index] for index in inside}, prediction.boxes)
        known = _quantise(sample, {index: frames[index] for index in true}, prediction.boxes_in_truth)
        viou = sum_iou(true, predicted, true) / max(len(true.keys() | predicted.keys()), 1)
        gt_viou = sum_iou(true, known, true) / max(len(true), 1)
    return SampleScore(sample.id, tiou, viou, gt_viou, sample.sentence_type, sample.tier)


def admits_ptd(sample: GroundingSample) -> bool:
    """Whether the original would keep the sample: it drops HC-STVG events that no sampled frame falls into.

    VidSTG events of that kind stay and score 0. What tells both apart is the segment: VidSTG asks about a part of
    a video, HC-STVG about a whole one, so a sample without `segment` is treated as HC-STVG.
    """
    return sample.segment is not None or not sample.boxes or bool(_true_tube(sample, sampled_frames(sample)))


def _true_indices(sample: GroundingSample, frames: list[int]) -> list[int]:
    start, end = true_frames(sample)
    return [index for index, frame in enumerate(frames) if start <= frame < end]


def _true_tube(sample: GroundingSample, frames: list[int]) -> dict[int, Box]:
    return _quantise(sample, {index: frames[index] for index in _true_indices(sample, frames)}, sample.boxes)


def _hull(indices: list[int]) -> tuple[int, int]:
    return indices[0], indices[-1] + 1


def _quantise(sample: GroundingSample, frames: Mapping[int, int], boxes: Mapping[int, Box]) -> dict[int, Box]:
    """{index: box in thousandths} for those of {index: frame} that have a box; halves round to even."""
    size = (sample.width, sample.height, sample.width, sample.height)
    found: dict[int, Box] = {}
    for index, frame in frames.items():
        if frame in boxes:
            x1, y1, x2, y2 = (
                round(max(0.0, min(float(value), length)) / length * COORDINATES)
                for value, length in zip(boxes[frame], size, strict=True)
            )
            found[index] = (x1, y1, x2, y2)
    return found


PTD = MetricProtocol("ptd", score_ptd, exceeds=operator.ge, admits=admits_ptd)
