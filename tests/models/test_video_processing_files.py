"""What `BridgeSTGVideoProcessor` saves and loads: stock code reads it, and a wrong file is one sentence."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from transformers import (
    AutoProcessor,
    AutoVideoProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from bridge_stg.errors import ModelError, OutputError
from bridge_stg.models import BridgeSTGVideoProcessor
from tests.models.checkpoints import write_checkpoint

HUGGING_FACE = {"qwen2_vl": Qwen2VLVideoProcessor, "qwen3_vl": Qwen3VLVideoProcessor}
FULL = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
SMALL = {"shortest_edge": 56 * 56, "longest_edge": 84 * 112}
FILE = "video_preprocessor_config.json"
VIDEO = np.random.default_rng(0).integers(0, 256, (6, 60, 84, 3), dtype=np.uint8)
families = pytest.mark.parametrize("family", HUGGING_FACE)


@families
def test_a_saved_folder_is_the_stock_one(family, tmp_path):
    theirs = HUGGING_FACE[family](size=dict(SMALL), do_sample_frames=False, temporal_patch_size=1)
    ours = BridgeSTGVideoProcessor(family=family, size=dict(SMALL), do_sample_frames=False, temporal_patch_size=1)
    theirs.save_pretrained(tmp_path / "theirs")
    assert ours.save_pretrained(tmp_path / "ours") == [str(tmp_path / "ours" / FILE)]
    assert (tmp_path / "ours" / FILE).read_text() == (tmp_path / "theirs" / FILE).read_text()
    for reader in (AutoVideoProcessor, HUGGING_FACE[family]):
        found = reader.from_pretrained(tmp_path / "ours")
        assert type(found) is HUGGING_FACE[family] and found.to_dict() == theirs.to_dict()
    for place in (tmp_path / "ours", tmp_path / "theirs", tmp_path / "ours" / FILE):
        again = BridgeSTGVideoProcessor.from_pretrained(place, merge_size=1)
        assert type(again) is type(ours) and again.merge_size == 1
        expected = theirs(VIDEO, merge_size=1)["pixel_values_videos"]
        assert torch.equal(again(VIDEO)["pixel_values_videos"], expected)
    assert type(BridgeSTGVideoProcessor.from_json_file(tmp_path / "ours" / FILE)) is type(ours)


def test_what_was_saved_loads_where_this_package_is_not(tmp_path):
    BridgeSTGVideoProcessor(family="qwen3_vl").save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['bridge_stg'] = None; from transformers import AutoVideoProcessor as A; "
        f"print(type(A.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-1] == "Qwen3VLVideoProcessor"


@pytest.mark.parametrize("model_type", FULL)
def test_inside_the_processor_of_a_stock_model(model_type, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", model_type)
    stock = AutoProcessor.from_pretrained(folder)
    video_processor = BridgeSTGVideoProcessor.from_pretrained(folder)
    assert isinstance(video_processor, type(stock.video_processor))
    ours = FULL[model_type](stock.image_processor, stock.tokenizer, video_processor, chat_template=stock.chat_template)
    stock.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    name = "processor_config.json"
    assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    again = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert type(again.video_processor) is type(stock.video_processor)
    assert type(BridgeSTGVideoProcessor.from_pretrained(tmp_path / "ours")) is type(video_processor)
    metadata = {"fps": 6.0, "total_num_frames": 6, "frames_indices": list(range(6))}
    call = {
        "text": ["<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>what?<|im_end|>"],
        "videos": [VIDEO],
        "do_sample_frames": False,
        "return_tensors": "pt",
        **({"video_metadata": [metadata]} if model_type == "qwen3_vl" else {}),
    }
    expected, found = stock(**copy.deepcopy(call)), ours(**call)
    assert set(expected) == set(found)
    assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(expected[key])) for key in expected)


@families
@pytest.mark.parametrize(
    "options", [{}, {"patch_size": 8}, {"do_normalize": False}, {"foo": 1}, {"foo": 1, "return_unused_kwargs": True}]
)
def test_from_dict(family, options):
    values = HUGGING_FACE[family]().to_dict()
    theirs = HUGGING_FACE[family].from_dict(dict(values), **dict(options))
    ours = BridgeSTGVideoProcessor.from_dict(dict(values), **dict(options))
    if isinstance(theirs, tuple):
        assert ours[1] == theirs[1]
        ours, theirs = ours[0], theirs[0]
    assert ours.to_dict() == theirs.to_dict() and isinstance(ours, HUGGING_FACE[family])


@families
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies(family, again):
    ours = BridgeSTGVideoProcessor(family=family, size=dict(SMALL), do_sample_frames=False)
    found = again(ours)
    assert type(found) is type(ours) and found.to_dict() == ours.to_dict()
    assert torch.equal(found(VIDEO)["pixel_values_videos"], ours(VIDEO)["pixel_values_videos"])


@families
def test_one_processor_serves_several_threads(family):
    ours = BridgeSTGVideoProcessor(family=family, size=dict(SMALL), do_sample_frames=False)
    calls = [{"patch_size": patch, "image_mean": [mean] * 3} for patch in (8, 14) for mean in (0.1, 0.5)]
    expected = [ours(VIDEO, **call)["pixel_values_videos"] for call in calls]
    wrong = []

    def serve(first):
        for i in range(first, first + 8):
            found = ours(VIDEO, **calls[i % 4])["pixel_values_videos"]
            if not torch.equal(found, expected[i % 4]):
                wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object, got []"),
        ("", "not a valid JSON file"),
        ('{"patch_size": 14', "not a valid JSON file"),
        ("9" * 5000, "cannot be read: Exceeds the limit"),
        ("[" * 100_000, "cannot be read: maximum recursion depth"),
        (b"\xff\xfe{}", "cannot be read: 'utf-8' codec can't decode"),
        ('{"patch_size": "x"}', "patch_size must be an integer >= 1"),
        ('{"patch_size": %s}' % ("9" * 4000), "patch_size must be an integer >= 1"),
        ('{"patch_sise": 14}', "'patch_sise' is not a setting; it must be patch_size"),
        ('{"image_mean": [NaN, 0, 0]}', "image_mean must be a number or one a channel, got [nan, 0, 0]"),
        ('{"image_mean": "\\ud800"}', "image_mean must be a number or one a channel, got '\\ud800'"),
        ('{"image_std": [0, 0, 0]}', "image_std must leave normalised pixels finite"),
        ('{"rescale_factor": 1e999}', "rescale_factor must be a number or null, got inf"),
        ('{"size": {"shortest_edge": NaN}}', "size.shortest_edge must be a number"),
        ('{"fps": []}', "fps must be a number or null, got []"),
        ('{"do_resize": "no"}', "do_resize must be true or false or null, got 'no'"),
        ('{"video_processor_type": "LlavaVideoProcessor"}', "video_processor_type must be one of Qwen2-VL or Qwen3-VL"),
    ],
)
def test_a_wrong_file_is_one_sentence(text, message, tmp_path):
    (tmp_path / FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ModelError, OSError, ValueError)) as caught:
        BridgeSTGVideoProcessor.from_pretrained(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_written_is_left_alone(tmp_path, monkeypatch):
    BridgeSTGVideoProcessor().save_pretrained(tmp_path)
    before = (tmp_path / FILE).read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        BridgeSTGVideoProcessor(patch_size=8).save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_text() == before and json.loads(before)["patch_size"] == 14
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_without_torchvision_it_is_the_one_thing_missing():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torchvision" else find(name, *rest)
sys.modules["torchvision"] = None
from bridge_stg.models import BridgeSTGProcessor, load_model
load_model().processor.frame_grid(64, 80)
try:
    from bridge_stg.models import BridgeSTGVideoProcessor
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip().startswith("BridgeSTGVideoProcessor needs torchvision")
