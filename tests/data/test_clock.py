"""Frame times where the stream's clock is damaged, restarts, or begins elsewhere than at 0."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from bridge_stg.data import decode_frames, frames, probe
from bridge_stg.errors import VideoError

from .clips import pes_stamps, read_stamp, remux, shifted, with_sound, write_stamp
from .media import encode, read_numbers

TIMES = np.arange(60) / 25
WRAP = 2**33


@pytest.fixture(scope="module", params=[0, 2], ids=["in order", "B-frames"])
def clip(request, tmp_path_factory):
    return encode(tmp_path_factory.mktemp("clock") / "clip.mp4", b_frames=request.param)


def assert_whole(path, times=TIMES, tolerance=0.045):
    """Every frame there, in its place and at its time, whichever way it is reached."""
    info = probe(path)
    assert info.frame_count == len(times)
    np.testing.assert_allclose(info.times, times, atol=tolerance)
    assert (np.diff(info.times) > 0).all()
    numbers = [number % 60 for number in range(len(times))]
    assert read_numbers(frames(info)) == numbers
    last = len(times) - 1
    assert read_numbers(decode_frames(info, [last, 3, 31])) == [numbers[last], 3, 31]
    return info


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4", "flv"])
def test_a_clock_that_begins_late_is_sound(clip, tmp_path, suffix):
    info = assert_whole(remux(clip, tmp_path / f"late.{suffix}", shifted(7.0)), tolerance=2e-3)
    assert info.duration == pytest.approx(2.4, abs=2e-3)
    assert (info.repairs, info.start_time) == ((), 0.0)


@pytest.mark.parametrize("before", [0.4, 1.0, 2.39])
def test_a_transport_stream_across_the_wrap_of_its_clock(clip, tmp_path, before):
    path = remux(clip, tmp_path / "tv.ts", shifted(WRAP / 90_000 - before))
    assert assert_whole(path, tolerance=1e-3).duration == pytest.approx(2.4)


@pytest.mark.parametrize("second", [1.5, 0.1, 2.1, 30_000.0])
def test_a_clock_that_restarts_or_jumps_runs_on(clip, tmp_path, second):
    parts = [remux(clip, tmp_path / f"{begin}.ts", shifted(begin)).read_bytes() for begin in (2.0, second)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    info = assert_whole(path, np.arange(120) / 25, tolerance=1e-3)
    assert info.duration == pytest.approx(4.8)
    assert info.repairs == (
        "the clock restarts or jumps once (at frame 60), and the parts are put one after the other",
    )


def test_many_restarts(clip, tmp_path):
    part = remux(clip, tmp_path / "part.ts", shifted(2.0)).read_bytes()
    (tmp_path / "joined.ts").write_bytes(4 * part)
    assert assert_whole(tmp_path / "joined.ts", np.arange(240) / 25, tolerance=1e-3).duration == pytest.approx(9.6)


@pytest.mark.parametrize("bit", [14, 17, 20, 26, 32])
@pytest.mark.parametrize("frame", [12, 31, 45])
def test_one_flipped_bit_of_a_timestamp_moves_no_frame(tmp_path, clip, frame, bit):
    path = remux(clip, tmp_path / "flipped.ts", shifted(2.0))
    data = bytearray(path.read_bytes())
    places = pes_stamps(data)
    assert len(places) == 60
    write_stamp(data, places[frame], read_stamp(data, places[frame]) ^ 1 << bit)
    path.write_bytes(data)
    info = probe(path)
    np.testing.assert_allclose(info.times, TIMES, atol=0.05)
    assert info.duration == pytest.approx(2.4, abs=0.05)
    assert read_numbers(decode_frames(info, range(60))) == list(range(60))


def test_a_flipped_bit_in_a_decoding_time_alone(tmp_path):
    path = remux(encode(tmp_path / "a.mp4", b_frames=2), tmp_path / "flipped.ts", shifted(2.0))
    data = bytearray(path.read_bytes())
    place = pes_stamps(data)[31] + 5
    write_stamp(data, place, read_stamp(data, place) ^ 1 << 20)
    path.write_bytes(data)
    assert_whole(path, tolerance=1e-3)


def test_one_pair_of_equal_times_costs_nothing_else(tmp_path):
    times = np.cumsum([0.0, *(0.5 if place % 3 == 0 else 0.02 for place in range(1, 60))])
    clip = encode(tmp_path / "phone.mp4", times=times, b_frames=0)

    def equal(packets, time_base):
        for packet in packets:
            packet.pts += round(Fraction(40, 1000) / time_base)
        packets[31].pts = packets[30].pts

    info = probe(remux(clip, tmp_path / "equal.mp4", equal))
    times[31] = times[30]
    np.testing.assert_allclose(info.times, times, atol=5e-3)
    assert info.repairs == ("one frame had the time of another, and got one just behind it",)
    assert read_numbers(decode_frames(info, range(60))) == list(range(60))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_last_frame_lasts_as_long_as_its_packet_says(tmp_path, suffix):
    clip = encode(tmp_path / "a.mp4", 9, fps=4, b_frames=0)

    def longer(packets, time_base):
        packets[-1].duration = round(10 / time_base)

    info = probe(remux(clip, tmp_path / f"slides.{suffix}", longer))
    assert info.duration == pytest.approx(12.0, abs=2e-3)
    assert info.fps == pytest.approx(4.0)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "mov"])
def test_where_the_sound_begins_first_the_picture_starts_on_its_clock(tmp_path, suffix):
    info = probe(with_sound(tmp_path / f"late.{suffix}", late=1.5))
    # AAC begins with samples that are not heard, 0.064 s of them; some containers count them.
    assert info.start_time == pytest.approx(1.5, abs=0.07)
    assert info.times[0] == 0 and info.duration == pytest.approx(2.0, abs=2e-3)


def test_a_repaired_clock_keeps_its_start(tmp_path):
    path = with_sound(tmp_path / "late.ts", late=1.5)
    data = bytearray(path.read_bytes())
    place = pes_stamps(data)[4]
    write_stamp(data, place, read_stamp(data, place) ^ 1 << 22)
    path.write_bytes(data)
    info = probe(path)
    assert info.repairs and info.start_time == pytest.approx(1.5, abs=0.07)
    np.testing.assert_allclose(info.times, np.arange(8) / 4, atol=0.05)


def test_repairs_are_logged_once(tmp_path, caplog):
    part = remux(encode(tmp_path / "a.mp4"), tmp_path / "part.ts", shifted(2.0)).read_bytes()
    (tmp_path / "joined.ts").write_bytes(2 * part)
    for _ in range(2):
        probe(tmp_path / "joined.ts")
    assert [record.message.startswith(str(tmp_path / "joined.ts")) for record in caplog.records] == [True]


def test_a_clock_of_years_is_damage(tmp_path):
    def years(packets, time_base):
        packets[-1].pts += round(10**8 / time_base)
        packets[-1].dts = packets[-1].pts

    path = remux(encode(tmp_path / "a.mp4", b_frames=0), tmp_path / "years.mkv", years)
    with pytest.raises(VideoError, match=r"has a damaged clock: its 60 frames span 1\d{8} s"):
        probe(path)


# Recordings that begin between two key frames ---------------------------------------------------------------------


def _without_first(count):
    return lambda packets, time_base: packets[count:]


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
def test_a_recording_that_begins_inside_a_group_of_pictures(clip, tmp_path, suffix):
    with av.open(str(clip)) as source:
        key = next(number for number, packet in enumerate(source.demux(video=0)) if packet.is_keyframe and number > 5)
    info = probe(remux(clip, tmp_path / f"cut.{suffix}", _without_first(5)))
    assert info.frame_count == 60 - key
    assert read_numbers(frames(info)) == list(range(key, 60))
    assert read_numbers(decode_frames(info, [59 - key, 0, 20])) == [59, key, key + 20]
    np.testing.assert_allclose(info.times, np.arange(60 - key) / 25, atol=2e-3)
    assert "are left out" in info.repairs[-1]


@pytest.mark.parametrize(
    ("suffix", "codec"), [("ts", "mpeg2video"), ("mpg", "mpeg2video"), ("avi", "mpeg4"), ("h264", "libx264")]
)
def test_frames_and_decode_frames_agree_on_a_cut_stream(tmp_path, suffix, codec):
    """Of open groups too, whose first frames need a picture before the key frame."""
    whole = encode(tmp_path / "whole.mkv", codec=codec, b_frames=2)
    path = remux(whole, tmp_path / f"cut.{suffix}", _without_first(7))
    info = probe(path)
    streamed = read_numbers(frames(info))
    assert len(streamed) == info.frame_count >= 40
    assert read_numbers(decode_frames(info, range(info.frame_count))) == streamed
    assert streamed[-1] == 59


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_frames_and_decode_frames_agree_on_damage_inside(tmp_path, suffix):
    def spoil(packets, time_base):
        spoiled = []
        for number, packet in enumerate(packets):
            if 13 <= number < 17:
                broken = av.Packet(bytes(packet)[:12] + bytes(packet.size - 12))
                broken.pts, broken.dts, broken.time_base = packet.pts, packet.dts, packet.time_base
                packet = broken
            spoiled.append(packet)
        return spoiled

    clip = encode(tmp_path / "a.mp4", b_frames=0)
    info = probe(remux(clip, tmp_path / f"damaged.{suffix}", spoil))
    streamed = list(frames(info))
    assert len(streamed) == info.frame_count
    assert read_numbers(decode_frames(info, range(info.frame_count))) == read_numbers(streamed)
    assert read_numbers(streamed[:12]) == list(range(12)) and read_numbers(streamed[-20:]) == list(range(40, 60))


def test_a_lost_end_is_an_error_unless_asked_to_stand_in(tmp_path):
    path = encode(tmp_path / "a.mp4", muxing={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)] + bytes(len(data) - int(len(data) * 0.6)))
    info = probe(path)
    with pytest.raises(VideoError, match="can be decoded"):
        list(frames(info))
    lenient = read_numbers(frames(info, strict=False))
    assert len(lenient) == 60 and lenient[:10] == list(range(10)) and len(set(lenient[-15:])) == 1


def test_the_picture_alone_begins_the_clock_whatever_a_file_says_of_decoding(tmp_path):
    info = probe(encode(tmp_path / "a.avi", 10, codec="mpeg4", b_frames=2))
    assert (info.start_time, info.frame_count) == (0.0, 10)
