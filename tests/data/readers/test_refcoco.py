"""RefCOCO references, and pickles that must not run."""

from __future__ import annotations

import os
import pickle

import pytest

from bridge_stg.data.readers import Dataset, read_refcoco
from bridge_stg.data.readers.unpickling import load_plain_pickle
from bridge_stg.errors import SampleError

from .published import refcoco_instances, refcoco_refs, write_json


def folder_of(tmp_path, refs=None, protocol=2):
    write_json(tmp_path / "instances.json", refcoco_instances())
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs or refcoco_refs(), protocol=protocol))
    return tmp_path


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_sentence_is_a_one_frame_sample(tmp_path, protocol):
    data = Dataset.collect(read_refcoco(folder_of(tmp_path, protocol=protocol), split="testA"))
    assert not data.skipped and not data.notes
    assert [(s.id, s.sentence) for s in data.samples] == [("7-20", "woman in red"), ("7-21", "left lady")]
    sample = data.samples[0]
    assert (sample.task, sample.frame_count, sample.interval) == ("referring", 1, None)
    assert sample.video == "COCO_train2014_000000000003.jpg"
    assert dict(sample.boxes) == {0: (10.5, 20.0, 110.5, 220.0)}
    assert (sample.width, sample.height) == (640, 480)
    assert len(Dataset.collect(read_refcoco(tmp_path)).samples) == 3


def test_references_as_json(tmp_path):
    write_json(tmp_path / "instances.json", refcoco_instances())
    data = Dataset.collect(read_refcoco(write_json(tmp_path / "refs.json", refcoco_refs())))
    assert len(data.samples) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ann_id": 99}, "ann_id 99 of a reference is not in the instances."),
        ({"image_id": 99}, "image_id 99 of a reference is not in the instances."),
        ({"sentences": "x"}, "sentences must be an array, got str."),
        ({"sentences": [{"raw": "x"}]}, "a sentence of a reference has no key 'sent'"),
        ({"sentences": [{"sent": ""}]}, "sentence must be a non-empty text"),
    ],
)
def test_broken_references_are_skipped_with_a_reason(tmp_path, change, reason):
    data = Dataset.collect(read_refcoco(folder_of(tmp_path, refcoco_refs(**change))))
    assert len(data.samples) == 1
    assert reason in data.skipped[0].reason


def test_a_box_of_negative_size_is_one_sentence(tmp_path):
    instances = refcoco_instances()
    instances["annotations"][0]["bbox"] = [10, 20, -5, 4]
    refs = folder_of(tmp_path)
    data = Dataset.collect(read_refcoco(refs, write_json(tmp_path / "other.json", instances)))
    assert data.skipped[0].reason == "bbox must have w >= 0 and h >= 0, got [10, 20, -5, 4]."


def test_files_and_splits_that_are_not_there(tmp_path):
    with pytest.raises(SampleError, match=r"must hold one refs\(\.\.\.\)\.p or refs\*\.json, found none"):
        list(read_refcoco(tmp_path))
    folder_of(tmp_path)
    with pytest.raises(SampleError, match=r"split must be one of testA, train in .*, got 'testB'\."):
        list(read_refcoco(tmp_path, split="testB"))
    (tmp_path / "instances.json").unlink()
    with pytest.raises(SampleError, match=r"instances\.json cannot be read as COCO instances: No such file"):
        list(read_refcoco(tmp_path))


class Mischief:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_runs_nothing(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([Mischief(tmp_path / "done")]))
    with pytest.raises(SampleError, match=r"it asks for posix\.mkdir, and only plain values and containers"):
        load_plain_pickle(path)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("code", [b"cbuiltins\neval\n(S'1'\ntR.", b"c__builtin__\ngetattr\n.", b"cnumpy\narray\n."])
def test_no_function_is_found(tmp_path, code):
    path = tmp_path / "refs.p"
    path.write_bytes(code)
    with pytest.raises(SampleError, match="only plain values and containers are admitted"):
        load_plain_pickle(path)


def test_plain_containers_and_python_2_texts_are_read(tmp_path):
    path = tmp_path / "refs.p"
    value = [{"a": (1, 2.5, None), "b": {3}}, frozenset((1,)), "texte é"]
    path.write_bytes(pickle.dumps(value))
    assert load_plain_pickle(path) == value
    path.write_bytes(b"(lp0\nS'caf\\xc3\\xa9'\np1\na.")  # a byte string of Python 2
    assert load_plain_pickle(path) == ["café"]


def test_a_truncated_pickle_is_one_sentence(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(refcoco_refs())[:-40])
    with pytest.raises(SampleError, match="cannot be read as a pickle of plain data"):
        load_plain_pickle(path)
    with pytest.raises(SampleError, match="cannot be read as a pickle: No such file"):
        load_plain_pickle(tmp_path / "none.p")


def doubled(levels):
    """A key whose hash takes 2^levels steps: a tuple of the same tuple twice, and so on."""
    level = b"".join(b"q%ch%c\x86" % (i, i) for i in range(levels))
    return b"\x80\x02}()" + level + b"Nu."


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (b"\x80\x02]r\xff\xff\xff\x0f.", "it asks for 268435455 places for what it repeats, more than it has bytes"),
        (b"(lp999999999\n.", "it asks for 999999999 places"),
        (doubled(60), "it refers to one tuple from several places"),
        (b"\x80\x02}()2\x86Nu.", r"it has the opcode b'2' at byte 5, which no plain data needs"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\x01\x00\x00\x00a.", "pickle data was truncated"),
        (b"I" + b"9" * 100_000 + b"\n.", "could not convert string to int"),
        (b"(lp0\nS'a", "pickle data was truncated"),
    ],
    ids=range(7),
)
def test_a_few_bytes_cannot_ask_for_gigabytes_or_hours(tmp_path, code, reason):
    path = tmp_path / "refs.p"
    path.write_bytes(code)
    with pytest.raises(SampleError, match=reason):
        load_plain_pickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_and_every_opcode_of_plain_data(tmp_path, protocol):
    text = "repeated"
    value = [text, text, "x" * 300, "y" * 70_000, b"bytes", 1, 300, 70_000, -1, 2**40, 2**2_000, 1.5, None, True, False]
    value += [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {1}, frozenset((2,)), {"a": text}]
    value += [[i] for i in range(400)]
    if protocol < 3:
        value.remove(b"bytes")  # a call of codecs.encode in them
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert load_plain_pickle(path) == value


@pytest.mark.parametrize("table", ["images", "annotations"])
@pytest.mark.parametrize("broken", [{"id": [5]}, {"id": {}}, {"id": None}, {}, 7])
def test_a_broken_entry_of_the_instances_is_its_own_problem(tmp_path, table, broken):
    instances = refcoco_instances()
    instances[table].append(broken)
    refs = folder_of(tmp_path)
    data = Dataset.collect(read_refcoco(refs, write_json(tmp_path / "other.json", instances)))
    assert len(data.samples) == 3
    assert [problem.id for problem in data.skipped] == [f"{table} 1"]
    assert "it must be an object with a number or a text as id, got" in data.skipped[0].reason


def test_an_entry_of_the_instances_that_comes_twice_is_listed(tmp_path):
    instances = refcoco_instances()
    instances["images"].append(instances["images"][0] | {"width": 1})
    refs = folder_of(tmp_path)
    data = Dataset.collect(read_refcoco(refs, write_json(tmp_path / "other.json", instances)))
    assert {sample.width for sample in data.samples} == {640}
    assert data.skipped[0].reason == "id 3 was already used; ids must be unique."
