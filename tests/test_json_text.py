"""JSON is written as every parser takes it, and read with one reason for what cannot be."""

import json

import pytest

from bridge_stg.json_text import dump_json, parse_json


def test_what_is_written_is_plain_ascii():
    value = {"id": "é\u2028\ud800\x1b", "box": [1, 2.5, None, True]}
    text = dump_json(value)
    assert text.isascii() and text.isprintable() and json.loads(text) == value


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused(number):
    with pytest.raises(ValueError, match="not finite"):
        dump_json({"deep": [{"box": number}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"^Expecting property name .* \(column 2\)$"),
        (b"\xff", "^it is not UTF-8$"),
        ("9" * 5000, "^it holds an integer of too many digits$"),
        ("[" * 100_000, "^its brackets are nested too deeply$"),
    ],
)
def test_what_cannot_be_read_has_one_reason(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
