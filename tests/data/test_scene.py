from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from bridge_stg.data import (
    COLORS,
    COMPOSITIONS,
    MOTIONS,
    SHAPES,
    SPLITS,
    TIERS,
    VOCABULARY,
    SyntheticImages,
    SyntheticTubes,
)
from bridge_stg.data.scene import (
    DECLARATIVE,
    DIAMETER,
    EVENT_SPEED,
    INTERROGATIVE,
    MOTION_QUESTION,
    REFERRING,
    SEGMENT_SPEED,
    STILL,
)

DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@pytest.fixture(scope="module", params=SPLITS)
def clips(request):
    tubes = SyntheticTubes(request.param, seed=7, count=400)
    return request.param, [tubes[i] for i in range(400)]


def test_split_of_compositions():
    parts = {split: set(triples) for split, triples in COMPOSITIONS.items()}
    assert {split: len(part) for split, part in parts.items()} == {"train": 84, "val": 12, "test": 24}
    assert len(set.union(*parts.values())) == 120 == len(COLORS) * len(SHAPES) * len(MOTIONS)
    kept = Counter((color, shape) for color, shape, _ in parts["train"])
    assert len(kept) == 30
    assert min(kept.values()) >= 2
    for split, count in {"val": 3, "test": 6}.items():
        assert set(Counter(motion for *_, motion in parts[split]).values()) == {count}


def test_target_comes_from_its_split_and_others_keep_out_of_held_out_triples(clips):
    split, clips = clips
    for clip in clips:
        target = clip.objects[clip.target]
        motion = target.motions[clip.interval_frames[0]]
        assert (target.color, target.shape, motion) in COMPOSITIONS[split]
        if split == "train":
            for item in clip.objects:
                performed = {(item.color, item.shape, m) for m in item.motions if m != STILL}
                assert performed <= set(COMPOSITIONS["train"])


def test_event_is_exactly_the_interval(clips):
    for clip in clips[1]:
        start, end = clip.interval_frames
        target = clip.objects[clip.target]
        motion = target.motions[start]
        assert 4 <= end - start <= 10
        assert [f for f, m in enumerate(target.motions) if m == motion] == list(range(start, end))
        step = np.diff(target.centers, axis=0)
        along = step @ np.array(DIRECTION[motion])
        for frame in range(1, clip.frame_count):
            if start <= frame < end:
                assert EVENT_SPEED[0] - 1e-9 <= along[frame - 1] <= EVENT_SPEED[1] + 1e-9
                assert np.abs(step[frame - 1]).sum() == pytest.approx(along[frame - 1])
            else:
                assert along[frame - 1] < 1e-9 or target.motions[frame] != motion


def test_displacement_belongs_to_the_motion_of_its_frame(clips):
    for clip in clips[1][:100]:
        for item in clip.objects:
            for frame, step in enumerate(np.diff(item.centers, axis=0), start=1):
                motion = item.motions[frame]
                direction = np.array(DIRECTION.get(motion, (0, 0)))
                speed = np.abs(step).sum()
                np.testing.assert_allclose(step, direction * speed, atol=1e-12)
                low, high = min(SEGMENT_SPEED[0], EVENT_SPEED[0]), max(SEGMENT_SPEED[1], EVENT_SPEED[1])
                assert speed < 1e-12 if motion == STILL else low - 1e-9 <= speed <= high + 1e-9


def test_every_object_stays_whole_in_view(clips):
    for clip in clips[1]:
        for item in clip.objects:
            half = item.half_size(clip.size)
            assert (item.centers - half >= -1e-9).all()
            assert (item.centers + half <= 1 + 1e-9).all()
            assert DIAMETER[0] <= item.diameter <= DIAMETER[1]
            assert 2 * half.max() == pytest.approx(item.diameter)


def test_tiers_hold_what_they_promise(clips):
    performing: Counter[str] = Counter()
    for index, clip in enumerate(clips[1]):
        assert clip.tier == TIERS[index % 4]
        assert clip.sentence_type == ("interrogative" if clip.tier == "interrogative" else "declarative")
        target = clip.objects[clip.target]
        others = [item for i, item in enumerate(clip.objects) if i != clip.target]
        motion = target.motions[clip.interval_frames[0]]
        same = [(item.color == target.color) + (item.shape == target.shape) for item in others]
        performers = [item for item in others if motion in item.motions]
        performing[clip.tier] += bool(performers)
        if clip.tier == "single":
            assert not others
        elif clip.tier == "distractors":
            assert 1 <= len(others) <= 2
            assert set(same) == {1}
            assert len(performers) <= 1
        elif clip.tier == "twins":
            assert sorted(same) in ([2], [1, 2])
            assert motion not in others[same.index(2)].motions
        else:
            assert 1 <= len(others) <= 2
            assert not performers
            assert not any(word in clip.sentence.split() for word in (*COLORS, *SHAPES))
    assert 0.35 < performing["distractors"] / 100 < 0.65
    assert 0.12 < performing["twins"] / 100 < 0.42


def test_drawing_order_does_not_tell_the_target(clips):
    on_top = [clip.target == len(clip.objects) - 1 for clip in clips[1] if len(clip.objects) == 2]
    assert 0.35 < np.mean(on_top) < 0.65


def test_objects_of_one_colour_look_the_same(clips):
    for clip in clips[1]:
        assert len({(item.color, item.rgb) for item in clip.objects}) == len({o.color for o in clip.objects})


def test_sentences_name_look_and_motion(clips):
    words = {"up": {"up", "upwards"}, "down": {"down", "downwards"}, "left": {"left"}, "right": {"right"}}
    for clip in clips[1]:
        target = clip.objects[clip.target]
        said = set(re.findall(r"\w+", clip.sentence))
        assert said & words[target.motions[clip.interval_frames[0]]]
        if clip.tier != "interrogative":
            assert {target.color, target.shape} <= said


def test_vocabulary_covers_every_template_and_nothing_else():
    said = set()
    for template in (*DECLARATIVE, *INTERROGATIVE, *REFERRING, MOTION_QUESTION):
        for color in COLORS:
            for shape in SHAPES:
                for motion in ("left", "right", "up", "down"):
                    to = {"up": "upwards", "down": "downwards"}.get(motion, f"to the {motion}")
                    sentence = template.format(color=color, shape=shape, motion=motion, to=to)
                    said |= set(re.findall(r"[^\s?]+", sentence))
    assert said == set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY))
    assert all(word == word.lower() for word in VOCABULARY)


def test_pictures_name_one_object_only():
    images = SyntheticImages("train", count=300)
    shared = []
    for clip in (images[i] for i in range(300)):
        target = clip.objects[clip.target]
        assert clip.sentence in (
            f"the {target.color} {target.shape}",
            f"find the {target.color} {target.shape}",
        )
        looks = [(item.color, item.shape) for item in clip.objects]
        assert looks.count((target.color, target.shape)) == 1
        assert len(looks) <= 4
        shared += [(c == target.color) + (s == target.shape) for c, s in looks if (c, s) != looks[clip.target]]
    assert np.mean(shared) > 0.75


@pytest.mark.parametrize(("frame_count", "size"), [(5, (64, 64)), (120, (48, 96)), (300, (90, 60))])
def test_other_lengths_and_shapes_of_frame(frame_count, size):
    tubes = SyntheticTubes("train", frame_count=frame_count, size=size, count=8)
    for clip in (tubes[i] for i in range(8)):
        start, end = clip.interval_frames or (0, 0)
        assert 4 <= end - start < frame_count
        assert len(clip.boxes()) == frame_count
        for item in clip.objects:
            width, height = 2 * item.half_size(size) * (size[1], size[0])
            assert max(width, height) == pytest.approx(item.diameter * min(size))
            boxes = item.boxes(size)
            np.testing.assert_allclose(
                (boxes[:, 2:] - boxes[:, :2]) * (size[1], size[0]), [[width, height]] * frame_count
            )
