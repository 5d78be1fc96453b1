"""Datasets through a model: batches, segments, other clocks, broken videos, interruptions, many processes."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bridge_stg.cli.main import main
from bridge_stg.data import read_samples, write_samples, write_split, write_video
from bridge_stg.errors import SampleError, VideoError
from bridge_stg.evaluation import EVERY_FRAME, score_files
from bridge_stg.inference.dataset import ground_dataset, ground_samples, predict_samples
from bridge_stg.inference.fingerprints import model_fingerprint, samples_fingerprint
from bridge_stg.inference.manifest import ground_manifest
from bridge_stg.models import load_model
from bridge_stg.models.grounding import ClipPrediction
from bridge_stg.models.loading import shipped_model

CLIPS, BATCH = 12, 2


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve clips, one file of them missing and one that is no video."""
    folder = tmp_path_factory.mktemp("data")
    samples = read_samples(write_split(folder, "test", CLIPS, 5))
    (folder / "garbage.mp4").write_bytes(b"garbage" * 99)
    samples[3] = replace(samples[3], video=str(folder / "missing.mp4"))
    samples[8] = replace(samples[8], video=str(folder / "garbage.mp4"))
    write_samples(folder / "test.jsonl", samples)
    return folder / "test.jsonl"


def evaluate(data, *arguments, rank=0, world_size=1):
    """`bridge-stg evaluate` in this process, as one of several: (exit code, stdout, stderr)."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(world_size))
        patch.setattr(sys, "argv", ["bridge-stg", "evaluate", "-d", str(data), *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code, out.getvalue(), errors.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(MemoryError(), "the memory is not enough for it."), (ValueError("no box\nat all"), "ValueError: no box")],
)
def test_whatever_happens_to_a_sample_is_its_reason(model, data, monkeypatch, error, reason):
    samples = [sample for sample in read_samples(data)[:6] if "missing" not in sample.video]
    bad, predict = samples[1].sentence, model.predict

    def fails_at_one(frames, times, sentences, **options):
        if bad in sentences:
            raise error
        return predict(frames, times, sentences, **options)

    monkeypatch.setattr(model, "predict", fails_at_one)
    found = list(ground_samples(model, samples, batch_size=3))
    failed = [outcome for outcome in found if outcome.answer is None]
    assert {failure.reason for failure in failed} == {reason}
    assert {failure.id for failure in failed} == {sample.id for sample in samples if sample.sentence == bad}


def test_boxes_that_are_not_finite_are_a_reason(model, data, monkeypatch):
    sample, predict = read_samples(data)[0], model.predict

    def spoilt(*arguments, **options):
        return [replace(found, boxes=found.boxes * float("nan")) for found in predict(*arguments, **options)]

    monkeypatch.setattr(model, "predict", spoilt)
    (failure,) = ground_samples(model, [sample])
    assert failure.answer is None and "not finite" in failure.reason


def test_a_batch_gives_what_one_by_one_gives(model, data):
    samples = [sample for sample in read_samples(data)[:6] if "missing" not in sample.video]
    together = predict_samples(model, samples, batch_size=4)
    for sample, found in zip(samples, together, strict=True):
        (alone,) = predict_samples(model, [sample])
        assert found.interval == alone.interval
        assert found.boxes.keys() == alone.boxes.keys()
        for frame, box in found.boxes.items():
            assert box == pytest.approx(alone.boxes[frame], abs=0.02)


def test_what_cannot_be_grounded_is_told_and_nothing_else_is_lost(model, data):
    samples = read_samples(data)
    samples[0] = replace(samples[0], sentence="red " * 5000)
    found = list(ground_samples(model, samples, batch_size=5))
    assert [outcome.id for outcome in found] == [sample.id for sample in samples]
    failed = {outcome.id: outcome.reason for outcome in found if outcome.answer is None}
    assert all(outcome.answer is None or outcome.answer.id == outcome.id for outcome in found)
    assert list(failed) == [samples[i].id for i in (0, 3, 8)]
    assert "context holds" in failed[samples[0].id]
    assert "does not exist" in failed[samples[3].id]
    with pytest.raises(SampleError, match=r"cannot be grounded: .*missing\.mp4 does not exist"):
        predict_samples(model, samples[1:])
    with pytest.raises(SampleError, match="has no interval"):
        list(ground_samples(model, [replace(samples[1], interval=None)]))


def test_a_segment_is_grounded_alone_and_told_in_frames_of_the_video(model, data):
    sample = read_samples(data)[1]
    whole = predict_samples(model, [sample])[0]
    start, end = 4, 20
    event = (max(sample.interval[0], start / sample.fps), min(sample.interval[1], end / sample.fps))
    (part,) = predict_samples(model, [replace(sample, segment=(start, end), interval=event)])
    assert start <= part.interval[0] < part.interval[1] <= end
    assert set(part.boxes) == set(range(*part.interval))
    assert set(part.oracle_boxes) == set(range(round(event[0] * sample.fps), round(event[1] * sample.fps)))
    assert part != whole


def test_a_prediction_counts_frames_and_pixels_as_the_annotation_does(model, data):
    sample = read_samples(data)[1]
    (plain,) = predict_samples(model, [sample])
    boxes = {2 * f: tuple(2 * side for side in box) for f, box in sample.boxes.items()}
    doubled = replace(
        sample, fps=2 * sample.fps, frame_count=2 * sample.frame_count, width=256, height=256, boxes=boxes
    )
    (found,) = predict_samples(model, [doubled])
    assert found.interval == (2 * plain.interval[0], 2 * plain.interval[1])
    for frame, box in plain.boxes.items():
        assert found.boxes[2 * frame] == pytest.approx([2 * side for side in box], abs=1e-3)


def test_a_segment_of_a_video_with_another_rate(model, data):
    """The annotation counts 7.5 frames a second, the video 4; the segment begins and ends between decoded frames."""
    sample = read_samples(data)[2]
    seconds = sample.frame_count / sample.fps
    start, end = 9, 38
    odd = replace(
        sample,
        fps=7.5,
        frame_count=round(7.5 * seconds),
        segment=(start, end),
        interval=(2.0, 4.0),
        boxes=dict.fromkeys(range(15, 30), (10.0, 10.0, 50.0, 50.0)),
    )
    (found,) = predict_samples(model, [odd])
    assert start <= found.interval[0] < found.interval[1] <= end
    assert set(found.boxes) == set(range(*found.interval))
    assert set(found.oracle_boxes) == set(range(15, 30))


def test_boxes_are_taken_from_the_decoded_frame_of_their_time(model, data, monkeypatch):
    """A model that answers with the time itself: 2 s to 4 s, and a box whose left side is seconds of the video."""
    sample = read_samples(data)[2]

    def predict(frames, times, sentences, *, durations, oracle_intervals):
        given.append((times[0], durations[0], oracle_intervals[0]))
        chosen = np.arange(len(times[0]))
        boxes = np.stack([[(second + begin) / 10, 0, 1, 1] for second in times[0]])
        return [
            ClipPrediction("", (2 - begin, 4 - begin), "presence", chosen, chosen, boxes, [], (1, 1), chosen, boxes)
        ]

    monkeypatch.setattr(model, "predict", predict, raising=False)
    for begin, segment in ((0.0, None), (1.25, (10, 40))):
        given = []
        annotated = replace(sample, fps=8.0, frame_count=48, width=100, segment=segment, interval=(2.0, 4.0), boxes={})
        (found,) = predict_samples(model, [annotated])
        ((times, duration, truth),) = given
        assert times[0] == 0 and times[-1] < duration == pytest.approx(6 if segment is None else 3.75)
        assert truth == pytest.approx((2 - begin, 4 - begin))
        assert found.interval == (16, 32)
        for frame, box in found.boxes.items():
            assert box == pytest.approx((100 * frame / 8 / 10, 0, 100, sample.height), abs=1e-6)
        assert found.boxes == found.oracle_boxes


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The predictions of a run that nothing interrupts, its report, and what it says on stderr."""
    out = tmp_path_factory.mktemp("whole") / "p.jsonl"
    code, report, errors = evaluate(data, "--predictions", out, "--batch-size", BATCH)
    assert code == 0, errors
    return out, json.loads(report), errors


def test_failures_score_0_and_are_listed(whole, data):
    out, report, errors = whole
    samples = read_samples(data)
    ids = [sample.id for sample in samples]
    assert report["missing"] == [ids[3], ids[8]]
    assert [entry["id"] for entry in report["failed"]] == [ids[3], ids[8]]
    assert "does not exist" in report["failed"][0]["reason"] and "missing.mp4 does not exist" in errors
    assert report["all"]["count"] == CLIPS
    assert [entry["id"] for entry in lines(out)] == [name for name in ids if name not in report["missing"]]
    assert lines(out.with_name("p.jsonl.failed")) == [
        {"id": entry["id"], "error": entry["reason"]} for entry in report["failed"]
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == ["p.jsonl", "p.jsonl.failed", "p.jsonl.run"]
    again = score_files(data, out, EVERY_FRAME)
    assert again["missing"] == report["missing"]
    assert again["all"]["m_vIoU"] == pytest.approx(report["all"]["m_vIoU"], abs=1e-9)


def test_without_a_file_the_report_is_the_same(whole, data):
    code, report, _ = evaluate(data, "--batch-size", BATCH)
    assert code == 0 and json.loads(report) == whole[1]


def test_killed_and_resumed_it_is_the_same_file(whole, data, tmp_path):
    out = tmp_path / "p.jsonl"
    command = [sys.executable, "-m", "bridge_stg", "evaluate", "-d", data, "--predictions", out]
    running = subprocess.Popen([*command, "--batch-size", str(BATCH)], stderr=subprocess.DEVNULL)
    part = tmp_path / "p.jsonl.parts" / "0-of-1.jsonl"
    while not (part.exists() and part.read_bytes().count(b"\n") >= 2):
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not out.exists()
    # In the middle of a line and of a batch, wherever the signal came.
    part.write_bytes(b"\n".join(part.read_bytes().split(b"\n")[:3])[:-9])
    code, report, errors = evaluate(data, "--predictions", out, "--batch-size", BATCH)
    assert code == 0, errors
    for name in ("p.jsonl", "p.jsonl.failed", "p.jsonl.run"):
        assert (tmp_path / name).read_bytes() == whole[0].with_name(name).read_bytes()
    assert json.loads(report) == whole[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.failed", "p.jsonl.run"]


def test_processes_share_the_work_and_the_last_one_scores(whole, data, tmp_path):
    arguments = (data, "--predictions", tmp_path / "p.jsonl", "--batch-size", BATCH)
    code, report, errors = evaluate(*arguments, rank=1, world_size=2)
    assert (code, report) == (0, "") and "This process is done; the last one scores." in errors
    code, report, _ = evaluate(*arguments, rank=0, world_size=2)
    assert code == 0 and json.loads(report) == whole[1]
    again = [evaluate(*arguments, rank=rank, world_size=2)[1] for rank in (1, 0)]
    assert again == ["", report]
    assert (tmp_path / "p.jsonl").read_bytes() == whole[0].read_bytes()


def test_several_processes_need_a_file(data):
    code, _, errors = evaluate(data, world_size=2)
    assert code == 1
    assert errors.strip() == "error: 2 processes share an evaluation through a file: name it with --predictions."


def test_other_numbers_of_processes_go_on_with_it(whole, data, model, tmp_path):
    samples, out, made = read_samples(data), tmp_path / "p.jsonl", {"model": "m"}
    for rank, world_size in ((0, 2), (2, 3), (0, 3)):
        options = {"batch_size": BATCH, "rank": rank, "world_size": world_size}
        assert ground_dataset(model, samples, out, made_with=made, **options) is None
    found = ground_dataset(model, samples, out, made_with=made, batch_size=BATCH, rank=1, world_size=3)
    assert [result.id for result in found] == [sample.id for sample in samples]
    assert out.read_bytes() == whole[0].read_bytes()


def test_predictions_of_another_model_settings_or_data_are_not_mixed_in(data, model, tmp_path):
    out, kept = tmp_path / "p.jsonl", ("--predictions", tmp_path / "p.jsonl", "--limit", 2)
    assert evaluate(data, *kept)[0] == 0
    before = out.read_bytes()
    model.save_pretrained(tmp_path / "other")
    model.processor.save_pretrained(tmp_path / "other")
    weights = {name: 0.999 * tensor for name, tensor in load_file(tmp_path / "other" / "model.safetensors").items()}
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    samples = read_samples(data)
    samples[5] = replace(samples[5], sentence="what moves left?")
    write_samples(tmp_path / "data.jsonl", samples)
    for source, arguments, what in (
        (data, ("-m", tmp_path / "other"), r'model "\w+", not "\w+"'),
        (data, ("--set", "keep=1.0"), r'settings {}, not {"keep": 1.0}'),
        (tmp_path / "data.jsonl", (), r'data "\w+", not "\w+"'),
    ):
        code, report, errors = evaluate(source, *kept, *arguments)
        assert (code, report) == (1, "")
        assert re.search(
            rf"error: {out} is made with {what}; name another file, or remove {out} and {out}\.parts to begin again\.$",
            " ".join(errors.split()),
        )
    assert out.read_bytes() == before
    assert evaluate(data, "--predictions", out, "--limit", 3)[0] == 0  # the same, and more of it


def test_what_failed_is_tried_again_when_its_list_is_removed(whole, data, model, tmp_path):
    samples, out = read_samples(data)[:5], tmp_path / "p.jsonl"
    ground_dataset(model, samples, out, made_with={}, batch_size=BATCH)
    good = replace(samples[3], video=samples[2].video)
    repaired = [*samples[:3], good, samples[4]]
    assert ground_dataset(model, repaired, out, made_with={}, batch_size=BATCH)[3].answer is None
    out.with_name("p.jsonl.failed").unlink()
    found = ground_dataset(model, repaired, out, made_with={}, batch_size=BATCH)
    assert [result.id for result in found] == [sample.id for sample in samples]
    assert all(outcome.answer is not None for outcome in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.run"]


def test_a_video_of_a_shape_that_no_model_takes_is_a_failure(model, data, tmp_path):
    write_video(tmp_path / "bar.mp4", np.zeros((8, 2, 2048, 3), np.uint8), fps=4)
    sample = replace(read_samples(data)[1], video=str(tmp_path / "bar.mp4"))
    (found,) = ground_samples(model, [sample])
    assert found.answer is None
    assert found.reason.endswith("has frames of 2048 x 2 pixels; one side may be at most 200 times the other.")
    with pytest.raises(VideoError, match="2048 x 2 pixels"):
        model.ground(tmp_path / "bar.mp4", "what moves left?")


def test_a_manifest_gives_the_same_in_batches(model, data, tmp_path):
    records = [{"id": s.id, "video": s.video, "sentence": s.sentence} for s in read_samples(data)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for size in (1, 5):
        summary = ground_manifest(
            model.ground_batch, tmp_path / "in.jsonl", tmp_path / f"{size}.jsonl", batch_size=size
        )
        assert (summary.grounded, list(summary.failed)) == (CLIPS - 2, [records[3]["id"], records[8]["id"]])
    for one, many in zip(lines(tmp_path / "1.jsonl"), lines(tmp_path / "5.jsonl"), strict=True):
        assert one.get("error") == many.get("error") and one.get("interval") == many.get("interval")
        for a, b in zip(one.get("tube", ()), many.get("tube", ()), strict=True):
            assert a["frame"] == b["frame"] and a["box"] == pytest.approx(b["box"], abs=0.02)


def test_fingerprints_are_of_weights_and_of_what_samples_ask(model, data, tmp_path):
    model.save_pretrained(tmp_path)
    before = model_fingerprint(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    assert before == model_fingerprint(tmp_path) != model_fingerprint(shipped_model())
    weights = load_file(tmp_path / "model.safetensors")
    name = min(weights, key=lambda name: weights[name].numel())
    save_file(weights | {name: weights[name] + 1}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(tmp_path) != before
    samples = read_samples(data)
    moved = [replace(sample, video="elsewhere.mp4", boxes={}) for sample in samples]
    assert samples_fingerprint(moved) == samples_fingerprint(samples) != samples_fingerprint(samples[1:])
    later = replace(samples[0], interval=(0.25, 0.5))
    assert samples_fingerprint([later, *samples[1:]]) != samples_fingerprint(samples)
