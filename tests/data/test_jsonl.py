"""Whatever a line or a file holds, the reader gives a value or one sentence."""

from __future__ import annotations

import json

import pytest

from bridge_stg.data.jsonl import UniqueIds, numbered_lines, parse_line, read_json
from bridge_stg.data.values import shown
from bridge_stg.errors import SampleError


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', r"not a complete JSON object: Expecting value \(column 7\)\."),
        (b"[" * 1_000 + b"]" * 1_000, "its brackets are nested too deeply"),
        (b"[" * 100_000, "its brackets are nested too deeply"),
        (b'{"a": ' * 100_000, "its brackets are nested too deeply"),
        (b"9" * 5_000, "a number in it has thousands of digits"),
        (b'{"a": ["x \\ud800"]}', r"half a character, which UTF-8 cannot hold: 'x \\ud800'"),
        (b'{"\\uDFFF": 1}', "half a character"),
        (b'"\xff"', "not UTF-8 text: invalid start byte at byte 1"),
        ('"a"'.encode("utf-16"), "not UTF-8 text"),
        (b'"\xed\xa0\x80"', "not UTF-8 text"),  # a surrogate written as bytes
    ],
    ids=range(10),
)
def test_a_line_that_is_no_value_is_one_sentence(line, reason):
    with pytest.raises(SampleError, match=reason) as caught:
        parse_line(line)
    assert str(caught.value).endswith(".") and len(str(caught.value)) < 300


def test_what_json_allows_is_read():
    assert parse_line(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    assert parse_line('"\u2028\x85"'.encode()) == "\u2028\x85"
    assert parse_line(b"1" + b"0" * 400) == 10**400


def test_lines_end_at_line_feeds_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeffone\u2028\x0c\x85two\r\n\n \nthree".encode())
    assert list(numbered_lines(path, "lines")) == [(1, "one\u2028\x0c\x85two".encode()), (4, b"three")]
    with pytest.raises(SampleError, match=r"none cannot be read as lines: No such file or directory\."):
        list(numbered_lines(tmp_path / "none", "lines"))
    with pytest.raises(SampleError, match=r"cannot be read as lines: embedded null byte\."):
        list(numbered_lines("a\0b", "lines"))


def test_a_file_keeps_what_only_a_record_is_unfit_for(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff[%s, NaN, "\\ud800", 7]' % ("9" * 5_000), encoding="utf-8")
    far, nan, half, seven = read_json(path, "numbers")
    assert far == float("inf") and nan != nan and half == "\ud800" and seven == 7


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[1,", r"a\.json is not complete JSON: Expecting value \(line 1, column 4\)"),
        (b"[" * 100_000, "cannot be read as numbers: its brackets are nested too deeply"),
        (b'["' + b"9" * 5_000 + b'", ' + b"9" * 5_000 + b", ", "is not complete JSON"),
        (b"\xff\xfe", "cannot be read as numbers: 'utf-8' codec"),
    ],
)
def test_a_file_that_is_no_value_is_one_sentence(tmp_path, data, reason):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(SampleError, match=reason):
        read_json(path, "numbers")


def test_an_id_comes_once():
    ids = UniqueIds()
    ids.add("a", 1)
    ids.add("b", 2)
    with pytest.raises(SampleError, match=r"^id 'a' was already used in line 1; ids must be unique\.$"):
        ids.add("a", 7)


def test_a_message_stays_short_whatever_the_value():
    nested = json.loads("[" * 200 + "]" * 200)
    for value in ("x" * 10_000, [0] * 10_000, 10**5_000, nested, "\ud800", {"a" * 999: [[[[1]]]]}):
        assert len(shown(value).encode()) < 300
