"""LoRA, freezing, and what was learnt saved apart from the backbone."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from bridge_stg.errors import ModelError
from bridge_stg.models import BridgeSTGForVideoGrounding, load_model
from bridge_stg.models.backbones import FAMILIES

families = pytest.mark.parametrize("model_type", list(FAMILIES))
INDEX = torch.tensor([[0, 3]])


@pytest.fixture
def features():
    def make(model):
        frames = np.random.default_rng(1).integers(0, 255, (4, 32, 48, 3), dtype=np.uint8)
        inputs = model.processor([frames], [[0.0, 0.5, 1.0, 1.5]], ["red"], ["From 0.5 s to 1.0 s."], training=True)
        inputs.pop("answer_tokens")
        return {**inputs, "frame_index": INDEX}

    return make


def train_a_little(model, inputs):
    """One large step on everything that is trainable."""
    model.train()
    output = model(**inputs)
    terms = (output.boxes, output.presence, output.relevance, output.contrast, output.answer_logits)
    sum(term.float().pow(2).mean() for term in terms).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad.sign()
    model.eval()


def boxes(model, inputs):
    with torch.no_grad():
        return model(**inputs).boxes


@families
def test_lora_trains_adapters_bridge_and_spatial_half_only(model_type, load_backbone, features):
    model = load_backbone(model_type)
    inputs = features(model)
    before = boxes(model, inputs)
    model.add_lora(rank=2)
    torch.testing.assert_close(boxes(model, inputs), before)  # adapters start at zero
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items() if "lora_" not in k}
    train_a_little(model, inputs)
    assert not torch.allclose(boxes(model, inputs), before)
    for name, value in model.backbone.state_dict().items():
        assert "lora_" in name or torch.equal(value, frozen[name]), name
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "bridge_embeddings" in grads and any("lora_B" in name for name in grads)
    assert not any("visual" in name for name in grads)


def test_fresh_adapters_take_the_mode_of_the_backbone(load_backbone, features):
    model = load_backbone("qwen2_5_vl")
    model.add_lora(rank=2, dropout=0.5)
    for name, parameter in model.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    inputs = features(model)
    assert torch.equal(boxes(model, inputs), boxes(model, inputs))  # no dropout in evaluation mode
    assert not any(module.training for module in model.modules())
    trained = load_backbone("qwen2_5_vl").train()
    trained.add_lora(rank=2)
    assert all(module.training for module in trained.modules())


def test_auto_model_loads_adapters(load_backbone, features, tmp_path):
    model = load_backbone("qwen2_5_vl")
    model.add_lora(rank=2)
    inputs = features(model)
    train_a_little(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is BridgeSTGForVideoGrounding and loaded.has_lora
    torch.testing.assert_close(boxes(loaded, inputs), boxes(model, inputs), atol=0, rtol=0)


@families
def test_adapters_save_apart_and_load_on_their_backbone(model_type, load_backbone, features, checkpoints, tmp_path):
    model = load_backbone(model_type)
    inputs = features(model)
    model.add_lora(rank=2, targets=["q_proj", "v_proj"], dropout=0.0)
    train_a_little(model, inputs)
    expected = boxes(model, inputs)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "spatial.safetensors", "config.json"} <= names
    assert "model.safetensors" not in names
    again = BridgeSTGForVideoGrounding.from_pretrained(tmp_path)
    torch.testing.assert_close(boxes(again, inputs), expected)
    assert again.processor.settings() == model.processor.settings()
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert load_model(tmp_path, {"keep": 1.0}).config.keep == 1.0
    moved = shutil.copytree(checkpoints(model_type), tmp_path / "moved")
    torch.testing.assert_close(boxes(BridgeSTGForVideoGrounding.load_adapters(tmp_path, moved), inputs), expected)


def test_adapters_are_in_the_format_of_peft(load_backbone, features, checkpoints, tmp_path):
    model = load_backbone("qwen3_vl")
    model.add_lora(rank=2)
    train_a_little(model, features(model))
    model.save_adapters(tmp_path)
    stock = FAMILIES["qwen3_vl"].network().from_pretrained(checkpoints("qwen3_vl"))
    wrapped = PeftModel.from_pretrained(stock, tmp_path).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        a = wrapped.base_model.model.model.language_model(input_ids=ids).last_hidden_state
        b = model.backbone.model.language_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_frozen_backbone_is_left_out_too(load_backbone, features, tmp_path):
    model = load_backbone("qwen2_5_vl")
    inputs = features(model)
    model.freeze_backbone()
    train_a_little(model, inputs)
    assert model.bridge_embeddings.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    again = load_model(tmp_path)
    torch.testing.assert_close(boxes(again, inputs), boxes(model, inputs))
    assert not any(p.requires_grad for p in again.backbone.parameters())


def test_a_merged_model_is_saved_whole(load_backbone, features, tmp_path):
    model = load_backbone("qwen3_vl")
    inputs = features(model)
    model.add_lora(rank=2)
    train_a_little(model, inputs)
    expected = boxes(model, inputs)
    model.merge_lora()
    torch.testing.assert_close(boxes(model, inputs), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(boxes(load_model(tmp_path), inputs), boxes(model, inputs))


def test_lora_on_a_bf16_backbone_is_fp32(load_backbone, features):
    model = load_backbone("qwen3_vl", dtype=torch.bfloat16)
    model.add_lora(rank=2)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert torch.isfinite(boxes(model, features(model))).all()


@pytest.fixture
def saved(load_backbone, tmp_path):
    model = load_backbone("qwen3_vl")
    model.add_lora(rank=2)
    model.save_adapters(tmp_path / "adapters")
    return tmp_path / "adapters"


@pytest.mark.parametrize("other", [("qwen3_vl", 1), ("qwen2_5_vl", 0), ("qwen3_vl_moe", 0)])
def test_another_backbone_is_refused(saved, checkpoints, other):
    message = r"adapters adapts .*qwen3_vl-0 \(fingerprint \w{16}\), and .* is another backbone\.$"
    with pytest.raises(ModelError, match=message):
        BridgeSTGForVideoGrounding.load_adapters(saved, checkpoints(*other))


def test_broken_adapters_are_one_sentence(saved, tmp_path):
    record = json.loads((saved / "bridge_stg_adapter.json").read_text())
    (saved / "bridge_stg_adapter.json").write_text(json.dumps(record | {"backbone": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match="gone is neither a folder nor a checkpoint that the Hub gives"):
        load_model(saved)
    (saved / "bridge_stg_adapter.json").write_text(json.dumps(record))
    (saved / "spatial.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"spatial\.safetensors cannot be read"):
        load_model(saved)
    (saved / "spatial.safetensors").unlink()
    with pytest.raises(ModelError, match=r"spatial\.safetensors cannot be read"):
        load_model(saved)


def test_what_cannot_be_adapted_or_saved_says_so(make_model, load_backbone, tmp_path):
    with pytest.raises(ModelError, match="a frozen backbone that came from a checkpoint"):
        make_model().save_adapters(tmp_path)
    model = load_backbone("qwen3_vl")
    with pytest.raises(ModelError, match="a frozen backbone that came from a checkpoint"):
        model.save_adapters(tmp_path)
    with pytest.raises(ModelError, match="LoRA cannot be added"):
        model.add_lora(targets=["nothing"])
    model.add_lora(rank=2)
    with pytest.raises(ModelError, match="has LoRA adapters already"):
        model.add_lora()


def test_a_trained_backbone_is_not_taken_for_its_checkpoint(load_backbone, features, tmp_path):
    model = load_backbone("qwen2_5_vl")
    train_a_little(model, features(model))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    with pytest.raises(ModelError, match="as from_backbone read it; this one is our own, or was trained since"):
        model.add_lora(rank=2)
    model.freeze_backbone()
    assert model.config.backbone_name is None and not model.backbone_is_original


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_gradient_checkpointing_changes_no_gradient(model_type, load_backbone, features):
    gradients = []
    for checkpointing in (False, True):
        model = load_backbone(model_type)
        torch.manual_seed(2)
        model.add_lora(rank=2, dropout=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train_a_little(model, features(model))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


def test_liger_patches_the_llm_when_installed(load_backbone, monkeypatch):
    model = load_backbone("qwen3_vl")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ModelError, match="liger-kernel, which is not installed"):
        model.apply_liger()
    calls = []
    kernels = types.ModuleType("liger_kernel.transformers")
    kernels.apply_liger_kernel_to_qwen3_vl = lambda **options: calls.append(options)
    package = types.ModuleType("liger_kernel")
    package.transformers = kernels
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", kernels)
    model.apply_liger()
    assert calls == [{"cross_entropy": False, "fused_linear_cross_entropy": False, "model": model.backbone}]
    with pytest.raises(ModelError, match=r"no kernels for Qwen2\.5-VL"):
        load_backbone("qwen2_5_vl").apply_liger()
