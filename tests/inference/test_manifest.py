"""A manifest is grounded once, whatever interrupts it and however many processes share it."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from bridge_stg.errors import ModelError, OutputError, SampleError, VideoError
from bridge_stg.inference.manifest import ground_manifest, read_manifest
from bridge_stg.models import GroundingResult
from bridge_stg.models.result import TubeEntry


def answer(videos, sentences):
    return [answer_one(*each) for each in zip(videos, sentences, strict=True)]


def answer_one(video, sentence):
    if os.path.basename(video).startswith("broken"):
        raise VideoError(f"{video} cannot be decoded.")
    return GroundingResult(
        video=video,
        sentence=sentence,
        interval=(1.0, 2.0),
        interval_source="presence",
        confidence=0.5,
        answer="",
        fps=4.0,
        width=64,
        height=64,
        frame_count=24,
        tube=(TubeEntry(frame=4, time=1.0, box=(0.0, 0.0, 8.0, 8.0), presence=0.5, interpolated=False),),
    )


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "in.jsonl"
    names = [f"broken{i}.mp4" if i % 20 == 7 else f"clip{i}.mp4" for i in range(100)]
    records = [{"id": f"r{i}", "video": name, "sentence": "s"} for i, name in enumerate(names)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_broken_videos_are_listed_and_the_rest_is_grounded(manifest, tmp_path):
    out = tmp_path / "out.jsonl"
    summary = ground_manifest(answer, manifest, out)
    assert (summary.records, summary.grounded, summary.merged) == (100, 95, True)
    assert list(summary.failed) == ["r7", "r27", "r47", "r67", "r87"]
    assert "broken7.mp4 cannot be decoded" in summary.failed["r7"]
    found = lines(out)
    assert [record["id"] for record in found] == [f"r{i}" for i in range(100)]
    assert found[0]["interval"] == [1.0, 2.0] and found[0]["video"] == str(tmp_path / "clip0.mp4")
    assert not out.with_name("out.jsonl.parts").exists()


def test_an_interruption_ends_it_and_nothing_done_is_done_again(manifest, tmp_path):
    out, seen = tmp_path / "out.jsonl", []

    def interrupted_at_40(videos, sentences):
        if len(seen) == 40:
            raise KeyboardInterrupt
        seen.extend(videos)
        return answer(videos, sentences)

    with pytest.raises(KeyboardInterrupt):
        ground_manifest(interrupted_at_40, manifest, out)
    assert not out.exists()
    part = next(out.with_name("out.jsonl.parts").glob("*.jsonl"))
    part.write_bytes(part.read_bytes()[:-30])  # as if the last line was being written
    again = []
    ground_manifest(lambda v, s: again.extend(v) or answer(v, s), manifest, out)
    assert len(again) == 61 and set(again).isdisjoint(seen[:-1]) and seen[-1] in again
    assert len(lines(out)) == 100


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ZeroDivisionError("division by zero\nand more"), "ZeroDivisionError: division by zero"),
        (PermissionError(13, "Permission denied"), "PermissionError: [Errno 13] Permission denied"),
        (RecursionError(), "RecursionError"),
        (MemoryError("12 GiB"), "the memory is not enough for it. 12 GiB"),
        (torch.OutOfMemoryError("CUDA out of memory."), "the memory is not enough for it. CUDA out of memory."),
        (ModelError("The model is none."), "The model is none."),
    ],
)
def test_whatever_happens_to_one_record_is_its_reason(manifest, tmp_path, caplog, error, reason, size):
    def fails_at_3(videos, sentences):
        if any(video.endswith("clip3.mp4") for video in videos):
            raise error
        return answer(videos, sentences)

    with caplog.at_level(logging.DEBUG, "bridge_stg.errors"):
        summary = ground_manifest(fails_at_3, manifest, tmp_path / "out.jsonl", batch_size=size)
    assert (summary.grounded, summary.failed["r3"]) == (94, reason)
    assert ("Traceback" in caplog.text) != isinstance(error, ModelError)


@pytest.mark.parametrize("error", [OutputError("out cannot be written."), torch.AcceleratorError("CUDA error")])
def test_what_is_not_about_a_record_ends_the_run(manifest, tmp_path, error):
    def fails(videos, sentences):
        raise error

    with pytest.raises(type(error)):
        ground_manifest(fails, manifest, tmp_path / "out.jsonl", batch_size=4)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_result_that_json_does_not_have_is_refused(manifest, tmp_path):
    def not_finite(videos, sentences):
        return [replace(result, confidence=math.nan if "clip3" in result.video else 0.5)
                for result in answer(videos, sentences)]  # fmt: skip

    summary = ground_manifest(not_finite, manifest, tmp_path / "out.jsonl")
    assert "not finite" in summary.failed["r3"]
    assert "NaN" not in (tmp_path / "out.jsonl").read_text()


def test_shards_share_the_work_and_the_last_one_merges(manifest, tmp_path):
    out, calls = tmp_path / "out.jsonl", []

    def counting(videos, sentences):
        calls.extend(videos)
        return answer(videos, sentences)

    first = ground_manifest(counting, manifest, out, rank=1, world_size=3)
    assert not first.merged and not out.exists() and len(calls) == 33
    ground_manifest(counting, manifest, out, rank=0, world_size=2)  # another number of processes goes on
    last = ground_manifest(counting, manifest, out, rank=1, world_size=2)
    assert last.merged and len(calls) == len(set(calls)) == 100
    assert [record["id"] for record in lines(out)] == [f"r{i}" for i in range(100)]
    assert ground_manifest(counting, manifest, out).grounded == 95 and len(calls) == 100


def test_killed_at_any_moment_it_loses_and_doubles_nothing(manifest, tmp_path):
    out = tmp_path / "out.jsonl"
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import test_manifest as t\n"
        "def slow(v, s): time.sleep(0.01); return t.answer(v, s)\n"
        "t.ground_manifest(slow, sys.argv[2], sys.argv[3])"
    )
    command = [sys.executable, "-c", code, os.path.dirname(__file__), manifest, out]
    process = subprocess.Popen(command)
    part = tmp_path / "out.jsonl.parts" / "0-of-1.jsonl"
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.read_bytes().count(b"\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and 1 < part.read_bytes().count(b"\n") < 100
    ground_manifest(answer, manifest, out)
    assert [record["id"] for record in lines(out)] == [f"r{i}" for i in range(100)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no record"),
        ('{"id": "a", "video": "v.mp4"', r"in\.jsonl:1: not JSON that can be read: "),
        (b'\n\n{"id": "\xff"}', r"in\.jsonl:3: not UTF-8 text"),
        ('\n{"n": %s}' % ("[" * 10**5 + "]" * 10**5), r"in\.jsonl:2: not JSON that .* nested too deeply"),
        ('{"n": %s}' % ("9" * 5000), r"in\.jsonl:1: not JSON that .* too many digits"),
        ('{"id": [], "video": "v", "sentence": "s"}', r"in\.jsonl:1: a record must be an object with the texts"),
        ('{"id": {}, "video": "v", "sentence": "s"}', r"in\.jsonl:1: a record must be an object with the texts"),
        ('{"id": "a", "video": "v.mp4"}', r"in\.jsonl:1: a record must be an object with the texts"),
        (
            '{"id":"a","video":"v","sentence":"s"}\n{"id":"a","video":"v","sentence":"t"}',
            r":2: id 'a' was already used in line 1",
        ),
    ],
)
def test_mistakes_in_a_manifest(tmp_path, text, message):
    (tmp_path / "in.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SampleError, match=message):
        read_manifest(tmp_path / "in.jsonl")


@pytest.mark.parametrize("size", [2, 7, 16, 1000])
def test_a_broken_video_costs_its_batch_nothing(manifest, tmp_path, size):
    one, many, together = tmp_path / "one.jsonl", tmp_path / "many.jsonl", []
    ground_manifest(answer, manifest, one)

    def counting(videos, sentences):
        results = answer(videos, sentences)
        together.append(len(videos))
        return results

    summary = ground_manifest(counting, manifest, many, batch_size=size)
    assert (summary.grounded, len(summary.failed)) == (95, 5)
    assert many.read_bytes() == one.read_bytes()
    # Halving leaves a broken one at most one batch of every size below.
    assert max(together) <= size and len(together) <= -(-100 // size) + 5 * size.bit_length()


def test_a_sentence_may_hold_any_sign(tmp_path):
    sentence = "a\u2028b\x85c"
    record = {"id": "\u2028", "video": "v.mp4", "sentence": sentence}
    (tmp_path / "in.jsonl").write_bytes(json.dumps(record, ensure_ascii=False).encode() + b"\r\n")
    assert ground_manifest(answer, tmp_path / "in.jsonl", tmp_path / "out.jsonl").grounded == 1
    assert json.loads((tmp_path / "out.jsonl").read_text())["sentence"] == sentence


def test_the_manifest_is_not_taken_for_its_output(manifest):
    before = manifest.read_bytes()
    with pytest.raises(OutputError, match=r"in\.jsonl is the file that is read, .*, and would be replaced"):
        ground_manifest(answer, manifest, manifest.parent / "." / "in.jsonl")
    assert manifest.read_bytes() == before


@pytest.mark.parametrize("key", ["id", "video", "sentence"])
def test_half_a_character_is_told_with_its_line(tmp_path, key):
    record = {"id": "a", "video": "v.mp4", "sentence": "s", key: "\udc80"}
    lines = [json.dumps({**record, key: "b"}), json.dumps(record)]
    (tmp_path / "in.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    with pytest.raises(SampleError, match=r"in\.jsonl:2: a text in it holds half a character"):
        read_manifest(tmp_path / "in.jsonl")


@pytest.mark.parametrize("where", ["video", "sentence"])
def test_a_record_whose_text_fails_costs_the_others_nothing(tmp_path, where):
    texts = {"video": "v.mp4", "sentence": "s"}
    records = [{"id": "a", **texts, where: "bad"}, {"id": "b", **texts}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def encodes(videos, sentences):
        for text in (*videos, *sentences):
            text.replace("bad", "\udfff").encode()
        return answer(videos, sentences)

    for _ in range(2):
        summary = ground_manifest(encodes, tmp_path / "in.jsonl", tmp_path / "out.jsonl", batch_size=2)
        assert list(summary.failed) == ["a"] and summary.grounded == 1 and summary.merged
    assert "UnicodeEncodeError" in summary.failed["a"]


def test_results_of_another_manifest_or_made_with_something_else_are_not_mixed_in(manifest, tmp_path, monkeypatch):
    out, made = tmp_path / "out.jsonl", {"model": "a", "spatial_fps": None}

    def ground(manifest, **made):
        return ground_manifest(answer, manifest, out, made_with=made)

    ground(manifest, **made)
    before = out.read_bytes()
    with pytest.raises(OutputError, match='made with model "a", not "b"'):
        ground(manifest, **made | {"model": "b"})
    with pytest.raises(OutputError, match=r"made with spatial_fps null, not 2\.0"):
        ground(manifest, **made | {"spatial_fps": 2.0})
    monkeypatch.chdir(tmp_path)
    assert ground("in.jsonl", **made).grounded == 95  # the same one, by another name
    manifest.write_text(manifest.read_text().replace('"s"', '"t"', 1))
    with pytest.raises(OutputError, match="made with manifest "):
        ground(manifest, **made)
    assert out.read_bytes() == before


def test_an_output_that_is_no_output_of_ours_is_kept(manifest, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text('{"id": "foreign"}\n')
    with pytest.raises(OutputError, match="holds results, and nothing says what made them"):
        ground_manifest(answer, manifest, out)
    assert out.read_text() == '{"id": "foreign"}\n'
