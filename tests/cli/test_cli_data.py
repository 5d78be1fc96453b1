"""`bridge-stg data` and `bridge-stg evaluate --dataset` as a user meets them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bridge_stg.cli.main import app, main
from bridge_stg.data import GroundingSample, read_samples
from bridge_stg.errors import SampleError

from ..data.media import encode
from ..data.readers.published import hcstvg_record, moving, vidor_video, vidstg_record, write_json


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, SampleError):
        raise done.exception
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture
def vidstg(tmp_path):
    write_json(tmp_path / "vidor" / "7771650716.json", vidor_video({0: moving(range(50)), 1: moving(range(50))}))
    return write_json(tmp_path / "test_annotations.json", [vidstg_record()])


def test_check_ends_with_0_or_1(vidstg, tmp_path):
    report = json.loads(run("data", "check", vidstg, "--format", "vidstg", "--json").stdout)
    assert report["ok"] and report["counts"]["samples"] == 3 and not report["videos_checked"]
    (tmp_path / "videos").mkdir()
    done = run("data", "check", vidstg, "-f", "vidstg", "--videos", tmp_path / "videos", "--json", code=1)
    report = json.loads(done.stdout)
    assert not report["ok"] and report["missing_videos"][0]["samples"] == 3
    text = run("data", "check", vidstg, "-f", "vidstg", "--videos", tmp_path / "videos", code=1).stdout
    assert "missing videos: 1" in text and "samples 3" in text
    assert "'vidst' is none of vidstg" in run("data", "check", vidstg, "-f", "vidst", code=2).stderr.replace("\n", " ")


def test_a_truncated_file_is_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text('[{"vid": ')
    with pytest.raises(SampleError, match=r"a\.json cannot be read as VidSTG annotations: Expecting"):
        run("data", "check", tmp_path / "a.json", "-f", "vidstg")


def test_stats_prints_and_draws(vidstg, tmp_path):
    out = tmp_path / "stats.png"
    done = run("data", "stats", vidstg, "-f", "vidstg", "--boxes", tmp_path / "vidor", "--out", out, "--json")
    report = json.loads(done.stdout)
    assert report["counts"]["interrogative"] == 2 and report["measures"]["event_seconds"]["mean"] == 0.4
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert "length of the event" in run("data", "stats", vidstg, "-f", "vidstg").stdout
    run("data", "stats", vidstg, "-f", "vidstg", "--out", "s.txt", code=2)


def test_convert_writes_what_evaluate_scores(vidstg, tmp_path):
    out, answers = tmp_path / "out" / "vidstg.jsonl", tmp_path / "p.jsonl"
    run("data", "convert", vidstg, "-f", "vidstg", "--boxes", tmp_path / "vidor", "--out", out)
    samples = read_samples(out)
    assert [len(s.boxes) for s in samples] == [10, 10, 10]
    assert samples[0].video == str(out.parent / "1001" / "7771650716.mp4")
    answers.write_text(
        "".join(
            json.dumps({"id": s.id, "interval": [15, 25], "boxes": {f: list(b) for f, b in s.boxes.items()}}) + "\n"
            for s in samples[:2]
        )
    )
    done = run("evaluate", "--dataset", out, "--predictions", answers, "--protocol", "tubedetr", "--json")
    report = json.loads(done.stdout)
    assert report["declarative"]["m_vIoU"] == 1.0 and report["interrogative"]["m_vIoU"] == 0.5
    assert report["missing"] == [samples[2].id]
    assert "1 samples have no prediction and score 0." in done.stderr
    assert "interrogative" in run("evaluate", "--dataset", out, "--predictions", answers).stdout


def test_convert_lists_what_it_leaves_out(tmp_path):
    source = write_json(tmp_path / "t.json", {"a.mp4": hcstvg_record(), "b.mp4": hcstvg_record(st_frame=0)})
    done = run("data", "convert", source, "-f", "hcstvg-v1", "--out", tmp_path / "o.jsonl", "--json")
    summary = json.loads(done.stdout)
    assert summary["written"] == 1 and summary["skipped"][0]["id"] == "b.mp4"
    assert "b.mp4: st_frame" in done.stderr
    run("data", "convert", source, "-f", "hcstvg-v1", "--out", tmp_path / "s.jsonl", "--convention", "stcat")
    assert read_samples(tmp_path / "s.jsonl")[0].interval_frames == (60, 109)
    run("data", "convert", source, "-f", "hcstvg-v1", "--out", tmp_path / "s.jsonl", "--convention", "mine", code=2)


def test_convert_aligns_to_the_decoded_videos(tmp_path):
    (tmp_path / "videos").mkdir()
    encode(tmp_path / "videos" / "a.mp4", 60)
    record = hcstvg_record(img_num=600, st_frame=13, bbox=[[0, 0, 70, 48]] * 12, st_time=0.4, ed_time=0.8)
    source = write_json(tmp_path / "t.json", {"a.mp4": record, "gone.mp4": record})
    out = tmp_path / "o.jsonl"
    done = run("data", "convert", source, "-f", "hcstvg-v1", "--videos", tmp_path / "videos", "--align", "--out", out)
    assert "gone.mp4" in done.stderr
    (sample,) = read_samples(out)
    assert (sample.fps, sample.frame_count, sample.width) == (25.0, 60, 96)
    assert sample.interval_frames == (10, 20) and list(sample.boxes) == list(range(10, 20))
    run("data", "convert", source, "-f", "hcstvg-v1", "--align", "--out", out, code=2)


def test_evaluate_wants_one_source(tmp_path):
    for arguments in (
        ["evaluate"],
        ["evaluate", "--data", tmp_path, "--dataset", tmp_path],
        ["evaluate", "--dataset", tmp_path],
        ["evaluate", "--dataset", tmp_path, "--predictions", tmp_path, "--protocol", "mine"],
    ):
        run(*arguments, code=2)


def test_an_error_with_brackets_is_printed_as_it_is(tmp_path, monkeypatch, capsys):
    """Brackets are no markup."""
    answers = tmp_path / "p.jsonl"
    answers.write_text('{"id": "a", "interval": [1, 2], "boxes": {"3": [1, 2]}}')
    (tmp_path / "d.jsonl").write_text(json.dumps(GroundingSample("a", "v.mp4", "x", 9, 9, 5.0, 9).to_record()))
    arguments = ["evaluate", "--dataset", str(tmp_path / "d.jsonl"), "--predictions", str(answers)]
    monkeypatch.setattr("sys.argv", ["bridge-stg", *arguments])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "four numbers [x1, y1, x2, y2] a frame, got [1, 2] in frame 3." in capsys.readouterr().err
