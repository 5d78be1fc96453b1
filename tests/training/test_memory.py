"""The memory plan: parameters exactly, activations against what real layers keep, the figures in the configurations."""

import re

import pytest

from bridge_stg.errors import ConfigError
from bridge_stg.training import (
    GroundingTargets,
    LossWeights,
    Phase,
    SyntheticCurriculum,
    build_model,
    collate_grounding,
    grounding_losses,
    load_config,
    shipped_configs,
)
from bridge_stg.training.building import checkpoint_activations
from bridge_stg.training.memory import activation_bytes, memory_plan, meta_model, saved_bytes
from tests.models.checkpoints import write_checkpoint

BIG = ("vidstg-7b", "hcstvg-7b", "multitask-7b")
CLIPS, GROUPS, PATCHES = 4, 12, 64


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def settings(request, tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("backbone") / request.param, request.param)
    return [
        f"backbone.name={folder}",
        "backbone.dtype=float32",
        "processor={min_pixels: 4096, max_pixels: 4096, max_frames: 24, fps: 4.0}",
        "model={bridge_tokens: 4, bridge_layers: 3, decoder_dim: 64, decoder_heads: 4, decoder_ffn_dim: 128}",
        f"data.batch_size={CLIPS}",
        "data.answer_dropout=0.0",
    ]


@pytest.mark.parametrize("more", [[], ["lora.rank=4"], ["backbone.freeze=true"]])
def test_parameters_and_states_are_counted(settings, more):
    """Exactly, but for the rows that a checkpoint without spare ones grows by for the bridging tokens."""
    config = load_config("tiny", [*settings, *more])
    model, _ = build_model(config)
    plan = memory_plan(config, 1)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    grown = 2 * 4 * model.config.backbone_config.text_config.hidden_size
    assert 0 <= sum(p.numel() for p in parameters) - plan.parameters <= grown
    assert 0 <= sum(p.numel() for p in trained) - plan.trained <= (0 if more else grown)
    assert plan.items["weights"] == 4 * plan.parameters
    assert plan.items["gradients"] == 4 * plan.trained
    assert plan.items["AdamW"] == 8 * plan.trained


def real_bytes(config):
    """What a batch of four clips of 24 frames keeps in a real forward pass, and the length of its sequences."""
    model, processor = build_model(config)
    model.train()
    if config.scale.gradient_checkpointing:
        checkpoint_activations(model)
    data = SyntheticCurriculum([Phase(1, {"single": 1.0})], batch_size=CLIPS, answer_dropout=0.0)
    batch = collate_grounding([data[i] for i in range(CLIPS)], processor)
    targets = GroundingTargets(**batch.pop("targets"))

    def run():
        return grounding_losses(model(**batch), targets, LossWeights(), match_one=False)

    return saved_bytes(model, run, apart_from=list(batch.values())), batch["input_ids"].shape[1]


@pytest.mark.parametrize("more", [[], ["lora.rank=4"], ["backbone.freeze=true"]])
def test_activations_are_what_a_real_pass_keeps(settings, more):
    config = load_config("tiny", [*settings, *more])
    real, tokens = real_bytes(config)
    planned = activation_bytes(config, meta_model(config)[0].train(), CLIPS, GROUPS, PATCHES, tokens)
    assert planned == pytest.approx(real, rel=0.1)


def test_checkpointing_keeps_less_and_the_plan_covers_it(settings):
    plain = load_config("tiny", settings)
    config = load_config("tiny", [*settings, "scale.gradient_checkpointing=true"])
    real, tokens = real_bytes(config)
    planned, without = (
        activation_bytes(each, meta_model(each)[0].train(), CLIPS, GROUPS, PATCHES, tokens) for each in (config, plain)
    )
    assert real < planned < without


def test_published_sizes():
    """Billions of parameters of the published checkpoints."""
    known = {"Qwen2.5-VL-3B-Instruct": 3.755, "Qwen2.5-VL-7B-Instruct": 8.292, "Qwen3-VL-4B-Instruct": 4.438}
    for name, billions in known.items():
        model, _ = meta_model(load_config("tiny", [f"backbone.name=Qwen/{name}", "model={}"]))
        assert sum(p.numel() for p in model.backbone.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_strategies_share_what_they_say():
    def items(*more):
        return memory_plan(load_config("multitask-7b", more), 8).items

    sharded, whole = items(), items("scale.strategy=ddp")
    assert sharded["AdamW"] == whole["AdamW"] // 8
    assert items("scale.replicas=2")["AdamW"] == whole["AdamW"] // 4
    zero = items("scale.strategy=deepspeed", "scale.precision=float32")
    assert zero["gradients"] < zero["weights"] / 4
    assert whole["gradient buckets"] == whole["gradients"]


@pytest.mark.parametrize("name", BIG)
def test_the_figure_in_a_configuration_is_the_plan(name):
    (path,) = [path for path in shipped_configs() if path.stem == name]
    text = path.read_text()
    plan = memory_plan(load_config(name), 8)
    assert f"# Memory: {plan.total / 2**30:.1f} GB a GPU" in text
    assert f"activations {plan.items['activations'] / 2**30:.1f}," in text
    assert plan.total < 80e9
    assert re.search(r"torchrun --nproc-per-node 8 -m bridge_stg train " + name, text)


def test_what_cannot_be_planned_is_one_sentence():
    with pytest.raises(ConfigError, match=r"multiple of processes x scale\.accumulate"):
        memory_plan(load_config("vidstg-7b"), 7)
    with pytest.raises(ConfigError, match=r"Qwen/unknown is neither a folder nor one of Qwen/Qwen2\.5-VL-3B"):
        memory_plan(load_config("vidstg-7b", ["backbone.name=Qwen/unknown"]), 8)


def test_the_tiny_model_can_be_planned_too():
    plan = memory_plan(load_config("tiny"), 1)
    model, _ = build_model(load_config("tiny"))
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert "total" in plan.text()
