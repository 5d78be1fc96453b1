"""`ground` and the file it reads: which stream, whose clock, and that it survives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from bridge_stg.cli import demo
from bridge_stg.cli.main import app
from bridge_stg.data import read_samples, write_split
from bridge_stg.data import video as video_module
from bridge_stg.models import load_model

from ..data.clips import with_sound


def run(*arguments, folder=None):
    command = [sys.executable, "-m", "bridge_stg", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return read_samples(write_split(tmp_path_factory.mktemp("synth"), "test", 1, 3))[0]


@pytest.mark.parametrize("name", ["annotated.mp4", "strip.png", "result.json"])
def test_out_never_replaces_the_source(tmp_path, sample, name):
    source = tmp_path / name
    shutil.copy(sample.video, source)
    link = tmp_path / "elsewhere.mp4"
    link.symlink_to(source)
    before = source.read_bytes()
    for video in (source, link):
        done = run("ground", video, sample.sentence, "--out", tmp_path)
        assert done.returncode == 1
        assert "is the file that is read" in done.stderr.replace("\n", " ")
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "elsewhere.mp4"])


def test_stream_is_that_of_the_answer_and_its_pictures(tmp_path):
    path = with_sound(tmp_path / "two.mkv", pictures=2)
    done = run("ground", path, "the red circle", "--stream", 1, "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["width"] == 64
    done = run("ground", path, "the red circle", "--stream", 2)
    assert done.returncode == 1
    assert "has video streams 0..1; there is no stream 2." in done.stderr.replace("\n", " ")


def test_a_video_is_probed_once(tmp_path, sample, monkeypatch):
    seen, read = [], video_module._read_packets
    monkeypatch.setattr(video_module, "_read_packets", lambda file: seen.append(file.path) or read(file))
    arguments = ["ground", sample.video, sample.sentence, "--out", str(tmp_path / "out")]
    app(args=arguments, standalone_mode=False)
    assert seen == [sample.video]
    demo._ground(load_model(), sample, tmp_path)
    assert seen == [sample.video] * 2


def test_one_bad_video_of_any_kind_is_one_failure_of_a_manifest(tmp_path, sample):
    (tmp_path / "live.m3u8").write_text("#EXTM3U\n#EXTINF:6,\na.ts\n")
    shutil.copy(sample.video, tmp_path / "12:30.mp4")
    names = ["live.m3u8", "12:30.mp4", "http://127.0.0.1/a.mp4"]
    lines = [json.dumps({"id": name, "video": name, "sentence": "a circle"}) + "\n" for name in names]
    (tmp_path / "m.jsonl").write_text("".join(lines))
    done = run("ground", "--manifest", "m.jsonl", "--out", "o.jsonl", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 3 grounded, 2 failed" in done.stdout
