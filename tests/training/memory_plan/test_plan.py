"""The memory plan: parameters exactly, activations against what real passes need, the figures in the configurations."""

import re

import pytest

from bridge_stg.errors import ConfigError
from bridge_stg.training import (
    LossWeights,
    Phase,
    SyntheticCurriculum,
    build_model,
    collate_grounding,
    grounding_losses,
    load_config,
    shipped_configs,
)
from bridge_stg.training.build_model import checkpoint_activations
from bridge_stg.training.memory_plan.activations import BatchShape, activation_bytes, peak_bytes
from bridge_stg.training.memory_plan.plan import DEEPSPEED_BUCKET, memory_plan
from tests.models import checkpoints

BIG = ("vidstg-7b", "hcstvg-7b", "multitask-7b")
CHECKPOINTING = "scale.gradient_checkpointing=true"
CLIPS, GROUPS, PATCHES = 4, 12, 64


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def settings(request, tmp_path_factory):
    """A backbone wide and deep enough for its layers to need more than what is around them."""
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    vision = {"depth": 6, "hidden_size": 64, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 128}
    with pytest.MonkeyPatch.context() as patch:
        for table, fields in ((checkpoints.TEXT, text), (checkpoints.VISION, vision)):
            for name, value in fields.items():
                patch.setitem(table, name, value)
        folder = tmp_path_factory.mktemp("backbone") / request.param
        checkpoints.write_checkpoint(folder, request.param)
    return [
        f"backbone.name={folder}",
        "backbone.dtype=float32",
        "processor={min_pixels: 4096, max_pixels: 4096, max_frames: 24, fps: 4.0}",
        "model={bridge_tokens: 4, bridge_layers: 3, decoder_dim: 64, decoder_heads: 4, decoder_ffn_dim: 128}",
        f"data.batch_size={CLIPS}",
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


def real_peak(config):
    """The most that a training pass on four clips of 24 frames needs, and the length of its sequences."""
    model, processor = build_model(config)
    model.train()
    if config.scale.gradient_checkpointing:
        checkpoint_activations(model)
    data = SyntheticCurriculum([Phase(1, {"single": 1.0})], batch_size=CLIPS)
    batch = collate_grounding([data[i] for i in range(CLIPS)], processor)
    weights = LossWeights()

    def run():
        losses = grounding_losses(model(**batch.inputs), batch.targets, weights, match_one=False)
        return sum(getattr(weights, name) * value for name, value in losses.items())

    return peak_bytes(model, run, apart_from=list(batch.inputs.values())), batch["input_ids"].shape[1]


def planned(config, tokens, aligned):
    batch = BatchShape(CLIPS, GROUPS, PATCHES, tokens, aligned)
    return activation_bytes(config, build_model(config, device="meta")[0].train(), batch)


@pytest.mark.parametrize("checkpointing", [[], [CHECKPOINTING]])
@pytest.mark.parametrize("more", [[], ["lora.rank=4"], ["backbone.freeze=true"]])
def test_activations_are_what_a_real_pass_needs(settings, more, checkpointing):
    config = load_config("tiny", [*settings, *more, *checkpointing])
    real, tokens = real_peak(config)
    assert 0.95 * real < planned(config, tokens, aligned=True) < 1.1 * real  # a CPU copies no mask, of any length


def test_a_mask_that_a_gpu_has_to_pad_is_kept_by_every_layer(settings):
    def copies(*more):
        config = load_config("tiny", [*settings, *more])
        return (planned(config, 401, aligned=False) - planned(config, 401, aligned=True)) / (CLIPS * 401**2 * 4)

    assert copies() == 8
    assert copies(CHECKPOINTING) == 1
    assert copies("backbone.attn_implementation=flash_attention_2") == 0


def test_eager_attention_keeps_its_scores(settings):
    def at(attention):
        config = load_config("tiny", [*settings, f"backbone.attn_implementation={attention}"])
        return planned(config, 400, aligned=True)

    assert at("eager") - at("sdpa") > 8 * CLIPS * 8 * 400**2 * 4  # layers, clips, heads
    assert at("flash_attention_2") < at("sdpa")


def test_published_sizes():
    """Numbers of parameters of the published checkpoints."""
    known = {
        "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
        "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
        "Qwen3-VL-4B-Instruct": 4_437_815_808,
        "Qwen3-VL-8B-Instruct": 8_767_123_696,
    }
    for name, count in known.items():
        model, _ = build_model(load_config("tiny", [f"backbone.name=Qwen/{name}", "model={}"]), device="meta")
        assert sum(p.numel() for p in model.backbone.parameters()) == count


def test_strategies_share_what_they_say():
    def items(*more):
        return memory_plan(load_config("multitask-7b", more), 8).items

    sharded, whole = items(), items("scale.strategy=ddp")
    assert sharded["AdamW"] == whole["AdamW"] // 8
    assert items("scale.replicas=2")["AdamW"] == whole["AdamW"] // 4
    assert whole["gradient buckets"] == whole["gradients"]
    zero = items("scale.strategy=deepspeed", "scale.precision=float32")
    assert zero["gradients"] == zero["weights"] // 8
    assert zero["ZeRO shards and buffer"] == zero["gradients"] + 4 * DEEPSPEED_BUCKET


@pytest.mark.parametrize("name", BIG)
def test_the_figure_in_a_configuration_is_the_plan(name):
    (path,) = [path for path in shipped_configs() if path.stem == name]
    text = path.read_text()
    plan = memory_plan(load_config(name), 8)
    assert f"# Memory: {plan.total / 2**30:.1f} GB a GPU" in text
    assert f"activations {plan.items['activations'] / 2**30:.1f}," in text
    assert plan.total < 75e9  # of 80, for what is not known before
    assert re.search(r"torchrun --nproc-per-node 8 -m bridge_stg train " + name, text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.batch_size=63"], r"multiple of processes x scale\.accumulate \(8 x 2\), got 63"),
        (["backbone.name=Qwen/unknown"], r"Qwen/unknown is neither a folder nor one of Qwen/Qwen2\.5-VL-3B"),
        (["backbone.dtype=bf16"], r"backbone\.dtype must be one of auto, bfloat16, .*, got 'bf16'"),
        (["model.kep=0.5"], r"unknown field 'model\.kep'; the nearest is model\.keep"),
        (["model.keep=3"], "keep must be a number > 0 and <= 1, got 3"),
        (["processor.max_framez=3"], r"unknown field 'processor\.max_framez'; the nearest is processor\.max_frames"),
        (["processor.max_pixels=10"], r"processor.max_pixels must be at least 784 \(one token\), got 10"),
        (["lora.targets=[nope]"], r"\(nope\) not found"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        memory_plan(load_config("vidstg-7b", settings), 8)
    assert "\n" not in str(caught.value)


def test_a_mixture_of_experts_is_planned_in_bfloat16_only(tmp_path):
    folder = checkpoints.write_checkpoint(tmp_path / "moe", "qwen3_vl_moe")

    def plan(dtype):
        settings = [f"backbone.name={folder}", f"backbone.dtype={dtype}", "model={bridge_layers: 3}"]
        return memory_plan(load_config("tiny", settings), 1)

    assert plan("bfloat16").items["activations"] > 0
    with pytest.raises(ConfigError, match=r"mixture of experts can be planned in bfloat16 only, got float32"):
        plan("float32")


def test_the_tiny_model_can_be_planned_too():
    plan = memory_plan(load_config("tiny"), 1)
    model, _ = build_model(load_config("tiny"))
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert "total" in plan.text()
