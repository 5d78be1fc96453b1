"""The command line as a user meets it: results on stdout, one sentence on stderr, exit codes."""

import json
import subprocess
import sys

import av
import pytest
import typer

from bridge_stg.cli.main import app
from bridge_stg.data import VOCABULARY, probe, read_samples
from bridge_stg.errors import OutputError, SampleError
from bridge_stg.models import BridgeSTGForVideoGrounding
from bridge_stg.models.tiny import tiny_config, tiny_processor


def run(*arguments):
    command = [sys.executable, "-m", "bridge_stg", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth")
    assert run("synth", folder, "--split", "test", "--count", 4, "--seed", 1).returncode == 0
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_processor(VOCABULARY)
    BridgeSTGForVideoGrounding(tiny_config(processor)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(synthetic):
    return next((synthetic / "clips").glob("*.mp4"))


def assert_one_sentence(done, code, *parts):
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr.replace("\n", " ")


def test_ground_prints_json_and_writes_everything(model, clip, tmp_path):
    out = tmp_path / "out"
    done = run("ground", clip, "the red circle that moves left", "--model", model, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "result.json").read_text())
    start, end = result["interval"]
    assert 0 <= start < end <= 6.0
    assert result["interval_source"] in ("text", "presence")
    frames = [entry["frame"] for entry in result["tube"]]
    assert frames == list(range(round(start * 4), round(start * 4) + len(frames)))
    for entry in result["tube"]:
        x1, y1, x2, y2 = entry["box"]
        assert 0 <= x1 <= x2 <= 128 and 0 <= y1 <= y2 <= 128
        assert 0 <= entry["presence"] <= 1
    source, annotated = probe(clip), probe(out / "annotated.mp4")
    assert (annotated.width, annotated.height, annotated.frame_count) == (128, 128, source.frame_count)
    assert (out / "strip.png").read_bytes()[:4] == b"\x89PNG"


def test_without_json_one_line_is_printed(model, clip):
    done = run("ground", clip, "what moves left?", "--model", model)
    assert done.returncode == 0
    assert " s to " in done.stdout and done.stdout.count("\n") == 1


def test_spatial_fps_marks_interpolated_boxes(model, clip):
    done = run("ground", clip, "what moves left?", "--model", model, "--spatial-fps", 1, "--json")
    tube = json.loads(done.stdout)["tube"]
    if len(tube) > 4:
        assert any(entry["interpolated"] for entry in tube) and not all(entry["interpolated"] for entry in tube)


def test_an_unreadable_answer_is_no_error(model, clip):
    """A random model answers gibberish; the presence curve gives the interval and the result says so."""
    done = run("ground", clip, "what moves left?", "--model", model, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["interval_source"] == "presence"
    assert "no readable interval" in done.stderr


def test_a_manifest_is_grounded_and_what_is_broken_is_listed(model, synthetic, tmp_path):
    videos = sorted((synthetic / "clips").glob("*.mp4"))
    videos.insert(1, _write(tmp_path / "empty.mp4", b""))
    records = [{"id": video.stem, "video": str(video), "sentence": "what moves left?"} for video in videos]
    manifest, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = run("ground", "--manifest", manifest, "--out", out, "--model", model, "--batch-size", 3, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["records"], summary["grounded"], summary["merged"]) == (5, 4, True)
    assert [failure["id"] for failure in summary["failed"]] == ["empty"] and "empty.mp4 is empty" in done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["id"] for record in found] == [record["id"] for record in records]
    assert [("interval" in record, "error" in record) for record in found] == [
        (record["id"] != "empty", record["id"] == "empty") for record in records
    ]
    assert_one_sentence(run("ground", "--manifest", manifest, "--model", model), 2, "Invalid value for --manifest")


def test_synth_writes_the_same_clips_for_the_same_seed(synthetic, tmp_path):
    run("synth", tmp_path, "--split", "test", "--count", 2, "--seed", 1)
    a, b = read_samples(synthetic / "test.jsonl"), read_samples(tmp_path / "test.jsonl")
    assert [s.sentence for s in a[:2]] == [s.sentence for s in b]
    assert [dict(s.boxes) for s in a[:2]] == [dict(s.boxes) for s in b]


def test_evaluate_prints_the_metrics_per_sentence_type(model, synthetic, tmp_path):
    predictions = tmp_path / "p.jsonl"
    done = run("evaluate", "--data", synthetic, "--model", model, "--json", "--floors", "--predictions", predictions)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    metrics = {"m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5", "gt_vIoU"}
    for key in ("all", "declarative", "interrogative"):
        assert metrics <= report[key].keys()
    assert {"single", "twins"} <= report["tiers"].keys()
    assert 0 < report["floors"]["best constant"]["all"]["m_tIoU"] <= 1
    assert len(predictions.read_text().splitlines()) == 4
    assert report["missing"] == report["failed"] == []


def test_evaluate_switches_the_model(model, synthetic):
    done = run("evaluate", "-d", synthetic, "-m", model, "--set", "keep=1.0", "--set", "gate=false", "--json")
    assert done.returncode == 0, done.stderr
    wrong = {
        "kep=1.0": "--set: unknown field 'kep'; the nearest is keep.",
        "gate=maybe": "--set: gate must be true or false, got 'maybe'.",
        "keep=NaN": "--set: keep must be a number > 0 and <= 1, got nan.",
        "backbone_name=x": "--set: unknown field 'backbone_name'",
    }
    for pair, message in wrong.items():
        assert_one_sentence(run("evaluate", "-d", synthetic, "-m", model, "--set", pair), 1, message)
    assert_one_sentence(run("evaluate", "-d", synthetic, "-m", model, "--set", "keep"), 2, "is not key=value")


@pytest.mark.parametrize("word", ["False", "off", "no"])
def test_a_switch_is_off_by_every_word_for_it(monkeypatch, word):
    given = {}

    def load(folder, settings):
        given.update(settings)
        raise SampleError("far enough")

    monkeypatch.setattr("bridge_stg.models.load_model", load)
    monkeypatch.setattr("bridge_stg.inference.dataset.find_samples", lambda data, split: [])
    with pytest.raises(SampleError, match="far enough"):
        _invoke("evaluate", "--data", "anywhere", "--set", f"gate={word}", "--set", "keep=1")
    assert given == {"gate": False, "keep": 1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--dataset", "d.jsonl", "--predictions", "p.jsonl", "--limit", "2"], "--limit"),
        (["evaluate", "--dataset", "d.jsonl", "--predictions", "p.jsonl", "--set", "keep=1"], "--set"),
        (["evaluate", "--dataset", "d.jsonl", "--predictions", "p.jsonl", "--floors"], "--floors"),
        (["evaluate", "--dataset", "d.jsonl", "--predictions", "p.jsonl", "-m", "m"], "--model"),
        (["evaluate", "--data", __file__, "--split", "val"], "--split"),
        (["evaluate", "--data", "d", "--limit", "0"], "--limit"),
        (["ground", "v.mp4", "red", "--batch-size", "2"], "--batch-size"),
        (["ground", "v.mp4", "red", "--spatial-fps", "nan"], "--spatial-fps"),
        (["ground", "v.mp4", "red", "--spatial-fps", "inf"], "--spatial-fps"),
        (["ground", "v.mp4", "red", "--out", ""], "--out"),
        (["ground", "", "red"], "VIDEO"),
        (["ground", "--manifest", "", "--out", "o.jsonl"], "--manifest"),
        (["train", "tiny", "--max-minutes", "nan"], "--max-minutes"),
        (["train", "tiny", "--out", ""], "--out"),
        (["train", "tiny", "--plan", "8", "--out", "runs"], "--out"),
        (["demo", "--train-seconds", "inf"], "--train-seconds"),
        (["bench", "--list", "--seconds", "nan"], "--seconds"),
        (["synth", ""], "FOLDER"),
        (["data", "convert", "a", "-f", "jsonl", "-o", ""], "--out"),
    ],
)
def test_an_option_that_would_be_ignored_or_mean_nothing_is_refused(arguments, message):
    with pytest.raises(typer.BadParameter) as caught:
        _invoke(*arguments)
    assert caught.value.exit_code == 2 and f"Invalid value for {message}" in caught.value.format_message().replace(
        "'", ""
    )


def _invoke(*arguments):
    """In this process; a failure is raised."""
    return app(args=list(arguments), standalone_mode=False)


def test_a_run_goes_to_a_folder_named_like_its_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    seen = []
    monkeypatch.setattr("bridge_stg.training.train", lambda config, folder, **options: seen.append(folder))
    for name in ("demo", "mine.yaml"):
        _invoke("train", name)
    _invoke("train", "demo", "--out", "elsewhere")
    assert list(map(str, seen)) == ["runs/demo", "runs/mine", "elsewhere"]


def test_a_manifest_goes_on_with_the_same_options_only(model, clip, tmp_path):
    manifest, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    manifest.write_text(json.dumps({"id": "[/a] [c] \x1b[31m", "video": str(clip), "sentence": "the red circle"}))
    base = ["ground", "--manifest", str(manifest), "--out", str(out), "--model", str(model)]
    _invoke(*base)
    before = out.read_bytes()
    with pytest.raises(OutputError, match=r"made with spatial_fps null, not 2\.0"):
        _invoke(*base, "--spatial-fps", "2")
    with pytest.raises(OutputError, match="made with model "):
        _invoke(*base[:-2])
    assert out.read_bytes() == before


def test_names_that_read_as_markup_are_printed_and_nothing_ends(model, tmp_path):
    manifest = tmp_path / "in[" / "a].jsonl"  # in[/a].jsonl
    manifest.parent.mkdir()
    names = ["[/a]", "[c]", "\x1b[31m", "\u202e"]
    manifest.write_text("".join(json.dumps({"id": n, "video": "[/gone].mp4", "sentence": "s"}) + "\n" for n in names))
    done = run("ground", "--manifest", manifest, "--out", tmp_path / "out[/b].jsonl", "--model", model)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout == f"0 of 4 grounded, 4 failed; written to {tmp_path}/out[/b].jsonl\n"
    lines = [line for line in done.stderr.splitlines() if line]
    assert [line.split(": ")[0] for line in lines] == ["[/a]", "[c]", r"\x1b[31m", r"\u202e", "error"]
    assert "None of the 4 records could be grounded" in lines[-1]


def test_a_sentence_that_is_no_utf_8_is_one_sentence(clip):
    command = [sys.executable, "-m", "bridge_stg", "ground", str(clip), b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert_one_sentence(done, 1, r"The sentence must be UTF-8 text, got 'caf\udce9'")


def test_an_output_that_cannot_be_is_said_before_the_model_is_loaded(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("bridge_stg.models.load_model", lambda *arguments: pytest.fail("loaded"))
    manifest = tmp_path / "in.jsonl"
    manifest.write_text(json.dumps({"id": "a", "video": str(clip), "sentence": "s"}))
    with pytest.raises(OutputError, match="is not a writable folder"):
        _invoke("ground", "--manifest", str(manifest), "--out", "/proc/none")
    with pytest.raises(OutputError, match="only a regular file is replaced"):
        _invoke("ground", "--manifest", str(manifest), "--out", "/dev/null")
    source = tmp_path / "annotated.mp4"
    source.write_bytes(clip.read_bytes())
    with pytest.raises(OutputError, match="would be replaced"):
        _invoke("ground", str(source), "s", "--out", str(tmp_path))
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "strip.png").mkdir()
    with pytest.raises(OutputError, match=r"strip\.png cannot be written: it is a folder"):
        _invoke("ground", str(clip), "s", "--out", str(tmp_path / "o"))


def test_results_are_written_together_or_not_at_all(model, clip, tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bridge_stg.visualization.draw_strip", full)
    with pytest.raises(OutputError, match=r"cannot be written: No space left on device\."):
        _invoke("ground", str(clip), "the red circle", "--model", str(model), "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


def test_a_run_in_which_nothing_could_be_grounded_has_failed(model, synthetic, tmp_path):
    samples = [json.loads(line) for line in (synthetic / "test.jsonl").read_text().splitlines()]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(s | {"video": "gone.mp4"}) + "\n" for s in samples))
    done = run("evaluate", "--data", tmp_path / "d.jsonl", "--model", model, "--json")
    assert done.returncode == 1 and "None of the 4 samples could be grounded." in done.stderr
    assert len(json.loads(done.stdout)["failed"]) == 4


def test_train_runs_from_a_configuration_with_overrides(tmp_path):
    settings = ["schedule.steps=2", "data.batch_size=1", "data.images_per_clip=1", "data.workers=0"]
    flags = [part for setting in settings for part in ("--set", setting)]
    done = run("train", "tiny", "--out", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert_one_sentence(run("train", "tiny", "--set", "schedul.steps=1"), 1, "schedul")


def test_doctor_lists_versions_backends_and_codecs():
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["versions"]["torch"]
    assert {"patchify_frames", "prune_tokens", "attend_memory"} <= {entry["op"] for entry in facts["backends"]}
    assert facts["build"] is None or facts["build"]["simd"] in ("scalar", "avx2", "avx512")
    assert facts["codecs"]["libx264 (encode)"] == "usable"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere.mp4", "nowhere.mp4"),
        (lambda p: p, "folder"),
        (lambda p: _write(p / "empty.mp4", b""), "empty"),
        (lambda p: _write(p / "text.mp4", b"not a video at all" * 20), "text.mp4"),
        (lambda p: _audio_only(p / "sound.mp4"), "no video stream"),
    ],
)
def test_unreadable_videos(model, tmp_path, make, message):
    out = tmp_path / "out"
    done = run("ground", make(tmp_path), "what moves left?", "--model", model, "--out", out, "--json")
    assert_one_sentence(done, 1, message)
    assert not out.exists()


def test_a_truncated_video(model, clip, tmp_path):
    cut = _write(tmp_path / "cut.mp4", clip.read_bytes()[: clip.stat().st_size // 2])
    assert_one_sentence(run("ground", cut, "what moves left?", "--model", model), 1, "cut.mp4")


def test_bad_sentences_models_and_folders(model, clip, tmp_path):
    assert_one_sentence(run("ground", clip, "  ", "--model", model), 1, "sentence must not be empty")
    long = "red " * 5000
    assert_one_sentence(run("ground", clip, long, "--model", model), 1, "context holds")
    assert_one_sentence(run("ground", clip, "red", "--model", tmp_path), 1, "not a model folder")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    assert_one_sentence(run("ground", clip, "red", "--model", broken), 1, "config.json cannot be read")
    file = _write(tmp_path / "file", b"")
    assert_one_sentence(run("ground", clip, "red", "--model", model, "--out", file / "out"), 1, "not a writable folder")
    assert_one_sentence(run("ground", clip), 2)
    assert_one_sentence(run("synth", tmp_path / "s", "--split", "tests"), 2, "none of train, val, test")
    assert_one_sentence(run("evaluate", "--data", tmp_path, "--model", model), 1, "test.jsonl")


def test_debug_shows_the_traceback(model, tmp_path):
    done = run("ground", tmp_path / "nowhere.mp4", "red", "--model", model, "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def _write(path, content):
    path.write_bytes(content)
    return path


def _audio_only(path):
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate = 44100
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path
