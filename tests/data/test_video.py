from __future__ import annotations

from typing import Any

import av
import numpy as np
import pytest

from bridge_stg.data import decode_frames, frames, probe
from bridge_stg.data.media_file import MediaFile
from bridge_stg.errors import VideoError

from .media import audio_file, cut, encode, read_numbers, real_clip

CONTAINERS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "mkv": {},
    "ts": {},
    "avi": {"codec": "mpeg4", "b_frames": 2},
    "mpg": {"codec": "mpeg2video", "b_frames": 2},
    "mov": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "webm": {"codec": "libvpx-vp9"},
    "h264": {"container": "h264"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def mp4(folder):
    return encode(folder / "plain.mp4")


@pytest.fixture
def packets_read(monkeypatch):
    """Counts the packets that the module reads."""
    counted = []
    original = MediaFile.packets

    def counting(file):
        for packet in original(file):
            counted.append(packet.size)
            yield packet

    monkeypatch.setattr(MediaFile, "packets", counting)
    return counted


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_any_order_and_repeats_in_every_container(folder, suffix):
    path = encode(folder / f"clip.{suffix}", **CONTAINERS[suffix])
    info = probe(path)
    assert (info.width, info.height, info.frame_count) == (96, 64, 60)
    assert info.fps == pytest.approx(25)
    np.testing.assert_allclose(info.times, np.arange(60) / 25, atol=2e-3)
    assert info.duration == pytest.approx(2.4, abs=2e-3)
    wanted = [59, 0, 31, 31, 12, 1, 47]
    decoded = decode_frames(info, wanted)
    assert decoded.shape == (7, 64, 96, 3)
    assert read_numbers(decoded) == wanted
    assert read_numbers(frames(info)) == list(range(60))


def test_decodes_only_what_is_needed(folder, packets_read):
    path = encode(folder / "long.mp4", 200)
    info = probe(path)
    packets_read.clear()
    assert read_numbers(decode_frames(info, [3])) == [3]
    assert len(packets_read) < 30
    packets_read.clear()
    assert read_numbers(decode_frames(info, [195, 5])) == [195, 5]
    assert len(packets_read) < 80


def test_close_frames_are_read_in_one_pass(folder, packets_read):
    info = probe(encode(folder / "dense.mp4", 120))
    packets_read.clear()
    assert read_numbers(decode_frames(info, range(0, 120, 10))) == list(range(0, 120, 10))
    assert len(packets_read) <= 121


def test_no_frames_wanted(mp4):
    assert decode_frames(mp4, []).shape == (0, 64, 96, 3)


@pytest.mark.parametrize("index", [[60], [-1]])
def test_frame_out_of_range(mp4, index):
    with pytest.raises(ValueError, match=r"frame_index must be in 0\.\.59"):
        decode_frames(mp4, index)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_takes_time_from_the_stream(folder, suffix):
    times = np.cumsum(np.random.default_rng(0).choice([0.02, 0.04, 0.1, 0.5], 60))
    info = probe(encode(folder / f"vfr.{suffix}", times=times))
    np.testing.assert_allclose(info.times, times - times[0], atol=2e-3)
    assert info.fps == pytest.approx(59 / (times[-1] - times[0]), rel=1e-3)
    assert read_numbers(decode_frames(info, [40, 7, 59])) == [40, 7, 59]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_one_frame_video(folder, suffix):
    info = probe(encode(folder / f"one.{suffix}", 1))
    assert (info.frame_count, info.times.tolist()) == (1, [0.0])
    assert info.fps > 0
    assert info.duration > 0
    assert read_numbers(decode_frames(info, [0, 0])) == [0, 0]


def test_picture_is_a_one_frame_video(folder):
    path = encode(folder / "picture.png", 1, codec="png", container="image2", pixels="rgb24")
    assert probe(path).frame_count == 1
    assert read_numbers(frames(path)) == [0]


def test_rotated_video_comes_out_upright(folder):
    path = encode(folder / "rotated.mp4", rotation=90)
    info = probe(path)
    assert (info.width, info.height, info.rotation) == (64, 96, 90)
    upright = decode_frames(info, [0, 37]).numpy()
    assert upright.shape == (2, 96, 64, 3)
    assert read_numbers(np.rot90(frame, -1) for frame in upright) == [0, 37]


def test_clip_trimmed_by_an_edit_list_is_whole(folder, mp4):
    path = folder / "trimmed.mp4"
    with av.open(str(mp4)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is None or packet.pts is None:
                continue
            shift = round(5 / 25 / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
            target.mux(packet)
    info = probe(path)
    assert info.frame_count == 55
    assert read_numbers(decode_frames(info, [54, 0, 20])) == [59, 5, 25]
    assert read_numbers(frames(info)) == list(range(5, 60))


def test_bare_bitstream_uses_the_rate_in_its_headers(folder):
    assert probe(encode(folder / "ten.h264", 20, container="h264", fps=10)).fps == 10


def test_real_clip():
    info = probe(real_clip())
    assert (info.width, info.height, info.fps, info.frame_count) == (640, 272, 25.0, 250)
    picked = decode_frames(info, [249, 0, 100])
    for frame, picture in enumerate(frames(info)):
        if frame in (0, 100, 249):
            row = [249, 0, 100].index(frame)
            np.testing.assert_array_equal(picked[row].numpy(), picture)


def _missing(folder):
    return folder / "missing.mp4"


def _folder(folder):
    return folder


def _empty(folder):
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def _text(folder):
    (folder / "text.mp4").write_text("not a video " * 500)
    return folder / "text.mp4"


def _audio(folder):
    return audio_file(folder / "sound.mp4")


def _cut_before_index(folder):
    return cut(encode(folder / "a.mp4"), folder / "cut_index.mp4")


def _cut_in_data(folder):
    return cut(encode(folder / "b.mp4", muxing={"movflags": "faststart"}), folder / "cut_data.mp4")


def _cut_mkv(folder):
    return cut(encode(folder / "c.mkv"), folder / "cut.mkv")


def _cut_avi(folder):
    return cut(encode(folder / "d.avi", codec="mpeg4"), folder / "cut.avi")


def _cut_fragments(folder):
    return cut(
        encode(folder / "f.mp4", muxing={"movflags": "frag_keyframe+empty_moov+global_sidx"}), folder / "cut_f.mp4", 0.4
    )


def _pictures_in_a_row(folder):
    picture = encode(folder / "one.jpg", 1, codec="mjpeg", container="mjpeg", pixels="yuvj420p").read_bytes()
    head = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    path = folder / "pictures.jpg"
    path.write_bytes((picture[:2] + head + picture[2:]) * 5)
    return path


def _no_time(folder):
    return encode(folder / "bare.mjpeg", codec="mjpeg", container="mjpeg", pixels="yuvj420p")


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (_missing, "does not exist"),
        (_folder, "is a folder"),
        (_empty, "is empty"),
        (_text, "cannot be opened as a video"),
        (_audio, "has no video stream, only audio"),
        (_cut_before_index, "cannot be opened as a video"),
        (_cut_in_data, r"is truncated: only \d+ of its 60 frames"),
        (_cut_mkv, r"is truncated: its frames end at 1\.\d+ s of 2\.40 s"),
        (_cut_avi, r"is truncated: only \d+ of its 60 frames"),
        (_no_time, "has no usable time base"),
        (_cut_fragments, r"is truncated: only \d+ of its \d+ frames"),
        (_pictures_in_a_row, "has no usable time base"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, make, rule):
    path = make(tmp_path)
    with pytest.raises(VideoError, match=rule) as caught:
        probe(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message


def test_damage_inside_the_data_is_found_when_decoding(tmp_path):
    path = encode(tmp_path / "a.mp4", muxing={"movflags": "faststart"})
    data = path.read_bytes()
    keep = int(len(data) * 0.6)
    path.write_bytes(data[:keep] + bytes(len(data) - keep))
    info = probe(path)
    assert info.frame_count == 60
    assert read_numbers(decode_frames(info, [3])) == [3]
    with pytest.raises(VideoError, match=r"only \d+ of its 60 frames can be decoded, and frame 50 is needed\."):
        decode_frames(info, [3, 50])
    with pytest.raises(VideoError, match=r"only \d+ of its 60 frames can be decoded"):
        list(frames(info))
