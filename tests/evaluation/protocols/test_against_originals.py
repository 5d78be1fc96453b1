"""Every protocol gives the numbers of the public evaluator it is named after."""

from __future__ import annotations

import json
import random

import pytest

from bridge_stg.evaluation import PROTOCOLS, score_files

from . import originals

FPS = (24.0, 25.0, 29.97002997002997, 30.0, 12.5)


def random_box(rng, width, height):
    x1, x2 = sorted(rng.uniform(-5, width + 5) for _ in range(2))
    y1, y2 = sorted(rng.uniform(-5, height + 5) for _ in range(2))
    return [x1, y1, x2, y2]


def near(rng, box, spread):
    x1, y1, x2, y2 = (side + rng.uniform(-spread, spread) for side in box)
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def random_case(rng, number, with_segment):
    """A sample and its prediction: good, poor, sparse, disjoint, empty or absent."""
    frame_count = rng.choice([40, 120, 300, 300, 480, 1400])
    width, height = rng.choice([(640, 360), (480, 360), (704, 480)])
    first, last = (0, frame_count) if rng.random() < 0.4 else sorted(rng.sample(range(frame_count + 1), 2))
    if last - first < 5:
        first, last = 0, frame_count
    start, end = sorted(rng.sample(range(first, last + 1), 2))
    box = random_box(rng, width, height)
    sample = {
        "id": f"s{number}",
        "video": "clip.mp4",
        "width": width,
        "height": height,
        "fps": rng.choice(FPS),
        "frame_count": frame_count,
        "sentence": "a dog runs",
        "sentence_type": rng.choice(["declarative", "interrogative"]),
        "segment": [first, last],
        "interval": [start, end],
        "boxes": {str(frame): (box := near(rng, box, 2)) for frame in range(start, end)},
    }
    if not with_segment:
        del sample["segment"]
    kind = rng.choice(["good", "good", "good", "sparse", "any", "empty", "absent"])
    if kind == "absent":
        return sample, None
    if kind in ("any", "empty"):
        s, e = sorted(rng.sample(range(first, last + 1), 2))
        s, e = (s, s) if kind == "empty" else (s, e)
    else:
        s = min(max(first, start + rng.randint(-20, 20)), last - 1)
        e = min(max(s + 1, end + rng.randint(-20, 20)), last)
    step = rng.randint(2, 9) if kind == "sparse" else 1
    reach = range(first, last, step) if rng.random() < 0.7 else range(s, e, step)
    boxes = {
        str(frame): near(rng, sample["boxes"].get(str(frame), random_box(rng, width, height)), 12) for frame in reach
    }
    return sample, {"id": sample["id"], "interval": [s, e], "boxes": boxes}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["tubedetr", "stcat", "hcstvg_official", "ptd"])
def test_random_predictions_score_as_in_the_original(tmp_path, name, seed):
    rng = random.Random(f"{name} {seed}")
    with_segment = name == "tubedetr" or seed % 2 == 0
    cases = [random_case(rng, number, with_segment) for number in range(60)]
    samples = [sample for sample, _ in cases]
    predictions = [prediction for _, prediction in cases if prediction is not None]
    rng.shuffle(predictions)
    expected = originals.summary(samples, predictions, getattr(originals, name), at_least=name == "ptd")
    dataset, answers = write(tmp_path / "d.jsonl", samples), write(tmp_path / "p.jsonl", predictions)
    report = score_files(dataset, answers, PROTOCOLS[name])
    for group, row in expected.items():
        assert row["m_vIoU"] > 0.05, "the cases must not be all zero"
        assert report[group] == pytest.approx(row, abs=1e-6), group
    left_out = set(report["left_out"])
    assert report["missing"] == [s["id"] for s, p in cases if p is None and s["id"] not in left_out]
    assert report["counts"]["all"] == len(samples) - len(left_out)
