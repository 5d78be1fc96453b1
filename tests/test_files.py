"""Files appear whole or not at all, and only regular files are ever replaced."""

import os
import stat

import pytest

from bridge_stg.errors import OutputError
from bridge_stg.files import atomic_files, atomic_path, beside, ensure_writable_folder, refuse_source, write_text


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    with atomic_path(tmp_path / "new" / "a.mp4") as temporary:
        assert temporary.suffix == ".mp4"
        temporary.write_text("whole")
        assert listing(tmp_path / "new") == [temporary.name]
    assert listing(tmp_path / "new") == ["a.mp4"] and (tmp_path / "new" / "a.mp4").read_text() == "whole"


def write_a_half(folder, error):
    with atomic_path(folder / "a") as temporary:
        temporary.write_text("half")
        raise error


def write_two_halves(folder, error):
    with atomic_files(folder) as staged:
        for name in "ab":
            (staged / name).write_text("half")
        raise error


@pytest.mark.parametrize("write", [write_a_half, write_two_halves])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_the_writing_leaves_nothing(tmp_path, error, write):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error):
        write(tmp_path, error)
    assert listing(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("write", [write_a_half, write_two_halves])
def test_a_disk_that_is_full_is_one_sentence(tmp_path, write):
    with pytest.raises(OutputError, match=r" cannot be written: No space left on device\."):
        write(tmp_path, OSError(28, "No space left on device"))
    assert listing(tmp_path) == []


def test_several_files_appear_together(tmp_path):
    (tmp_path / "a").write_text("old")
    with atomic_files(tmp_path) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert listing(tmp_path) == ["a", "b"] and (tmp_path / "a").read_text() == "new"


def write_two(folder):
    with atomic_files(folder) as staged:
        for name in "ab":
            (staged / name).write_text("new")


def test_one_that_would_replace_no_file_holds_all_back(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(OutputError, match="b cannot be written: it is a folder"):
        write_two(tmp_path)
    assert listing(tmp_path) == ["b"]


def test_a_pipe_or_a_device_stays_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", os.devnull):
        with pytest.raises(
            OutputError, match="it is a device, a pipe or a socket, and only a regular file is replaced"
        ):
            write_text(path, "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_links_are_followed_and_stay_links(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "a").symlink_to("there/a")
    write_text(tmp_path / "a", "one")
    with atomic_files(tmp_path) as folder:
        (folder / "a").write_text("two")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "there" / "a").read_text() == "two"
    assert listing(tmp_path) == ["a", "there"] and listing(tmp_path / "there") == ["a"]
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OutputError, match="circle cannot be written"):
        write_text(tmp_path / "circle", "text")


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "a." + "b" * 253, "é" * 127])
def test_the_longest_names_can_be_written(tmp_path, name):
    write_text(tmp_path / name, "text")
    assert listing(tmp_path) == [name]


def test_a_name_beside_another_is_never_too_long(tmp_path):
    assert beside(tmp_path / "o.jsonl", ".run") == tmp_path / "o.jsonl.run"
    names = [beside(tmp_path / (sign * 125 + end), ".parts").name for sign in ("é", "è") for end in ("a", "b")]
    assert len(set(names)) == 4
    assert all(name.endswith(".parts") and len(os.fsencode(name)) <= 255 for name in names)


def test_a_source_is_not_written_over_by_any_name(tmp_path):
    source = tmp_path / "a"
    source.write_text("source")
    (tmp_path / "soft").symlink_to(source)
    os.link(source, tmp_path / "hard")
    for name in ("a", "soft", "hard"):
        with pytest.raises(OutputError, match="would be replaced"):
            refuse_source(source, tmp_path / "other", tmp_path / name)
    refuse_source(source, tmp_path / "other")


@pytest.mark.parametrize("name", ["file/below", "/proc/none"])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a writable folder"):
        ensure_writable_folder(tmp_path / name)


def test_a_current_folder_that_was_removed_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OutputError, match=r"a cannot be written: No such file or directory\."):
        write_text("a", "text")
