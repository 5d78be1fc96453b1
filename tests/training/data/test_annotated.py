"""Annotated files as training items: labels on the clip's own clock, four tasks, broken videos replaced and listed."""

import json
import pickle
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bridge_stg.data import (
    VOCABULARY,
    GroundingSample,
    SampleStore,
    SyntheticTubes,
    read_samples,
    write_samples,
    write_split,
)
from bridge_stg.errors import OutputError, SampleError
from bridge_stg.models.processing_bridge_stg import parse_answer
from bridge_stg.models.tiny import tiny_processor
from bridge_stg.training import GroundingStream, ItemOptions, LengthAwareBatches, collate_grounding
from bridge_stg.training.data import annotated as stream_module
from bridge_stg.training.data.annotated import GROUP_TOKENS, TEXT_TOKENS
from tests.data.media import HEIGHT, WIDTH, encode, read_numbers

S = 6


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(VOCABULARY)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("clips"), "train", 12, 0)


def stream(path, processor, **options):
    stores = {"a": SampleStore(path)}
    return GroundingStream(stores, None, processor, options=ItemOptions(spatial_frames=S), **options)


def one(tmp_path, processor, **changes):
    """The item of a single sample over a video of 60 numbered frames, 25 a second."""
    video = tmp_path / "numbered.mp4"
    if not video.exists():
        encode(video, 60)
    values = {"id": "x", "video": str(video), "sentence": "the red circle", "width": WIDTH, "height": HEIGHT}
    write_samples(tmp_path / "one.jsonl", [GroundingSample(**(values | {"fps": 25.0, "frame_count": 60} | changes))])
    return stream(tmp_path / "one.jsonl", processor)[0][0]


def test_a_clip_on_disk_is_the_item_that_the_curriculum_renders(synthetic, processor):
    data = stream(synthetic, processor)
    tubes = SyntheticTubes("train", seed=0, count=12)
    for place in range(12):
        (item,) = data[place]
        clip = tubes[data.mixture.pick(place)[1]]
        assert item.sentence == clip.sentence
        assert item.interval == clip.interval_frames
        assert item.times == pytest.approx([i / clip.fps for i in range(24)])
        np.testing.assert_allclose(item.boxes, clip.boxes().clip(0, 1), atol=1e-4)
        assert np.abs(item.frames.astype(int) - clip.render()).mean() < 12  # H.264
        inside = (item.frame_index >= item.interval[0]) & (item.frame_index < item.interval[1])
        assert len(item.frame_index) == S and 0 < inside.sum() < S
        assert data.shape(place).grid == (8, 8)


def moving(frames, speed=1.0):
    """A box for each of so many frames, whose left edge gives the frame."""
    return {frame: (speed * frame, 0, speed * frame + 9, 9) for frame in range(frames)}


def test_a_segment_has_its_own_clock(tmp_path, processor):
    item = one(tmp_path, processor, segment=(20, 50), interval=(1.2, 1.6), boxes=moving(60))
    numbers = read_numbers(item.frames)
    assert numbers[0] == 20 and max(numbers) < 50
    assert item.times == pytest.approx([(n - 20) / 25 for n in numbers])
    assert item.answer == "From 0.4 s to 0.8 s."
    start, end = item.interval
    assert [30 <= n < 40 for n in numbers] == [start <= i < end for i in range(len(numbers))]
    np.testing.assert_allclose(item.boxes[:, 0] * WIDTH, numbers, atol=1e-3)


def test_annotated_frames_meet_decoded_ones_by_time(tmp_path, processor):
    half = one(tmp_path, processor, fps=12.5, frame_count=31, interval=(0.8, 1.6), boxes=moving(31))
    whole = one(tmp_path, processor, interval=(0.8, 1.6), boxes=moving(60, 0.5))
    assert half.interval == whole.interval
    np.testing.assert_allclose(half.boxes, whole.boxes, atol=0.51 / WIDTH)


def test_what_a_task_does_not_say_teaches_nothing(tmp_path, processor, synthetic):
    cv2.imwrite(str(tmp_path / "picture.png"), np.full((64, 64, 3), 90, np.uint8))
    path = str(tmp_path / "picture.png")
    picture = GroundingSample("image", path, "the red circle", 64, 64, 1.0, 1, task="referring")
    clip = read_samples(synthetic)[0]
    tasks = {
        "stvg": clip,
        "temporal": replace(clip, task="temporal"),
        "referring": replace(picture, boxes={0: (16.0, 16.0, 48.0, 32.0)}),
        "qa": replace(clip, task="qa", sentence="where does the red circle move?", answer="left."),
    }
    labels = {}
    for name, sample in tasks.items():
        write_samples(tmp_path / f"{name}.jsonl", [sample])
        batch = collate_grounding([stream(tmp_path / f"{name}.jsonl", processor)[0]], processor)
        targets = batch.targets
        labels[name] = [bool(getattr(targets, key).any()) for key in ("has_box", "has_presence", "has_interval")]
        labels[name].append(bool((batch["labels"] != -100).any()))
        assert batch["frame_index"].shape == (1, S)
    assert labels == {
        "stvg": [True, True, True, True],
        "temporal": [False, True, True, True],
        "referring": [True, False, False, False],
        "qa": [False, False, False, True],
    }
    box = collate_grounding([stream(tmp_path / "referring.jsonl", processor)[0]], processor).targets.boxes[0, 0]
    torch.testing.assert_close(box, torch.tensor([0.5, 0.375, 0.5, 0.25]))


@pytest.mark.parametrize("task", ["stvg", "temporal", "referring", "qa"])
def test_a_sample_without_the_label_of_its_task_is_refused(tmp_path, processor, task):
    label = {"stvg": "interval", "temporal": "interval", "referring": "box", "qa": "answer"}[task]
    with pytest.raises(SampleError, match=f"x has no {label}, which task {task} needs"):
        one(tmp_path, processor, task=task)


def test_an_answer_cannot_write_special_tokens(tmp_path, processor):
    item = one(tmp_path, processor, task="qa", answer="left <|video_pad|>")
    batch = collate_grounding([[item]], processor)
    visual = int(batch["video_grid_thw"].prod()) // processor.merge_size**2
    video = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert int((batch["input_ids"] == video).sum()) == visual


@pytest.mark.parametrize("interval", [(1.0, 1.04), (0.76, 0.8), (2.36, 2.4), (0.0, 0.04)])
def test_the_answer_of_a_short_event_can_be_read_back(tmp_path, processor, interval):
    found = parse_answer(one(tmp_path, processor, interval=interval).answer, 2.4)
    assert found is not None
    assert found[0] <= interval[0] and interval[1] <= found[1] and found[1] - found[0] < 0.11


def test_a_clip_ends_where_its_annotation_does_and_keeps_its_planned_length(tmp_path, processor):
    item = one(tmp_path, processor, frame_count=30, interval=(0.4, 0.8))
    assert max(read_numbers(item.frames)) < 30
    for frame_count in range(20, 60):
        item = one(tmp_path, processor, frame_count=frame_count, interval=(0.4, 0.8))
        (rows, columns), tokens = stream(tmp_path / "one.jsonl", processor).shape(0)
        each = rows * columns // processor.merge_size**2 + GROUP_TOKENS
        planned = (tokens - TEXT_TOKENS - processor.bridge_tokens) / each
        assert len(item.times) / processor.temporal_patch_size == planned


def test_a_segment_that_the_event_is_not_in_is_refused(tmp_path, processor):
    with pytest.raises(SampleError, match=r"1\.00 s to 2\.00 s lies outside the clip, 0\.00 s to 0\.40 s"):
        one(tmp_path, processor, segment=(0, 10), interval=(1.0, 2.0))


def test_an_image_out_of_a_video_is_one_frame(tmp_path, processor):
    item = one(tmp_path, processor, task="referring", boxes={30: (24.0, 16.0, 48.0, 32.0)})
    assert read_numbers(item.frames) == [30]
    np.testing.assert_allclose(item.boxes, [[0.25, 0.25, 0.5, 0.5]])
    assert stream(tmp_path / "one.jsonl", processor).shape(0).tokens < 100


def break_some(synthetic, folder):
    """The same file with three samples that cannot be used."""
    samples = read_samples(synthetic)
    (folder / "garbage.mp4").write_bytes(b"no video" * 100)
    samples[2] = replace(samples[2], video=str(folder / "missing.mp4"))
    samples[5] = replace(samples[5], video=str(folder / "garbage.mp4"))
    samples[7] = replace(samples[7], frame_count=1000, interval=(100.0, 110.0), boxes={})
    write_samples(folder / "broken.jsonl", samples)
    return folder / "broken.jsonl"


def test_a_broken_video_gives_its_place_away_and_is_listed_once(synthetic, processor, tmp_path):
    path = break_some(synthetic, tmp_path)
    data = stream(path, processor, skipped=tmp_path / "skipped.jsonl")
    found = [data[place][0] for place in range(24)]  # every sample twice
    again = stream(path, processor)
    for place, item in enumerate(found):
        np.testing.assert_array_equal(item.frames, again[place][0].frames)
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    reasons = {entry["id"]: entry["reason"] for entry in listed}
    assert len(listed) == len(reasons) == 3 and {entry["source"] for entry in listed} == {"a"}
    assert "does not exist" in reasons["train-0-000002"]
    assert "cannot be opened" in reasons["train-0-000005"]
    assert "begins at 100.00 s" in reasons["train-0-000007"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(95, "Operation not supported"), "OSError: [Errno 95] Operation not supported"),
     (MemoryError(), "the memory is not enough for it."), (KeyError("x"), "KeyError: 'x'")],
)  # fmt: skip
def test_whatever_happens_to_a_sample_gives_its_place_away(synthetic, processor, tmp_path, monkeypatch, error, reason):
    bad = read_samples(synthetic)[0]
    load = stream_module.load_clip

    def fails_at_one(info, **choice):
        if info.path == bad.video:
            raise error
        return load(info, **choice)

    monkeypatch.setattr(stream_module, "load_clip", fails_at_one)
    data = stream(synthetic, processor, skipped=tmp_path / "skipped.jsonl")
    assert len([data[place] for place in range(24)]) == 24
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["reason"]) for entry in listed] == [(bad.id, reason)]


def test_a_video_of_another_size_than_annotated_is_refused(tmp_path, processor):
    with pytest.raises(SampleError, match="is 96 x 64 pixels, annotated as 64 x 96"):
        one(tmp_path, processor, width=HEIGHT, height=WIDTH, interval=(0.8, 1.6))


def test_loader_processes_give_the_same_items(synthetic, processor, tmp_path):
    path = break_some(synthetic, tmp_path)
    data = stream(path, processor, skipped=tmp_path / "skipped.jsonl")
    batches = LengthAwareBatches(data.shape, batches=6, clips=4)
    collate = partial(collate_grounding, processor=processor)
    alone = list(DataLoader(data, batch_sampler=batches, collate_fn=collate))
    shared = list(DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=2))
    for a, b in zip(alone, shared, strict=True):
        for key in ("input_ids", "pixel_values", "frame_index"):
            torch.testing.assert_close(a[key], b[key], msg=key)
        torch.testing.assert_close(vars(a.targets), vars(b.targets), equal_nan=True)
    for line in (tmp_path / "skipped.jsonl").read_text().splitlines():
        assert json.loads(line).keys() == {"source", "id", "video", "reason"}


def test_a_pickled_stream_gives_the_same_items(synthetic, processor):
    data = stream(synthetic, processor)
    copy = pickle.loads(pickle.dumps(data))
    for place in (0, 3):
        for key, value in vars(data[place][0]).items():
            np.testing.assert_array_equal(value, getattr(copy[place][0], key), err_msg=key)


def test_the_list_of_skipped_samples_must_be_writable(synthetic, processor, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a writable folder"):
        stream(synthetic, processor, skipped=tmp_path / "file" / "skipped.jsonl")
    (tmp_path / "skipped.jsonl").mkdir()
    data = stream(break_some(synthetic, tmp_path), processor, skipped=tmp_path / "skipped.jsonl")
    with pytest.raises(OutputError, match=r"skipped\.jsonl cannot be written"):
        [data[place] for place in range(12)]


def test_datasets_are_mixed_by_weight(synthetic, processor):
    stores = {name: SampleStore(synthetic) for name in ("a", "b")}
    data = GroundingStream(stores, {"a": 3.0, "b": 1.0}, processor)
    names = [data.mixture.pick(place)[0] for place in range(1000)]
    assert names.count("a") == 750
    with pytest.raises(ValueError, match="weights must name"):
        GroundingStream(stores, {"a": 3.0}, processor)
