"""Saved folders that are broken: one sentence each, with the file, the field and its value."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge_stg.errors import BridgeSTGError, ConfigError, ModelError
from bridge_stg.models import BridgeSTGConfig, load_model, shipped_model


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(shipped_model(), tmp_path / "model")


def change_config(folder, text=None, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}) if text is None else text)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "holds no JSON object"),
        ("[" * 1000 + "]" * 1000, "cannot be read"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"keep": ' + "9" * 5000 + "}", "cannot be read"),
        ("\x00\x01", "cannot be read"),
        ('{"model_type": "\\ud800"}', r"holds a '\\ud800' model"),
        ('{"model_type": "llama"}', "holds a 'llama' model"),
    ],
)
def test_a_configuration_that_is_none(folder, text, message):
    change_config(folder, text)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed


LATER = {"separate_bridge_embeddings", "backbone_name", "backbone_fingerprint"}


@pytest.mark.parametrize("name", sorted({*BridgeSTGConfig.field_names()} - LATER))
def test_every_field_is_missed_and_checked(folder, name):
    whole = json.loads((folder / "config.json").read_text())
    change_config(folder, json.dumps({key: value for key, value in whole.items() if key != name}))
    with pytest.raises(ModelError, match=f"config.json is incomplete: it has no {name}"):
        load_model(folder)
    for value in ("\ud800", [], -1, 1e400, float("nan"), 10**400):
        change_config(folder, json.dumps({**whole, name: value}))
        with pytest.raises(ModelError, match=name) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
        str(caught.value).encode()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_dimm": 96}, "'decoder_dimm' is not a field of BridgeSTGConfig; the nearest is 'decoder_dim'"),
        ({"bridge_tokens": True}, "bridge_tokens must be an integer .*, got True"),
        ({"gate": 1}, "gate must be true or false, got 1"),
        ({"decoder_heads": 5}, "decoder_heads must divide decoder_dim=96, got 5"),
        ({"bridge_token_id": 362}, "bridge_token_id must leave room for 4 bridging tokens in a vocabulary of 363"),
        ({"dtype": "float99"}, "dtype must be one of torch's, got 'float99'"),
        ({"backbone_config": {"model_type": "llama"}}, "holds a llama model"),
        ({"decoder_dim": 48}, r"has weights that do not fit its config.json: .* of shape \[96.* asks for \[48"),
        ({"bridge_tokens": 5}, "its bridge_tokens is 4, the model's 5"),
    ],
)
def test_a_wrong_field_is_named(folder, fields, message):
    change_config(folder, **fields)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_fields_of_others_pass(folder):
    change_config(folder, my_note="kept")
    assert load_model(folder).config.my_note == "kept"


def test_a_processor_of_another_model_is_refused(folder):
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": 14}))
    with pytest.raises(ModelError, match="its patch_size is 14, the model's 8"):
        load_model(folder)


def test_settings_that_need_other_weights_are_refused():
    with pytest.raises(ConfigError, match=r"need other weights than .* has"):
        load_model(settings={"decoder_dim": 48})
    with pytest.raises(ConfigError, match="keep must be a number > 0 and <= 1, got '1'"):
        load_model(settings={"keep": "1"})


def test_weights_that_are_not_whole(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({name: p for name, p in weights.items() if "box_heads" not in name}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is incomplete: its weights lack .* such as spatial_decoder.box_heads"):
        load_model(folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BridgeSTGError, match="cannot be loaded"):
        load_model(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("backbone", None), ("fingerprint", 3), ("dtype", "float99"), ("processor", [])]
)
def test_a_wrong_record_of_adapters_is_named(load_backbone, tmp_path, field, value):
    model = load_backbone("qwen2_5_vl")
    model.freeze_backbone()
    model.save_pretrained(tmp_path)
    path = tmp_path / "bridge_stg_adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ModelError, match=f"{field} must be .*, got {value!r}".replace("[]", r"\[\]")):
        type(model).from_pretrained(tmp_path)


def test_options_that_a_folder_of_adapters_does_not_take_are_refused(load_backbone, tmp_path):
    model = load_backbone("qwen2_5_vl")
    model.freeze_backbone()
    model.save_pretrained(tmp_path / "adapters")
    model_class = type(model)
    for options in ({"device_map": "auto"}, {"dtype": torch.float16}, {"output_loading_info": True}, {"keep": 0.5}):
        with pytest.raises(ModelError, match=f"load without the option {next(iter(options))}"):
            model_class.from_pretrained(tmp_path / "adapters", **options)
    assert model_class.from_pretrained(tmp_path, subfolder="adapters").config.backbone_name
    with pytest.raises(ModelError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)


def test_heads_that_the_weights_do_not_know_are_refused():
    assert load_model(settings={"decoder_heads": 4}).config.decoder_heads == 4
    with pytest.raises(ConfigError, match="decoder_heads cannot be switched: the weights know 4, got 3"):
        load_model(settings={"decoder_heads": 3})
