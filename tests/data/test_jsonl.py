"""Whatever a line or a file holds, the reader gives a value or one sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from bridge_stg.data.jsonl import iterate_records, numbered_lines, parse_line, read_json, read_records
from bridge_stg.data.values import shown
from bridge_stg.errors import SampleError


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', r"not JSON that can be read: Expecting value \(column 7\)\."),
        (b"[" * 1_000 + b"]" * 1_000, "its brackets are nested too deeply"),
        (b"[" * 100_000, "its brackets are nested too deeply"),
        (b'{"a": ' * 100_000, "its brackets are nested too deeply"),
        (b"9" * 5_000, "it holds an integer of too many digits"),
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
    first, second = numbered_lines(path, "lines")
    assert first == (1, 0, "\ufeffone\u2028\x0c\x85two\r\n".encode())
    assert second == (4, path.read_bytes().index(b"three"), b"three")
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
        (b"[1,", r"a\.json cannot be read as numbers: Expecting value \(column 4\)\."),
        (b"[1,\n2,", r"a\.json cannot be read as numbers: Expecting value \(line 2, column 3\)\."),
        (b"[" * 100_000, "cannot be read as numbers: its brackets are nested too deeply"),
        (b'["' + b"9" * 5_000 + b'", ' + b"9" * 5_000 + b", ", "cannot be read as numbers: Expecting value"),
        (b"\xff\xfe", "cannot be read as numbers: 'utf-8' codec"),
    ],
)
def test_a_file_that_is_no_value_is_one_sentence(tmp_path, data, reason):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(SampleError, match=reason):
        read_json(path, "numbers")


@dataclass(frozen=True)
class Record:
    id: str

    @classmethod
    def build(cls, value):
        if not isinstance(value, str):
            raise SampleError(f"a record must be a text, got {value!r}.")
        return cls(value)


def test_records_are_read_to_the_end_and_an_id_comes_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('"a"\n\n7\n"b"\n{\n"a"\n"c"')
    found = [(line.number, record) for line, record in iterate_records(path, "texts", Record.build)]
    assert [(n, record.id) for n, record in found if isinstance(record, Record)] == [(1, "a"), (4, "b"), (7, "c")]
    bad = {number: str(record) for number, record in found if isinstance(record, SampleError)}
    assert bad[3] == "a record must be a text, got 7." and bad[5].startswith("not JSON that can be read: ")
    assert bad[6] == "id 'a' was already used in line 1; ids must be unique."
    with pytest.raises(SampleError, match=r"a\.jsonl:3: a record must be a text, got 7\."):
        read_records(path, "texts", Record.build)


def test_a_file_without_a_record_is_refused_where_it_may_not_be_empty(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n \n")
    assert read_records(path, "texts", Record.build, may_be_empty=True) == []
    with pytest.raises(SampleError, match=r"a\.jsonl holds no record; texts needs at least one line\."):
        read_records(path, "texts", Record.build)


def test_a_message_stays_short_whatever_the_value():
    nested = json.loads("[" * 200 + "]" * 200)
    for value in ("x" * 10_000, [0] * 10_000, 10**5_000, nested, "\ud800", {"a" * 999: [[[[1]]]]}):
        assert len(shown(value).encode()) < 300
