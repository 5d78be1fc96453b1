"""Files and streams: names that are no names, files that name others, streams that are no video, memory."""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import suppress

import av
import numpy as np
import pytest
from PIL import Image

from bridge_stg.data import available_memory as memory_module
from bridge_stg.data import decode_frames, frames, probe, write_video
from bridge_stg.errors import VideoError
from bridge_stg.files import refuse_source

from .clips import remux, with_sound
from .media import encode, numbered_frame, read_numbers

NAMES = [
    "2024-01-01T12:30:00.mp4", "file:x.mp4", "data:x.mp4", "pipe:0", "concat:a|b.mp4", "http:x.mp4", "tcp:x.mp4",
    "%03d.mp4", "*.mp4", "a?b[c]{d,e}.mp4", "-i.mp4", "two\nlines.mp4", os.fsdecode(b"\xff\xfe.mp4"),
    "crypto:x", "ü 東.mp4",
]  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("files") / "clip.mp4", 20)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_only_a_name(clip, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with open(name, "wb") as file:
        file.write(clip.read_bytes())
    assert read_numbers(decode_frames(name, [7, 2])) == [7, 2]
    out = f"written {name}"
    write_video(out, [numbered_frame(3)], fps=4)
    assert read_numbers(frames(out)) == [3]
    assert sorted(os.listdir()) == sorted([name, out])


@pytest.mark.parametrize("name", NAMES)
def test_an_unreadable_file_of_any_name_is_one_printable_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match="does not exist") as caught:
        probe(name)
    with open(name, "wb") as file:
        file.write(b"nothing" * 100)
    with pytest.raises(VideoError, match="cannot be opened as a video") as caught:
        probe(name)
    assert str(caught.value).isprintable() and str(caught.value).endswith(".")


def test_patterns_of_image_sequences_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        Image.new("L", (16, 16), 60 * number).save(f"{number:03d}.png")
    for name in ("%03d.png", "*.png"):
        with pytest.raises(VideoError, match="does not exist"):
            probe(name)
        Image.new("L", (16, 16), 200).save(name)
        assert probe(name).frame_count == 1
        assert decode_frames(name, [0]).float().mean() == 200


def test_no_connection_is_ever_made(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(4)
    server.settimeout(0.5)
    calls = []

    def accept():
        with suppress(TimeoutError):
            calls.append(server.accept())

    listener = threading.Thread(target=accept)
    listener.start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
    name = address.replace("//", "").replace("/", "_")
    (tmp_path / name).write_bytes(clip.read_bytes())
    assert probe(name).frame_count == 20
    (tmp_path / "live.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:7\n#EXTINF:6,\n{address}\n#EXT-X-ENDLIST\n")
    for path, rule in ((address, "is an address"), ("live.m3u8", "is a playlist")):
        with pytest.raises(VideoError, match=rule):
            probe(path)
    listener.join()
    server.close()
    assert calls == []


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:7\n#EXTINF:6,\nclip.ts\n#EXT-X-ENDLIST\n",
        "\ufeff#EXTM3U\n#EXTINF:6,\nclip.ts\n",
        "ffconcat version 1.0\nfile clip.ts\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        '<?xml version="1.0"?>\n<!-- by hand -->\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>\n',
    ],
)
def test_a_playlist_opens_nothing(clip, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    remux(clip, tmp_path / "clip.ts", lambda packets, time_base: None)
    for name in ("list", "list.mp4", "list.m3u8"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(VideoError, match="is a playlist, which only names other files"):
            probe(name)


def test_a_movie_that_refers_to_another_file_reads_only_itself(clip, tmp_path):
    """The data reference of an MP4 may name another file; it must not be opened."""
    data = bytearray(clip.read_bytes())
    place = data.find(b"url ")
    assert data[place + 4 : place + 8] == b"\0\0\0\1"  # "in this file"
    data[place : place + 8] = b"alis\0\0\0\0"
    (tmp_path / "a.mp4").write_bytes(data)
    with suppress(VideoError):  # or it is refused
        assert read_numbers(decode_frames(tmp_path / "a.mp4", [3])) == [3]


def test_what_is_no_regular_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, rule in (
            (tmp_path / "pipe", "is a pipe"),
            (tmp_path / "socket", "is a socket"),
            (os.devnull, "is a device"),
            (tmp_path, "is a folder"),
            ("https://example.org/a.mp4", "is an address"),
            ("a\0b.mp4", "cannot be the name of a file"),
            ("\ud800.mp4", "cannot be the name of a file"),
            (tmp_path / ("n" * 300), "cannot be read as a video"),
        ):
            with pytest.raises(VideoError, match=rule) as caught:
                probe(path)
            assert str(caught.value).isprintable() and str(caught.value).endswith(".")


# Streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_the_default_stream_is_the_video(tmp_path, suffix):
    path = with_sound(tmp_path / f"two.{suffix}", pictures=3, default=1)
    assert (probe(path).width, probe(path).stream) == (64, 1)
    assert decode_frames(path, [7]).shape == (1, 64, 64, 3)
    for number in range(3):
        info = probe(path, stream=number)
        assert (info.width, info.stream) == (32 * (number + 1), number)
        assert decode_frames(info, [7]).shape[1] == len(next(frames(info))) == info.height
        assert probe(info) is info
    for number in (3, -1):
        with pytest.raises(VideoError, match=rf"has video streams 0\.\.2; there is no stream {number}\."):
            probe(path, stream=number)


def test_one_stream_is_the_only_one(clip):
    assert probe(clip, stream=0).stream == 0
    with pytest.raises(VideoError, match="has one video stream, 0; there is no stream 1"):
        probe(clip, stream=1)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("pictures", [True, False], ids=["film", "song"])
def test_cover_art_is_never_the_video(tmp_path, suffix, pictures):
    path = tmp_path / f"cover.{suffix}"
    Image.new("RGB", (48, 48)).save(tmp_path / "cover.jpg")
    sound = with_sound(tmp_path / "sound.mp4", late=1.0)
    with av.open(str(sound)) as source, av.open(str(tmp_path / "cover.jpg")) as cover, av.open(str(path), "w") as out:
        image = next(cover.demux(video=0))
        if suffix == "mp4":
            image.stream = out.add_stream_from_template(cover.streams.video[0])
            image.stream.disposition = av.stream.Disposition.attached_pic
        else:
            out.add_attachment("cover.jpg", "image/jpeg", bytes(image))
        wanted = [stream for stream in source.streams if pictures or stream.type == "audio"]
        copies = {stream: out.add_stream_from_template(stream) for stream in wanted}
        if suffix == "mp4":
            out.mux(image)
        for packet in source.demux(wanted):
            if packet.size:
                packet.stream = copies[packet.stream]
                out.mux(packet)
    if pictures:
        info = probe(path)
        assert (info.width, info.frame_count, info.stream) == (32, 8, 0)
        assert info.start_time == pytest.approx(1.0, abs=0.07)
    else:
        with pytest.raises(VideoError, match="has no video stream, only audio, "):
            probe(path)


# Memory and numbers that no clip has -------------------------------------------------------------------------------


def test_frames_that_do_not_fit_in_memory_are_refused_before_any_is_decoded(clip, monkeypatch):
    monkeypatch.setattr(memory_module, "available_memory", lambda: 10_000_000_000)
    info = probe(clip)
    assert decode_frames(info, [0] * 100).shape[0] == 100
    with pytest.raises(
        VideoError, match=r"does not fit in memory: 1000000 of its frames of 96 x 64 pixels take 18\.4 GB, "
    ):
        decode_frames(info, [0] * 1_000_000)


def test_memory_that_runs_out_is_one_sentence(clip, monkeypatch):
    def refuse(*args, **kwargs):
        raise MemoryError

    info = probe(clip)
    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(VideoError, match=r"clip\.mp4 does not fit in memory\."):
        decode_frames(info, [0])


def test_available_memory_is_a_number_of_this_machine():
    free = memory_module.available_memory()
    assert free is None or 0 < free < 1 << 50


@pytest.mark.parametrize("boxes", [("stsz",), ("stts",), ("stsz", "stts")])
def test_a_count_of_a_billion_frames_is_bounded(tmp_path, boxes):
    data = bytearray(encode(tmp_path / "a.mp4", 20, b_frames=0).read_bytes())
    for box in boxes:
        place = data.find(box.encode())
        if box == "stsz":
            data[place + 8 : place + 16] = struct.pack(">II", 1, 10**9)  # all of one byte
        else:
            data[place + 12 : place + 16] = struct.pack(">I", 10**9)
    (tmp_path / "billion.mp4").write_bytes(data)
    with suppress(VideoError):  # or it is refused
        assert probe(tmp_path / "billion.mp4").frame_count <= 20


def test_an_interrupt_while_reading_is_not_lost(clip, monkeypatch):
    from bridge_stg.data import media_file

    original, calls = media_file._Bytes.read, []

    class Interrupted:
        def __init__(self, raw):
            self.raw = raw

        def read(self, size):
            calls.append(size)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return self.raw.read(size)

        def __getattr__(self, name):
            return getattr(self.raw, name)

    monkeypatch.setattr(
        media_file._Bytes, "__init__", lambda self, raw: vars(self).update(_raw=Interrupted(raw), failure=None)
    )
    with pytest.raises(KeyboardInterrupt):
        probe(clip)
    assert media_file._Bytes.read is original


def test_a_failing_disk_is_one_sentence(clip, monkeypatch):
    from bridge_stg.data import media_file

    def fail(self, size):
        self.failure = OSError(5, "Input/output error")
        return b""

    monkeypatch.setattr(media_file._Bytes, "read", fail)
    with pytest.raises(VideoError, match=r"clip\.mp4 cannot be read as a video \(Input/output error\)\."):
        probe(clip)


def test_a_stream_that_begins_in_the_middle_is_passed_over(tmp_path):
    first = encode(tmp_path / "a.ts", fps=4)
    second = remux(first, tmp_path / "b.ts", lambda packets, base: None, options={"mpegts_start_pid": "512"})
    (tmp_path / "joined.ts").write_bytes(first.read_bytes() + second.read_bytes())
    info = probe(tmp_path / "joined.ts")
    assert (info.frame_count, info.repairs) == (60, ())
    assert read_numbers(decode_frames(info, [3, 59])) == [3, 59]
    assert read_numbers(frames(info)) == list(range(60))


def test_an_output_is_never_the_source(clip, tmp_path):
    from bridge_stg.errors import OutputError

    source, link, hard = tmp_path / "a.mp4", tmp_path / "link.mp4", tmp_path / "hard.mp4"
    source.write_bytes(clip.read_bytes())
    link.symlink_to(source)
    os.link(source, hard)
    refuse_source(source, tmp_path / "other.mp4", clip)
    for output in (source, link, hard, tmp_path / "." / "a.mp4"):
        with pytest.raises(OutputError, match="is the file that is read"):
            refuse_source(source, tmp_path / "other.mp4", output)
