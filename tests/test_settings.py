"""One schema for settings of every kind: a mistake is one sentence with the field, the value and the rule."""

from dataclasses import dataclass, field

import pytest

from bridge_stg.errors import ConfigError, ModelError
from bridge_stg.settings import Rule, build, check_fields, limit, parse_bool, rules_of

SCHEMA = {
    "gate": Rule(bool),
    "keep": Rule(float, above=0, most=1),
    "layers": Rule(int, least=1),
    "mean": Rule(list, each=Rule(float), length=3),
    "source": Rule(str, choices=("text", "presence")),
    "name": Rule(str, optional=True, filled=True),
    "mix": Rule(dict, each=Rule(float, least=0)),
}


@pytest.mark.parametrize(
    ("given", "meant"),
    [(True, True), ("False", False), ("off", False), ("NO", False), ("on", True), ("Yes", True), (" true ", True)],
)
def test_a_switch_is_what_its_text_says(given, meant):
    assert parse_bool(given) is meant
    assert check_fields({"gate": given}, SCHEMA, "a file") == {"gate": meant}


def test_right_values_come_back_as_their_kind():
    values = {"keep": 1, "layers": 3, "mean": (0, 0.5, 1), "source": "text", "name": None, "mix": {"a": 1}}
    found = check_fields(values, SCHEMA, "a file")
    assert found == {**values, "mean": [0.0, 0.5, 1.0]}
    assert [type(found["keep"]), type(found["mean"][0]), type(found["mix"]["a"])] == [float] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gate": "maybe"}, "file.json: gate must be true or false, got 'maybe'."),
        ({"gate": 1}, "gate must be true or false, got 1."),
        ({"keep": float("nan")}, "keep must be a number > 0 and <= 1, got nan."),
        ({"keep": 0}, "keep must be a number > 0 and <= 1, got 0.0."),
        ({"keep": True}, "keep must be a number > 0 and <= 1, got True."),
        ({"keep": 10**400}, "keep must be a number > 0 and <= 1, got 1000"),
        ({"layers": 10**5000 - 10**5000}, "layers must be an integer >= 1, got 0."),
        ({"layers": -(10**5000)}, "layers must be an integer >= 1, got a value too large to show."),
        ({"layers": 2.0}, "layers must be an integer >= 1, got 2.0."),
        ({"mean": [1, 2]}, "mean must be a list of 3 values, each a number, got [1, 2]."),
        ({"mean": [1, 2, "x"]}, "mean[2] must be a number, got 'x'."),
        ({"source": "txt"}, "source must be one of text, presence, got 'txt'."),
        ({"source": ["text"]}, "source must be one of text, presence, got ['text']."),
        ({"name": ""}, "name must be a text that is not empty or null, got ''."),
        ({"mix": {"a": -1}}, "mix.a must be a number >= 0, got -1.0."),
        ({"mix": {1: 1}}, "mix must be a mapping, got {1: 1}."),
        ({"kep": 1}, "file.json: unknown field 'kep'; the nearest is keep."),
        ({"zzz": 1}, "unknown field 'zzz'; there are gate, keep, layers, mean, mix, name, source."),
        ({"\ud800\n": 1}, r"unknown field '\ud800\n'; there are"),
    ],
)
def test_a_mistake_names_the_field_the_value_and_the_rule(values, message):
    with pytest.raises(ConfigError) as caught:
        check_fields(values, SCHEMA, "file.json")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_error_and_the_prefix_are_the_callers():
    with pytest.raises(ModelError, match=r"m\.json: unknown field 'model\.kep'; the nearest is model\.keep\."):
        check_fields({"kep": 1}, SCHEMA, "m.json", prefix="model.", error=ModelError)


@dataclass
class Part:
    path: str
    weight: float | None = field(default=None, metadata=limit(above=0))


@dataclass
class Whole:
    steps: int = field(default=5, metadata=limit(least=1))
    parts: dict[str, Part] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list, metadata=limit(items={"most": 1}))
    part: Part = field(default_factory=lambda: Part("x"))


def test_a_dataclass_is_a_schema():
    values = {"parts": {"a": {"path": "p", "weight": 2}}, "shares": [1, 0.5], "part": {"path": "q"}}
    assert build(Whole, values, "f") == Whole(5, {"a": Part("p", 2.0)}, [1.0, 0.5], Part("q"))
    assert rules_of(Part) == {"path": Rule(str), "weight": Rule(float, above=0, optional=True)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "f: steps must be an integer >= 1, got 0."),
        ({"parts": {"a": {"weight": 1}}}, "f: parts.a.path is missing; it must be a text."),
        ({"parts": {"a": {"path": "p", "weight": 0}}}, "f: parts.a.weight must be a number > 0 or null, got 0.0."),
        ({"parts": {"a": {"path": "p", "wieght": 1}}}, "unknown field 'parts.a.wieght'; the nearest is parts.a.weight"),
        ({"part": 3}, "f: part must be a mapping, got 3."),
        ({"shares": [0.5, 2]}, "f: shares[1] must be a number <= 1, got 2.0."),
    ],
)
def test_a_mistake_in_a_dataclass_says_where(values, message):
    with pytest.raises(ConfigError) as caught:
        build(Whole, values, "f")
    assert message in str(caught.value)
