"""`BridgeSTGProcessor`: its settings are checked, its files written whole, a torn one named; threads may share it."""

import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from bridge_stg.errors import ConfigError, ModelError, OutputError
from bridge_stg.models import BridgeSTGForVideoGrounding, BridgeSTGProcessor
from bridge_stg.models.processor_settings import check_processor_settings
from tests.models.checkpoints import write_checkpoint

FILES = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
WRONG = [
    ("fps", "x", "fps must be a number > 0, got 'x'"),
    ("fps", 0, "fps must be a number > 0, got 0.0"),
    ("fps", float("nan"), "fps must be a number > 0, got nan"),
    ("fps", 10**400, "fps must be a number > 0, got 1000"),
    ("fps", None, "fps must be a number > 0, got None"),
    ("patch_size", 8.0, "patch_size must be an integer >= 1"),
    ("patch_size", True, "patch_size must be an integer >= 1"),
    ("merge_size", 0, "merge_size must be an integer >= 1"),
    ("temporal_patch_size", -2, "temporal_patch_size must be an integer >= 1"),
    ("max_frames", "24", "max_frames must be an integer >= 1"),
    ("max_pixels", 10**4000, "max_pixels must be an integer >= 1"),
    ("min_pixels", [], "min_pixels must be an integer >= 1"),
    ("bridge_tokens", -1, "bridge_tokens must be an integer >= 0"),
    ("image_mean", 0.5, "image_mean must be a list of 3 values, each a number, got 0.5"),
    ("image_mean", [0.5, 0.5], "image_mean must be a list of 3 values"),
    ("image_mean", [0.5, float("inf"), 0.5], "image_mean[1] must be a number, got inf"),
    ("image_mean", [1e39] * 3, "image_mean must leave normalised pixels finite"),
    ("image_std", [0.5, 0.0, 0.5], "image_std[1] must be a number > 0, got 0.0"),
    ("image_std", [1e-60] * 3, "image_std must leave normalised pixels finite"),
    ("timestamp_format", 1, "timestamp_format must be a text, got 1"),
    ("timestamp_format", "{} {}", "timestamp_format must format one number"),
    ("timestamp_format", "{:d}", "timestamp_format must format one number"),
    ("timestamp_format", "{seconds}", "timestamp_format must format one number"),
    ("prompt_prefix", "\ud800", r"prompt_prefix must hold no lone surrogate, got '\ud800'"),
    ("prompt_suffix", None, "prompt_suffix must be a text, got None"),
    ("max_framez", 3, "unknown field 'max_framez'; the nearest is max_frames"),
]


@pytest.mark.parametrize(("name", "value", "message"), [row for row in WRONG if row[0] != "max_framez"])
def test_the_constructor_checks_its_settings(processor, name, value, message):
    with pytest.raises(ConfigError) as caught:
        BridgeSTGProcessor(processor.tokenizer, **{name: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_settings_are_checked_by_themselves(name, value, message):
    with pytest.raises(ConfigError) as caught:
        check_processor_settings({name: value}, "run.yaml", prefix="processor.")
    assert str(caught.value).startswith("run.yaml: ") and f"processor.{name}" in str(caught.value)


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_field_of_a_file_is_one_sentence(processor, tmp_path, name, value, message):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ModelError) as caught:
        BridgeSTGProcessor.from_pretrained(tmp_path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_fields_given_when_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert BridgeSTGProcessor.from_pretrained(tmp_path, fps=3, local_files_only=True).fps == 3.0
    for wrong, message in (({"fps": "x"}, "fps must be a number"), ({"max_framez": 3}, "the nearest is max_frames")):
        with pytest.raises(ConfigError, match=message):
            BridgeSTGProcessor.from_pretrained(tmp_path, **wrong)


def test_a_missing_field_is_named(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    values = json.loads(path.read_text())
    del values["patch_size"]
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"processor_config.json is incomplete: it must have patch_size, an integer"):
        BridgeSTGProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_mean", [0.5, "x", 0.5], "image_mean[1] must be a number, got 'x'"),
        ("image_std", [0.5, 0.0, 0.5], "image_std[1] must be a number > 0"),
        ("image_mean", 3, "image_mean must be a list of 3 values"),
    ],
)
def test_wrong_statistics_of_a_backbone_name_their_file(tmp_path, field, value, message):
    folder = write_checkpoint(tmp_path / "backbone", "qwen2_5_vl")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ModelError) as caught:
        BridgeSTGForVideoGrounding.from_backbone(folder)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_files_of_the_first_version_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    values = json.loads(path.read_text())
    del values["prompt_prefix"], values["prompt_suffix"]
    path.write_text(json.dumps(values))
    assert BridgeSTGProcessor.from_pretrained(tmp_path).settings() == processor.settings()


@pytest.mark.parametrize(
    "text", ["", '{"fps": 2', "[]", "9" * 5000, '{"fps": %s}' % ("9" * 5000), "[" * 100_000, "{} {}"]
)
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_torn_file_is_named(processor, tmp_path, name, text):
    processor.save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError) as caught:
        BridgeSTGProcessor.from_pretrained(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_cut_off_anywhere_is_named(processor, tmp_path, name, share):
    processor.save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: min(int(share * len(content)), len(content) - 3)])
    with pytest.raises(ModelError, match=name):
        BridgeSTGProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{% for message in messages %}{{ message", "{% if a %}b"])
def test_a_chat_template_cut_off_is_named(processor, tmp_path, text):
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(text)
    with pytest.raises(ModelError, match=r"chat_template.jinja cannot be read"):
        BridgeSTGProcessor.from_pretrained(tmp_path)


def test_a_whole_chat_template_is_kept(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    text = "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(text)
    again = BridgeSTGProcessor.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert again.tokenizer.chat_template == (tmp_path / "again" / "chat_template.jinja").read_text() == text


@pytest.mark.parametrize("name", sorted(FILES - {"tokenizer_config.json"}))
def test_a_missing_file_is_said(processor, tmp_path, name):
    processor.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=f"is incomplete: it has no {name}"):
        BridgeSTGProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("token", ["<|bridge_3|>", "<|video_pad|>", "<|im_end|>"])
def test_a_tokenizer_without_a_token_is_refused(processor, tmp_path, token):
    processor.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace(token, "<|other|>"))
    with pytest.raises(ModelError, match=f"it must have the token {token}".replace("|", r"\|")):
        BridgeSTGProcessor.from_pretrained(tmp_path)


def test_saving_gives_whole_files_and_nothing_else(processor, tmp_path):
    (tmp_path / "other.txt").write_text("kept")
    for _ in range(2):  # over what is there too
        saved = processor.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == FILES | {"other.txt"}
        assert set(saved) == {str(tmp_path / name) for name in FILES} and saved[-1].endswith("processor_config.json")
    assert type(AutoProcessor.from_pretrained(tmp_path)) is BridgeSTGProcessor


@pytest.mark.parametrize("renames", range(3))
def test_a_disk_that_fills_up_leaves_no_half_file(processor, tmp_path, monkeypatch, renames):
    """Whatever was renamed before is whole, and processor_config.json stands only where all the rest does."""
    import os

    rename, done = os.replace, []

    def full(source, target):
        if len(done) == renames:
            raise OSError(28, "No space left on device")
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"cannot be written to .*: No space left on device"):
        processor.save_pretrained(tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    assert len(found) == renames and "processor_config.json" not in found
    for name in found:
        json.loads((tmp_path / name).read_text())


def test_an_error_of_the_tokenizer_leaves_what_was_there(processor, tmp_path, monkeypatch):
    processor.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def fail(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as tokenizers raises it

    monkeypatch.setattr(type(processor.tokenizer), "save_pretrained", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        processor.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_stock_code_reads_the_tokenizer_where_this_package_is_not(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['bridge_stg'] = None; from transformers import AutoProcessor, AutoTokenizer; "
        f"print(*(len(A.from_pretrained({str(tmp_path)!r})) for A in (AutoProcessor, AutoTokenizer)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-2:] == [str(len(processor.tokenizer))] * 2


def test_threads_share_one_whatever_they_ask_of_its_tokenizer(tmp_path, processor):
    """Padding and truncation of a fast tokenizer are a state of the tokenizer: another thread's must not come in."""
    processor.save_pretrained(tmp_path)
    shared = BridgeSTGProcessor.from_pretrained(tmp_path)
    shared.tokenizer("red", padding="max_length", truncation=True, max_length=5)
    sentences = ["red", "the red circle that moves left", "what moves up?", "the blue square " * 5]
    frames = [np.zeros((2, 64, 64, 3), dtype=np.uint8)]
    wanted = [processor(frames, [[0.0, 0.5]], [sentence])["input_ids"] for sentence in sentences]
    wrong, going = [], True

    def serve(first):
        for i in range(first, first + 12):
            try:
                found = shared(frames, [[0.0, 0.5]], [sentences[i % 4]])["input_ids"]
            except Exception as error:
                wrong.append(error)
            else:
                if not torch.equal(found, wanted[i % 4]):
                    wrong.append(found)

    def disturb():
        length = 0
        while going:
            length = length % 7 + 1
            shared.tokenizer.backend_tokenizer.enable_padding(length=10 * length)
            shared.tokenizer.backend_tokenizer.enable_truncation(length)

    other = threading.Thread(target=disturb)
    other.start()
    threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    going = False
    other.join()
    assert not wrong


def test_tokens_added_later_are_known(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    mine = BridgeSTGProcessor.from_pretrained(tmp_path)
    frames, times = [np.zeros((2, 64, 64, 3), dtype=np.uint8)], [[0.0, 0.5]]
    mine(frames, times, ["xylophone"])
    mine.tokenizer.add_tokens(["xylophone"])
    assert mine.tokenizer.convert_tokens_to_ids("xylophone") in mine(frames, times, ["xylophone"])["input_ids"][0]


def test_frames_with_negative_strides(processor):
    video = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)[..., ::-1]
    assert torch.equal(processor.pixel_values(video)[0], processor.pixel_values(video.copy())[0])


def test_a_copied_folder_stays_whole(processor, tmp_path):
    processor.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert BridgeSTGProcessor.from_pretrained(tmp_path / "b").settings() == processor.settings()
