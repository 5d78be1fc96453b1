"""Any JSON value in any field gives samples, a listed bad record or a `SampleError`: nothing else, and soon."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge_stg.data import GroundingSample, SampleStore, read_dataset, read_samples, write_samples
from bridge_stg.data.checking import check_dataset
from bridge_stg.data.statistics import measure_dataset
from bridge_stg.errors import SampleError
from bridge_stg.evaluation import PROTOCOLS, ConstantFloor, Prediction, evaluate, random_floor, read_predictions

from .readers.published import hcstvg_record, refcoco_instances, refcoco_refs, vidor_video, vidstg_record, write_json

RECORD = {
    "id": "a",
    "video": "clips/a.mp4",
    "width": 64,
    "height": 48,
    "fps": 4.0,
    "frame_count": 24,
    "task": "stvg",
    "sentence": "the red circle that moves left",
    "sentence_type": "declarative",
    "tier": "twins",
    "segment": [2, 20],
    "interval": [4, 10],
    "boxes": {"4": [1.0, 2.0, 30.5, 40.0], "5": [2.0, 2.0, 31.5, 40.0]},
    "answer": "from 1 to 2",
}
VIDSTG = [vidstg_record()]
VIDOR = vidor_video({0: {15: (1, 2, 3, 4)}, 1: {15: (1, 2, 3, 4), 16: (1, 2, 3, 4)}}, frames=17)
HCSTVG = {version: {"1_a.mp4": hcstvg_record(version, bbox=[[1, 2, 3, 4], [5, 6, 7, 8]])} for version in (1, 2)}
ANSWER = {"id": "a", "interval": [4, 8], "boxes": {"4": [0, 0, 9, 9]}, "oracle_boxes": {"5": [0, 0, 9, 9]}}

NUMBERS = (0, -1, 0.5, 1e-300, 1e300, 1e308, 10**9, 10**10, 10**18, 10**400, 2**31 - 1, float("nan"), float("inf"))
TEXTS = ("", " ", "\ud800", "$x^$", "[/a]", "a\0b", "\x1b[2J", "../" * 2_000, "x" * 300, "12", "\u2028")
VALUES = (
    *NUMBERS,
    *TEXTS,
    None,
    True,
    [],
    {},
    [[]],
    {"a": {}},
    [1, 2],
    [1, 2, 3, 4],
    json.loads("[" * 300 + "]" * 300),
)
DEEP = "[" * 1_100 + "]" * 1_100
RAW = (DEEP, "9" * 5_000, "NaN", "-Infinity", '"\\ud800"')  # what `json.dumps` does not write

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value, here=()):
    """Paths of every value below `value`, itself included."""
    yield here
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in below:
        yield from places(found, (*here, key))


def with_value(document, place, value):
    """The document with another value at a place."""
    if not place:
        return value
    document = copy.deepcopy(document)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return document


def texts(document):
    """The document as JSON, with every odd value at every place."""
    for place in places(document):
        marked = json.dumps(with_value(document, place, "@@"))
        yield from (marked.replace('"@@"', json.dumps(value)) for value in VALUES)
        yield from (marked.replace('"@@"', raw) for raw in RAW)


def use(source, format, **options):
    """Everything that is done with a dataset; every sample passes, every problem is one sentence."""
    try:
        found = read_dataset(source, format, **options)
    except SampleError as error:
        assert_sentence(str(error))
        return
    for problem in (*found.skipped, *found.notes):
        assert_sentence(problem.reason)
    check_dataset((*found.samples, *found.skipped, *found.notes))
    json.dumps(measure_dataset(found.samples).to_dict(), allow_nan=False)
    write_samples(source.with_suffix(".out"), found.samples)
    if found.samples:
        assert [sample.id for sample in read_samples(source.with_suffix(".out"))] == [s.id for s in found.samples]


def assert_sentence(text):
    assert text.endswith(".") and "\n" not in text and len(text) < 1_000 and text.encode(), text[:2_000]


def test_every_odd_value_in_every_field_of_a_sample(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(RECORD | {"id": "good"})
    for text in texts(RECORD):
        path.write_text(f"{text}\n{good}\n", encoding="utf-8")
        use(path, "jsonl")
        store = SampleStore(path)
        assert store[len(store) - 1].id == "good"
        assert len(store) + len(store.problems) == 2


@pytest.mark.parametrize(
    ("format", "document", "options"),
    [
        ("vidstg", VIDSTG, {}),
        ("vidstg", VIDSTG, {"boxes": "vidor.json"}),
        ("hcstvg-v1", HCSTVG[1], {}),
        ("hcstvg-v2", HCSTVG[2], {}),
        ("refcoco", refcoco_refs(), {"boxes": "instances.json"}),
        ("vidor", VIDOR, {"boxes": "vidor.json"}),
        ("instances", refcoco_instances(), {"boxes": "instances.json"}),
    ],
)
def test_every_odd_value_in_every_field_of_a_dataset(tmp_path, format, document, options):
    beside = {"vidor": ("vidor.json", "vidstg", VIDSTG), "instances": ("instances.json", "refcoco", refcoco_refs())}
    write_json(tmp_path / "vidor.json", VIDOR)
    write_json(tmp_path / "instances.json", refcoco_instances())
    options = {name: tmp_path / file for name, file in options.items()}
    source = tmp_path / "source.json"
    for text in texts(document):
        if format in beside:
            file, kind, main = beside[format]
            write_json(source, main)
            (tmp_path / file).write_text(text, encoding="utf-8")
        else:
            kind = format
            source.write_text(text, encoding="utf-8")
        use(source, kind, **options)


@FEW
@given(place=st.sampled_from(list(places(RECORD))), value=any_json)
def test_any_value_in_any_field_of_a_sample(tmp_path, place, value):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(with_value(RECORD, place, value)) + "\n", encoding="utf-8")
    use(path, "jsonl")


@FEW
@given(start=st.text(max_size=12), end=st.text(max_size=12), sentence=st.text(max_size=30))
def test_any_text_in_charades(tmp_path, start, end, sentence):
    path = tmp_path / "a.txt"
    path.write_bytes(f"AO8RW {start} {end}##{sentence}\n".encode("utf-8", "surrogatepass"))
    use(path, "charades-sta")


def test_every_odd_value_in_every_field_of_a_prediction(tmp_path):
    path = tmp_path / "p.jsonl"
    sample = GroundingSample.from_record(RECORD)
    for text in texts(ANSWER):
        path.write_text(text + "\n", encoding="utf-8")
        try:
            predictions = read_predictions(path)
        except SampleError as error:
            assert_sentence(str(error).removeprefix(str(path)))
            continue
        for protocol in PROTOCOLS.values():
            json.dumps(evaluate([sample], predictions, protocol).summary, allow_nan=False)


@FEW
@given(
    frame_count=st.integers(1, 2**31 - 1),
    fps=st.floats(1e-6, 1e6),
    start=st.floats(0, 1e6),
    length=st.floats(1e-9, 1e9),
    answer=st.tuples(st.integers(0, 2**31), st.integers(0, 2**31)).map(sorted),
)
def test_scores_of_the_longest_clips_take_no_time(frame_count, fps, start, length, answer):
    """None of these would end if a protocol or a floor walked from frame to frame."""
    try:
        sample = GroundingSample(
            id="a",
            video="a.mp4",
            sentence="a dog",
            width=64,
            height=48,
            fps=fps,
            frame_count=frame_count,
            interval=(start, start + length),
            boxes={0: (0, 0, 9, 9), frame_count - 1: (0, 0, 9, 9)},
        )
    except SampleError:
        return
    prediction = Prediction("a", tuple(answer), {0: (0, 0, 9, 9), 2**31 - 1: (1, 1, 9, 9)})
    floors = [*random_floor([sample]), *ConstantFloor.fit([sample]).predict([sample])]
    for protocol in PROTOCOLS.values():
        for found in (prediction, *floors):
            for score in evaluate([sample], [found], protocol).scores:
                assert 0 <= score.tIoU <= 1 and 0 <= score.vIoU <= 1 and 0 <= score.gt_vIoU <= 1
