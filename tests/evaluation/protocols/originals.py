"""The public evaluators, re-told frame by frame from their published definitions, on raw interchange records.

Nothing of the package is used here. Every function takes a sample record and a prediction record (or None) and
returns (tIoU, vIoU, gt_vIoU), or None for a sample that the original drops.
"""

from __future__ import annotations

import itertools


def overlap(a, b):
    """IoU of two boxes as torchvision defines it."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def numbered(boxes):
    return {int(frame): list(box) for frame, box in boxes.items()}


def frames_iou(true, predicted):
    max_start, min_end = max(true[0], predicted[0]), min(true[1], predicted[1])
    if min_end <= max_start:
        return 0.0
    intersection = min_end - max_start
    return intersection / (true[1] - true[0] + predicted[1] - predicted[0] - intersection)


def tubedetr(sample, prediction):
    if prediction is None:
        return 0.0, 0.0, 0.0
    true, predicted = sample["interval"], prediction["interval"]
    true_boxes, boxes = numbered(sample["boxes"]), numbered(prediction["boxes"])
    start_frame, end_frame = sample["segment"]
    sampling_rate = 5 / sample["fps"]
    frame_ids = [start_frame]
    for frame in range(start_frame, end_frame):
        if int(frame_ids[-1] * sampling_rate) < int(frame * sampling_rate):
            frame_ids.append(frame)
    if len(frame_ids) > 200:
        frame_ids = [frame_ids[(j * len(frame_ids)) // 200] for j in range(200)]
    inter_frames = [frame for frame in frame_ids if true[0] <= frame < true[1]]
    min_start, max_end = min(true[0], predicted[0]), max(true[1], predicted[1])
    union = [frame for frame in frame_ids if min_start <= frame < max_end]
    inter = [frame for frame in frame_ids if max(true[0], predicted[0]) <= frame < min(true[1], predicted[1])]
    viou = gt_viou = 0.0
    for frame in inter_frames:
        iou = overlap(boxes[frame], true_boxes[frame]) if frame in boxes else 0.0
        if frame in inter:
            viou += iou
        gt_viou += iou
    return frames_iou(true, predicted), viou / max(len(union), 1), gt_viou / max(len(inter_frames), 1)


def stcat(sample, prediction):
    if prediction is None:
        return 0.0, 0.0, 0.0
    true, predicted = sample["interval"], prediction["interval"]
    true_boxes, boxes = numbered(sample["boxes"]), numbered(prediction["boxes"])
    known = sorted(boxes)
    for left, right in itertools.pairwise(known):
        gap = right - left
        for step in range(1, gap):
            boxes[left + step] = [
                boxes[left][side] + step * (boxes[right][side] - boxes[left][side]) / gap for side in range(4)
            ]
    union = set(range(min(true[0], predicted[0]), max(true[1], predicted[1])))
    inter = set(range(max(true[0], predicted[0]), min(true[1], predicted[1])))
    viou = gt_viou = 0.0
    for frame, box in true_boxes.items():
        iou = overlap(boxes[frame], box) if frame in boxes else 0.0
        if frame in inter:
            viou += iou
        gt_viou += iou
    return frames_iou(true, predicted), viou / max(len(union), 1), gt_viou / max(len(true_boxes), 1)


def hcstvg_official(sample, prediction):
    if prediction is None:
        return 0.0, 0.0, 0.0
    true, predicted = sample["interval"], prediction["interval"]
    true_boxes, boxes = numbered(sample["boxes"]), numbered(prediction["boxes"])
    # The original's file of answers has inclusive ends, and boxes between them only.
    st_frame, ed_frame = predicted[0], predicted[1] - 1
    answer = {frame: box for frame, box in boxes.items() if st_frame <= frame <= ed_frame}
    ious = [overlap(answer[frame], box) for frame, box in true_boxes.items() if frame in answer]
    all_frame = max(true[1] - 1, ed_frame) - min(true[0], st_frame) + 1
    gt = [overlap(boxes[frame], box) if frame in boxes else 0.0 for frame, box in true_boxes.items()]
    return len(ious) / all_frame, sum(ious) / all_frame, sum(gt) / max(len(gt), 1)


def ptd(sample, prediction):
    true = sample["interval"]
    true_boxes = numbered(sample["boxes"])
    width, height = sample["width"], sample["height"]

    def normalise(box):
        x1, x2 = (max(0.0, min(float(x), width)) for x in (box[0], box[2]))
        y1, y2 = (max(0.0, min(float(y), height)) for y in (box[1], box[3]))
        return [
            round(x1 / width * 1000),
            round(y1 / height * 1000),
            round(x2 / width * 1000),
            round(y2 / height * 1000),
        ]

    start, end = sample.get("segment", [0, sample["frame_count"]])
    end -= 1
    count = min(max(int((end - start + 1) / sample["fps"] * 2.0), 4), 64, end - start + 1)
    sampled = [start] if count <= 1 else [round(start + i * (end - start) / (count - 1)) for i in range(count)]
    gt = {}
    for time_index, frame in enumerate(sampled, start=1):
        if true[0] <= frame < true[1] and frame in true_boxes:
            gt[time_index] = normalise(true_boxes[frame])
    if not gt and "segment" not in sample:
        return None
    if prediction is None:
        return 0.0, 0.0, 0.0
    boxes, predicted, inside, oracle = numbered(prediction["boxes"]), {}, [], 0.0
    for time_index, frame in enumerate(sampled, start=1):
        if prediction["interval"][0] <= frame < prediction["interval"][1]:
            inside.append(time_index)
            if frame in boxes:
                predicted[time_index] = normalise(boxes[frame])
        if time_index in gt and frame in boxes:
            oracle += overlap(gt[time_index], normalise(boxes[frame]))
    tiou = viou = 0.0
    if gt and inside:
        first, second = [min(gt), max(gt) + 1], [min(inside), max(inside) + 1]
        shared = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
        tiou = shared / (max(first[1], second[1]) - min(first[0], second[0]))
    indices = set(gt) | set(predicted)
    if indices:
        viou = sum(overlap(gt[i], predicted[i]) for i in indices if i in gt and i in predicted) / len(indices)
    return tiou, viou, oracle / max(len(gt), 1)


def summary(samples, predictions, score, at_least=False):
    """Means per sentence type, as the originals print them."""
    answers = {prediction["id"]: prediction for prediction in predictions}
    scores = {}
    for sample in samples:
        found = score(sample, answers.get(sample["id"]))
        if found is not None:
            scores[sample["id"]] = (sample["sentence_type"], *found)
    report = {}
    for group in ("all", "declarative", "interrogative"):
        rows = [row[1:] for row in scores.values() if group in ("all", row[0])]
        report[group] = {"m_tIoU": 0.0, "m_vIoU": 0.0, "vIoU@0.3": 0.0, "vIoU@0.5": 0.0, "gt_vIoU": 0.0}
        for tiou, viou, gt_viou in rows:
            report[group]["m_tIoU"] += tiou / len(rows)
            report[group]["m_vIoU"] += viou / len(rows)
            report[group]["gt_vIoU"] += gt_viou / len(rows)
            for threshold in (0.3, 0.5):
                passed = viou >= threshold if at_least else viou > threshold
                report[group][f"vIoU@{threshold}"] += passed / len(rows)
    return report
