"""What a viewer sees: orientation, shape of pixels, colours."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from bridge_stg.data import decode_frames, frames, probe, write_video
from bridge_stg.errors import VideoError

from .clips import solid

# The (a, b, c, d) of a display matrix, and what it does to an upright picture beforehand.
MATRICES = {
    "turn 90": ((0, 1, -1, 0), np.rot90),
    "turn 180": ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
    "turn 270": ((0, -1, 1, 0), lambda picture: np.rot90(picture, 3)),
    "mirror x": ((-1, 0, 0, 1), np.fliplr),
    "mirror y": ((1, 0, 0, -1), np.flipud),
    "transpose": ((0, 1, 1, 0), lambda picture: picture.transpose(1, 0, 2)),
    "transverse": ((0, -1, -1, 0), lambda picture: np.rot90(picture, 2).transpose(1, 0, 2)),
}


def corner():
    """Every turn and mirror image of it looks different."""
    picture = np.full((64, 96, 3), 20, np.uint8)
    picture[:24, :24] = (200, 30, 30)
    picture[40:, :12] = (30, 30, 200)
    return picture


def assert_alike(got, want, tolerance=4):
    got = np.asarray(got)
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want).mean() < tolerance


@pytest.mark.parametrize("name", MATRICES)
def test_every_display_matrix_comes_out_upright(tmp_path, name):
    (a, b, c, d), store = MATRICES[name]
    path = tmp_path / "clip.mp4"
    write_video(path, [np.ascontiguousarray(store(corner()))] * 4, fps=4)
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    matrix = [value << 16 for value in (a, b, 0, c, d, 0, 0, 0)]
    data[place : place + 36] = struct.pack(">9i", *matrix, 1 << 30)
    path.write_bytes(data)
    info = probe(path)
    assert (info.width, info.height) == (96, 64)
    assert_alike(decode_frames(info, [2])[0], corner())
    assert_alike(next(frames(info)), corner())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_every_exif_orientation_comes_out_upright(tmp_path, suffix, orientation):
    path = tmp_path / f"photo.{suffix}"
    image = Image.fromarray(corner())
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as saved:
        want = np.asarray(ImageOps.exif_transpose(saved).convert("RGB"))
    info = probe(path)
    assert (info.height, info.width) == want.shape[:2]
    assert_alike(decode_frames(info, [0])[0], want)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "ppm", "tiff"])
def test_images_of_every_kind_decode(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    picture = np.zeros((120, 162, 3), np.uint8)
    picture[:60, :80] = 255
    Image.fromarray(picture).save(path)
    info = probe(path)
    assert (info.width, info.height, info.frame_count) == (162, 120, 1)
    got = decode_frames(path, [0, 0])
    assert_alike(got[1], picture)
    assert (next(frames(path)) == got[0].numpy()).all()


def test_dots_an_inch_are_no_shape_of_pixels(tmp_path):
    for suffix in ("png", "jpg"):
        Image.new("RGB", (64, 48)).save(tmp_path / f"photo.{suffix}", dpi=(300, 150))
        info = probe(tmp_path / f"photo.{suffix}")
        assert (info.width, info.height) == (64, 48)


def test_animated_gif(tmp_path):
    pictures = [Image.new("L", (32, 32), 25 * number) for number in range(8)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100] * 7 + [1000])
    info = probe(tmp_path / "a.gif")
    np.testing.assert_allclose(info.times, np.arange(8) / 10)
    assert info.duration == pytest.approx(1.7)
    means = decode_frames(info, [7, 0, 3]).float().mean((1, 2, 3))
    np.testing.assert_allclose(means, [175, 0, 75], atol=4)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "libx264"), ("ts", "mpeg2video"), ("mov", "mpeg4")],
)
@pytest.mark.parametrize(("size", "pixel", "shown"), [((64, 48), "4/3", (85, 48)), ((64, 48), "3/4", (64, 64))])
def test_pixels_that_are_not_square_are_stretched(tmp_path, suffix, codec, size, pixel, shown):
    if codec == "mpeg2video":  # which states the shape of the picture: 16:9 or 4:3
        pixel, shown = ("4/3", (85, 48)) if pixel == "4/3" else ("1", (64, 48))
    path = solid(tmp_path / f"clip.{suffix}", size=size, pixel=pixel, codec=codec)
    info = probe(path)
    assert (info.width, info.height) == shown
    assert decode_frames(info, [1]).shape == (1, *shown[::-1], 3)
    assert next(frames(info)).shape == (*shown[::-1], 3)


def test_a_pixel_of_nonsense_is_square(tmp_path):
    info = probe(solid(tmp_path / "clip.mp4", pixel="1000"))
    assert (info.width, info.height) == (64, 64)


RED = (200, 30, 30)
HD, SD = (1280, 720), (640, 480)


@pytest.mark.parametrize(
    ("size", "tags", "matrix", "full"),
    [
        (HD, "", 1, False),
        (SD, "", 5, False),
        (HD, "colormatrix=smpte170m", 5, False),
        (SD, "colormatrix=bt709", 1, False),
        (SD, "colormatrix=bt470bg", 5, False),
        (SD, "colormatrix=bt2020nc", 9, False),
        (HD, "fullrange=on", 1, True),
        (SD, "fullrange=on", 5, True),
    ],
)
def test_colours_follow_the_tags_and_the_size_without_them(tmp_path, size, tags, matrix, full):
    path = solid(tmp_path / "clip.mp4", RED, size, tags=tags, matrix=matrix, full=full)
    got = decode_frames(path, [1])[0, size[1] // 2, size[0] // 2].tolist()
    assert np.abs(np.subtract(got, RED)).max() < 6, got


@pytest.mark.parametrize("matrix", ["YCgCo", "ICtCp", "chroma-derived-nc", "chroma-derived-c", "bt2020c"])
def test_colours_that_cannot_be_converted_are_one_sentence(tmp_path, matrix):
    path = solid(tmp_path / "clip.mp4", tags=f"colormatrix={matrix}")
    for read in (lambda: decode_frames(path, [0]), lambda: next(frames(path))):
        with pytest.raises(
            VideoError, match=r"clip\.mp4 cannot be converted to RGB from yuv420p in the colours"
        ) as caught:
            read()
        assert str(caught.value).endswith(".")


def test_the_size_of_a_frame_may_change_in_the_stream(tmp_path):
    parts = [solid(tmp_path / f"{side}.ts", size=(side, side)) for side in (64, 96)]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    info = probe(tmp_path / "joined.ts")
    assert info.frame_count == 8
    assert decode_frames(info, range(8)).shape == (8, 64, 64, 3)


def test_written_video_is_read_in_the_colours_it_was_drawn(tmp_path):
    """PyAV's default matrix is BT.601, and untagged video of 720 lines is read as BT.709."""
    for size in (HD, SD):
        write_video(tmp_path / "clip.mp4", [np.full((*size[::-1], 3), RED, np.uint8)] * 2, fps=4)
        got = decode_frames(tmp_path / "clip.mp4", [1])[0, 100, 100].tolist()
        assert np.abs(np.subtract(got, RED)).max() < 6, (size, got)
