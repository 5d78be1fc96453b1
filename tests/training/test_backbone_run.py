"""A run on a pretrained backbone with LoRA: small checkpoints, exact resume."""

import sys

import pytest
import torch

from bridge_stg.errors import ModelError
from bridge_stg.models import load_model
from bridge_stg.training import build_model, load_config, train
from tests.models.checkpoints import write_checkpoint
from tests.training.test_run import FEW, StopAtStep, losses


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("backbone") / "qwen3_vl", "qwen3_vl")
    return [
        *FEW,
        f"backbone.name={folder}",
        "processor={min_pixels: 1024, max_pixels: 1024, max_frames: 8}",
        "model={bridge_tokens: 2, bridge_layers: 2, decoder_dim: 32, decoder_heads: 2, decoder_ffn_dim: 32}",
        "schedule.steps=4",
        "schedule.save_every=2",
    ]


def test_a_run_with_lora_saves_adapters_and_resumes_exactly(settings, tmp_path):
    settings = [*settings, "lora.rank=2", "lora.targets=[q_proj,v_proj]"]
    whole = losses(train(load_config("tiny", settings), tmp_path / "whole", tensorboard=False))
    stop = StopAtStep(3)
    train(load_config("tiny", settings), tmp_path / "cut", tensorboard=False, callbacks=[stop])
    assert not list(tmp_path.rglob("model*.safetensors"))
    assert (tmp_path / "cut" / "checkpoint-3" / "adapter_model.safetensors").is_file()
    resumed = losses(train(load_config("tiny", settings), tmp_path / "cut", tensorboard=False))
    assert resumed == pytest.approx(whole, abs=1e-6)
    a, b = (load_model(tmp_path / name).state_dict() for name in ("whole", "cut"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=1e-5, msg=key)


def test_a_stage_starts_from_the_adapters_of_another(settings, tmp_path):
    model, _ = build_model(load_config("tiny", [*settings, "lora.rank=2"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name == "bridge_embeddings":
                parameter.fill_(0.5)
    model.save_pretrained(tmp_path)
    again, _ = build_model(load_config("tiny", [*settings, "lora.rank=2", "seed=3", f"start_from={tmp_path}"]))
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_what_trains_follows_the_configuration(settings, monkeypatch):
    def trainable(*more):
        model, _ = build_model(load_config("tiny", [*settings, *more]))
        return {name for name, p in model.backbone.named_parameters() if p.requires_grad}

    assert trainable("backbone.freeze=true") == set()
    assert all("o_proj.lora_" in name for name in trainable("lora.rank=2", "lora.targets=[o_proj]"))
    assert "model.language_model.embed_tokens.weight" in trainable()
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ModelError, match="liger-kernel"):
        trainable("backbone.liger=true")
    with pytest.raises(ModelError, match="nowhere is neither a folder nor"):
        trainable("backbone.name=/nowhere")
