"""Tiny annotation files in the published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")
    return path


def vidstg_record(**changes: Any) -> dict[str, Any]:
    """A clip of frames 10..39 of a 50-frame video; its event is frames 15..24 of trajectories 0 and 1."""
    record = {
        "vid": "7771650716",
        "fps": 25,
        "frame_count": 50,
        "width": 640,
        "height": 360,
        "subject/objects": [{"tid": 0, "category": "dog"}, {"tid": 1, "category": "adult"}],
        "used_segment": {"begin_fid": 10, "end_fid": 39},
        "used_relation": {"subject_tid": 0, "object_tid": 1, "predicate": "watch", "begin_fid": 15, "end_fid": 25},
        "temporal_gt": {"begin_fid": 15, "end_fid": 25},
        "captions": [{"description": " a dog watches a man.", "type": "object", "target_id": 0}],
        "questions": [
            {"description": "what watches a man?", "type": "object", "target_id": 0},
            {"description": "who does the dog watch?", "type": "person", "target_id": 1},
        ],
    }
    return record | changes


def vidor_video(tracks: dict[int, dict[int, tuple[int, int, int, int]]], frames: int = 50) -> dict[str, Any]:
    def entry(tid: int, box: tuple[int, int, int, int]) -> dict[str, Any]:
        bbox = dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        return {"tid": tid, "bbox": bbox, "generated": 0, "tracker": "none"}

    trajectories = [[entry(tid, track[f]) for tid, track in tracks.items() if f in track] for f in range(frames)]
    return {"video_id": "7771650716", "video_path": "1001/7771650716.mp4", "trajectories": trajectories}


def moving(frames: range) -> dict[int, tuple[int, int, int, int]]:
    return {frame: (frame, 20, frame + 30, 60) for frame in frames}


def hcstvg_record(version: int = 1, **changes: Any) -> dict[str, Any]:
    """A 25-fps clip of 500 frames; a tube of 50 boxes from the 61st frame on."""
    record: dict[str, Any] = {
        "bbox": [[100 + i, 40, 150, 300] for i in range(50)],
        "st_time": 2.4,
        "ed_time": 4.4,
        "img_num": 500,
        "st_frame": 61,
    }
    text = "The man stands up and raises his hand."
    extra = {"caption": text, "width": 704, "height": 480}
    if version == 2:
        extra = {"English": text, "Chinese": "", "img_size": [480, 704]}
    return record | extra | changes


def refcoco_refs(**changes: Any) -> list[dict[str, Any]]:
    ref = {
        "ref_id": 7,
        "ann_id": 11,
        "image_id": 3,
        "category_id": 1,
        "file_name": "COCO_train2014_000000000003_11.jpg",
        "split": "testA",
        "sent_ids": [20, 21],
        "sentences": [
            {"sent_id": 20, "sent": "woman in red", "raw": "Woman in red", "tokens": ["woman", "in", "red"]},
            {"sent_id": 21, "sent": "left lady", "raw": "left lady", "tokens": ["left", "lady"]},
        ],
    }
    return [ref | changes, ref | {"ref_id": 8, "split": "train", "sentences": ref["sentences"][:1]}]


def refcoco_instances() -> dict[str, Any]:
    return {
        "images": [{"id": 3, "file_name": "COCO_train2014_000000000003.jpg", "width": 640, "height": 480}],
        "annotations": [{"id": 11, "image_id": 3, "bbox": [10.5, 20.0, 100.0, 200.0], "category_id": 1}],
    }
