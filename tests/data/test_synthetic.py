from __future__ import annotations

import hashlib
import pickle

import cv2
import numpy as np
import pytest
from torch.utils.data import DataLoader

from bridge_stg.data import (
    SHAPES,
    TIERS,
    SyntheticImages,
    SyntheticTubes,
    decode_frames,
    probe,
    read_samples,
    write_split,
)
from bridge_stg.data.render import Background, procedural_background, render_scene
from bridge_stg.data.scene import SceneObject
from bridge_stg.errors import OutputError, VideoError

from .media import encode, real_clip


def _description(clip):
    return clip.sentence, clip.interval_frames, clip.target, clip.background, clip.boxes().tobytes()


def test_same_seed_same_clip_in_any_order():
    one, two = (SyntheticTubes("train", seed=3, count=50) for _ in range(2))
    assert _description(one[31]) != _description(one[32])
    for index in (49, 0, 31):
        assert _description(one[index]) == _description(two[index])
        np.testing.assert_array_equal(one[index].render((32, 32)), two[index].render((32, 32)))


def test_count_does_not_change_the_clips():
    assert _description(SyntheticTubes(count=5)[4]) == _description(SyntheticTubes(count=5000)[4])


def test_seeds_and_splits_differ():
    clips = [SyntheticTubes(split, seed=seed)[0] for split in ("train", "val", "test") for seed in (0, 1)]
    assert len({_description(clip) for clip in clips}) == 6
    assert not np.array_equal(SyntheticImages()[0].render(), SyntheticTubes()[0].render(frames=[0]))


def test_benchmark_is_pinned():
    """A change here changes the published benchmark and what the shipped checkpoint was trained on."""
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        tubes = SyntheticTubes(split, seed=1)
        for index in range(12):
            clip = tubes[index]
            boxes = clip.boxes().round(4).tolist()
            digest.update(f"{clip.tier} {clip.sentence} {clip.interval_frames} {boxes}".encode())
    assert digest.hexdigest()[:16] == "d5aeb7c7708c48b2"


def test_tiers_cycle_or_follow_weights():
    cycled = SyntheticTubes(tiers=["twins", "single"])
    assert [cycled[i].tier for i in range(4)] == ["twins", "single"] * 2
    weighted = SyntheticTubes(tiers={"single": 3, "twins": 1, "distractors": 0})
    tiers = [weighted[i].tier for i in range(200)]
    assert tiers.count("distractors") == 0
    assert 0.65 < tiers.count("single") / 200 < 0.85


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"split": "dev"}, "split must be one of train, val, test, got 'dev'"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"count": 0}, "count must be at least 1"),
        ({"tiers": ["easy"]}, r"tiers must be some of .*, got \['easy'\]"),
        ({"tiers": []}, "tiers must be some of"),
        ({"tiers": {"single": 0}}, "positive sum"),
        ({"tiers": {"single": -1, "twins": 2}}, "non-negative"),
        ({"frame_count": 4}, "frame_count must be at least 5"),
        ({"fps": 0}, "fps must be positive"),
        ({"size": (8, 64)}, "size must be"),
    ],
)
def test_misuse(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        SyntheticTubes(**arguments)


def test_index_out_of_range():
    with pytest.raises(IndexError):
        SyntheticTubes(count=3)[3]
    with pytest.raises(IndexError):
        SyntheticImages(count=3)[-1]


def test_works_in_a_data_loader():
    tubes = SyntheticTubes(count=6)
    loader = DataLoader(tubes, batch_size=3, collate_fn=lambda clips: [clip.sentence for clip in clips])
    sentences = [sentence for batch in loader for sentence in batch]
    assert sentences == [tubes[i].sentence for i in range(6)]
    assert _description(pickle.loads(pickle.dumps(SyntheticTubes()))[2]) == _description(SyntheticTubes()[2])


def _lone_object(shape, center, diameter=0.27):
    return SceneObject("white", shape, (255, 255, 255), diameter, ("still",), np.array([center]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(128, 128), (96, 160), (240, 240)])
def test_box_is_the_extent_of_the_drawn_pixels(shape, size):
    rng = np.random.default_rng(0)
    background = Background(5)
    empty = render_scene([], background, size, size, [0], 4.0)[0].astype(int)
    for center in rng.uniform(0.3, 0.7, (5, 2)):
        item = _lone_object(shape, center)
        image = render_scene([item], background, size, size, [0], 4.0)[0].astype(int)
        rows, columns = np.nonzero(np.abs(image - empty).max(axis=2) > 60)
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        box = item.boxes(size)[0] * np.array([size[1], size[0]] * 2)
        np.testing.assert_allclose(drawn, box, atol=1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_area_is_the_polygon_area(shape):
    areas = {"circle": np.pi / 4, "square": 1.0, "triangle": np.sqrt(3) / 4, "cross": 1 - 0.66**2}
    size = (256, 256)
    item = _lone_object(shape, (0.5, 0.5), 0.3)
    with_object = render_scene([item], Background(2), size, size, [0], 4.0)[0].astype(float)
    share = (with_object - render_scene([], Background(2), size, size, [0], 4.0)[0]).sum()
    share /= (255 - render_scene([], Background(2), size, size, [0], 4.0)[0].astype(float)[90:166, 90:166].mean()) * 3
    expected = areas.get(shape)
    if expected is None:
        assert 0.2 < share / (0.3 * 256) ** 2 < 0.5
    else:
        assert share / (0.3 * 256) ** 2 == pytest.approx(expected, rel=0.05)


def test_small_rendering_is_the_native_one_averaged():
    clip = SyntheticTubes("train", tiers=["twins"])[4]
    native = clip.render(frames=[0, 11, 23])
    small = clip.render((64, 64), frames=[0, 11, 23])
    assert small.shape == (3, 64, 64, 3)
    assert small.dtype == np.uint8
    for one, other in zip(small, native, strict=True):
        np.testing.assert_array_equal(one, cv2.resize(other, (64, 64), interpolation=cv2.INTER_AREA))
    large = clip.render((256, 256), frames=[11])[0]
    shrunk = cv2.resize(large, (128, 128), interpolation=cv2.INTER_AREA).astype(float)
    assert np.abs(shrunk - native[1]).mean() < 4


def test_rendering_some_frames_equals_rendering_all():
    clip = SyntheticTubes()[6]
    np.testing.assert_array_equal(clip.render(frames=[20, 3, 3]), clip.render()[[20, 3, 3]])
    assert clip.render(frames=[]).shape == (0, 128, 128, 3)
    with pytest.raises(ValueError, match=r"frames must be in 0\.\.23"):
        clip.render(frames=[24])


def test_backgrounds_are_dim_and_grey():
    for seed in range(30):
        picture = procedural_background(np.random.default_rng(seed), (64, 64)).astype(int)
        assert picture.max() <= 165
        assert np.ptp(picture.reshape(-1, 3).mean(axis=0)) < 40


def test_sample_of_a_clip():
    clip = SyntheticTubes("test", size=(96, 128))[1]
    sample = clip.sample("x", "x.mp4")
    assert clip.interval_frames is not None
    start, end = clip.interval_frames
    assert (sample.width, sample.height, sample.frame_count, sample.fps) == (128, 96, 24, 4.0)
    assert (sample.task, sample.tier, sample.sentence) == ("stvg", clip.tier, clip.sentence)
    assert sample.interval == (start / 4, end / 4)
    assert sample.interval_frames == (start, end)
    assert sorted(sample.boxes) == list(range(24))
    pixels = clip.boxes() * np.array([128, 96, 128, 96])
    np.testing.assert_allclose([sample.boxes[f] for f in range(24)], pixels, atol=1e-2)
    assert sample.to_record()["boxes"]["0"] == list(sample.boxes[0])


def test_sample_of_a_picture():
    sample = SyntheticImages("val")[2].sample("p", "p.png")
    assert (sample.task, sample.interval, sample.frame_count, sample.tier) == ("referring", None, 1, "image")
    assert list(sample.boxes) == [0]


def test_real_video_plays_behind_the_objects():
    path = real_clip("carphone_pristine.mp4")
    tubes = SyntheticTubes("train", backgrounds=[path], count=4, fps=10.0)
    clip = tubes[0]
    assert clip.background.video == str(path)
    pictures = clip.render()
    assert pictures.shape == (24, 128, 128, 3)
    np.testing.assert_array_equal(clip.render(frames=[9]), pictures[[9]])
    without = render_scene([], clip.background, (128, 128), (128, 128), [0, 12], 10.0).astype(int)
    assert np.abs(without[0] - without[1]).mean() > 3
    assert without.max() < 175
    assert tubes[1].background.offset != clip.background.offset


def test_one_frame_background_and_missing_background(tmp_path):
    path = encode(tmp_path / "one.mp4", 1)
    assert SyntheticTubes(backgrounds=[path])[0].render(frames=[0, 23]).shape == (2, 128, 128, 3)
    with pytest.raises(VideoError, match="does not exist"):
        SyntheticImages(backgrounds=[tmp_path / "missing.mp4"])


def test_written_split_reads_back(tmp_path):
    seen = []
    path = write_split(tmp_path / "data", "test", 5, 1, progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "data" / "test.jsonl"
    assert seen == [(n, 5) for n in range(1, 6)]
    samples = read_samples(path)
    tubes = SyntheticTubes("test", seed=1, count=5)
    assert [sample.tier for sample in samples] == [TIERS[i % 4] for i in range(5)]
    for index, sample in enumerate(samples):
        clip = tubes[index]
        assert sample == clip.sample(sample.id, sample.video)
        info = probe(sample.video)
        assert (info.width, info.height, info.frame_count, info.fps) == (128, 128, 24, 4.0)
        error = decode_frames(info, range(24)).numpy().astype(float) - clip.render()
        assert 10 * np.log10(255**2 / np.square(error).mean()) > 28
    assert {item.name for item in (tmp_path / "data").iterdir()} == {"clips", "test.jsonl"}


def test_writing_again_gives_the_same_bytes(tmp_path):
    first, second = (write_split(tmp_path / name, "val", 2, 4, size=(64, 96), fps=8.0) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    clips = [sorted((tmp_path / name / "clips").iterdir()) for name in "ab"]
    assert [p.read_bytes() for p in clips[0]] == [p.read_bytes() for p in clips[1]]
    assert (read_samples(first)[0].width, read_samples(first)[0].height) == (96, 64)


def test_write_split_misuse(tmp_path):
    with pytest.raises(ValueError, match="size must be even"):
        write_split(tmp_path / "data", "val", 1, 0, size=(65, 64))
    assert not (tmp_path / "data").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a writable folder"):
        write_split(tmp_path / "file", "val", 1, 0)
