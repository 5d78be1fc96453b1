"""Datasets through a model: batches, segments, other clocks, broken videos, interruptions, many processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from bridge_stg.cli import main
from bridge_stg.data import read_samples, write_samples, write_split
from bridge_stg.errors import OutputError, SampleError
from bridge_stg.inference import Failure, fingerprint, ground_dataset, ground_samples, predict_samples
from bridge_stg.models import load_model
from bridge_stg.models.loading import shipped_model

CLIPS = 12


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


def evaluate(data, out, *arguments, env=None, **options):
    command = [sys.executable, "-m", "bridge_stg", "evaluate", "-d", str(data), "--predictions", str(out), "--json"]
    return subprocess.run(
        [*command, "--batch-size", "1", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        **options,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    assert [result.id for result in found] == [sample.id for sample in samples]
    failed = {result.id: result.reason for result in found if isinstance(result, Failure)}
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


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The predictions of a run that nothing interrupts, and its report."""
    out = tmp_path_factory.mktemp("whole") / "p.jsonl"
    done = evaluate(data, out)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


def test_failures_score_0_and_are_listed(whole, data):
    out, report, errors = whole
    ids = [sample.id for sample in read_samples(data)]
    assert report["missing"] == [ids[3], ids[8]]
    assert [entry["id"] for entry in report["failed"]] == [ids[3], ids[8]]
    assert "does not exist" in report["failed"][0]["reason"] and "missing.mp4 does not exist" in errors
    assert report["all"]["count"] == CLIPS
    assert [entry["id"] for entry in lines(out)] == [name for name in ids if name not in report["missing"]]
    assert sorted(path.name for path in out.parent.iterdir()) == ["p.jsonl", "p.jsonl.failed", "p.jsonl.run"]
    scored = subprocess.run(
        [sys.executable, "-m", "bridge_stg", "evaluate", "--dataset", data, "--predictions", out, "--json"],
        capture_output=True,
        text=True,
    )
    again = json.loads(scored.stdout)
    assert again["missing"] == report["missing"]
    assert again["all"]["m_vIoU"] == pytest.approx(report["all"]["m_vIoU"], abs=1e-9)


def test_killed_and_resumed_it_is_the_same_file(whole, data, tmp_path):
    out = tmp_path / "p.jsonl"
    command = [sys.executable, "-m", "bridge_stg", "evaluate", "-d", data, "--predictions", out, "--batch-size", "1"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    part = tmp_path / "p.jsonl.parts" / "0-of-1.jsonl"
    while not (part.exists() and part.read_bytes().count(b"\n") >= 2):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    written = part.read_bytes()
    assert not out.exists()
    part.write_bytes(written + b'{"id": "test-5-0')  # as if cut off in the middle of a line
    done = evaluate(data, out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole[0].read_bytes()
    assert json.loads(done.stdout) == whole[1]


def run_here(capsys, monkeypatch, rank, world_size, *arguments):
    """`bridge-stg evaluate` in this process, as one of several: (stdout, stderr)."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr(sys, "argv", ["bridge-stg", "evaluate", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr()


def test_processes_share_the_work_and_the_last_one_scores(whole, data, tmp_path, capsys, monkeypatch):
    arguments = ("-d", data, "--predictions", tmp_path / "p.jsonl", "--batch-size", 1)
    first, errors = run_here(capsys, monkeypatch, 1, 2, *arguments)
    assert first == "" and "not done yet" in errors
    last, _ = run_here(capsys, monkeypatch, 0, 2, *arguments)
    assert json.loads(last) == whole[1]
    assert (tmp_path / "p.jsonl").read_bytes() == whole[0].read_bytes()


def test_several_processes_need_a_file(data, capsys, monkeypatch):
    _, errors = run_here(capsys, monkeypatch, 0, 2, "-d", data)
    assert errors.strip() == "error: 2 processes share an evaluation through a file: name it with --predictions."


def test_other_numbers_of_processes_go_on_with_it(whole, data, model, tmp_path):
    samples, out, made = read_samples(data), tmp_path / "p.jsonl", {"model": "m"}
    assert ground_dataset(model, samples, out, made_with=made, batch_size=1, rank=0, world_size=3) is None
    assert ground_dataset(model, samples, out, made_with=made, batch_size=1, rank=1, world_size=2) is None
    found = ground_dataset(model, samples, out, made_with=made, batch_size=1)
    assert [result.id for result in found] == [sample.id for sample in samples]
    assert out.read_bytes() == whole[0].read_bytes()


def test_predictions_of_another_model_are_not_mixed_in(model, data, tmp_path):
    samples, out = read_samples(data)[:1], tmp_path / "p.jsonl"
    ground_dataset(model, samples, out, made_with={"model": "a", "settings": {}})
    with pytest.raises(OutputError, match=r"p\.jsonl holds results of another model \(a, not b\); name another file"):
        ground_dataset(model, samples, out, made_with={"model": "b", "settings": {}})
    with pytest.raises(OutputError, match="another settings"):
        ground_dataset(model, samples, out, made_with={"model": "a", "settings": {"keep": 1.0}})
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match=r"other\.jsonl exists, and no other\.jsonl\.run says what made it"):
        ground_dataset(model, samples, tmp_path / "other.jsonl", made_with={"model": "a"})


def test_a_fingerprint_is_of_the_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = fingerprint(tmp_path)
    assert before == fingerprint(tmp_path) != fingerprint(shipped_model())
    weights = {name: 0.999 * tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(tmp_path) != before
