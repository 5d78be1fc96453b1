"""Whole runs: the loss falls, a stopped run resumes exactly, the saved model grounds."""

import json
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from bridge_stg.data import GroundingSample, read_samples, write_samples, write_split
from bridge_stg.errors import ConfigError, ModelError, SampleError
from bridge_stg.models import load_model
from bridge_stg.training import build_model, load_config, train

FEW = [
    "schedule.warmup_steps=2",
    "schedule.log_every=1",
    "data.batch_size=2",
    "data.images_per_clip=2",
    "data.workers=0",
    "data.phases=[{steps: 3, mix: {image: 1.0}}, {steps: 9, mix: {single: 1.0}}]",
]


class StopAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_a_stopped_run_resumes_with_the_same_losses(tmp_path):
    settings = [*FEW, "schedule.steps=6", "schedule.save_every=4"]
    whole = losses(train(load_config("tiny", settings), tmp_path / "whole", tensorboard=False))
    assert list(whole) == [1, 2, 3, 4, 5, 6]

    stop = StopAtStep(3)  # the learning rate of the first step is 0
    stopped = train(load_config("tiny", settings), tmp_path / "cut", tensorboard=False, callbacks=[stop])
    assert stopped.state.global_step == 3
    resumed = losses(train(load_config("tiny", settings), tmp_path / "cut", tensorboard=False))
    assert resumed == pytest.approx(whole, abs=1e-6)

    a, b = (load_model(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=1e-5, msg=key)


def test_every_term_is_logged_and_the_loss_falls(tmp_path):
    images = "data.phases=[{steps: 1, mix: {image: 1.0}}]"
    settings = [*FEW, "schedule.steps=30", "schedule.learning_rate=0.002", images]
    trainer = train(load_config("tiny", settings), tmp_path, tensorboard=False)
    curve = list(losses(trainer).values())
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    assert {"loss_token", "loss_box", "loss_giou"} <= trainer.state.log_history[0].keys()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bridge_stg"


def test_a_model_starts_from_saved_weights_where_they_fit(tmp_path, caplog):
    start, processor = build_model(load_config("tiny", ["seed=5"]))
    start.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, _ = build_model(load_config("tiny", [f"start_from={tmp_path}", "model.reference_points=learned"]))
    saved, taken = start.state_dict(), model.state_dict()
    assert {key for key in taken if key not in saved} == {"spatial_decoder.learned_centre"}
    assert all(torch.equal(taken[key], saved[key]) for key in saved)
    assert "learned_centre" in caplog.text
    with pytest.raises(ModelError, match="not a model folder"):
        build_model(load_config("tiny", ["start_from=nowhere"]))


def test_tiny_is_the_shipped_checkpoint_to_start_from():
    model, _ = build_model(load_config("tiny", ["start_from=tiny", "seed=5"]))
    saved = load_model().state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())


def test_a_run_out_of_time_stops_with_a_checkpoint(tmp_path):
    trainer = train(load_config("tiny", [*FEW, "schedule.steps=6"]), tmp_path, tensorboard=False, max_seconds=0.0)
    assert trainer.state.global_step == 1
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").is_file()


def test_a_wrong_model_field_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.keep must be a number > 0 and <= 1, got 7"):
        load_config("tiny", ["model.keep=7"])
    with pytest.raises(ConfigError, match="cannot be built"):  # two fields that do not fit each other
        train(load_config("tiny", ["model.decoder_dim=96", "model.decoder_heads=5"]), tmp_path, tensorboard=False)


def test_a_run_on_annotated_files_mixes_tasks_and_resumes(tmp_path):
    """Sources of three tasks, one of the videos broken; stopped and resumed."""
    clips = read_samples(write_split(tmp_path / "clips", "train", 6, 0))
    cv2.imwrite(str(tmp_path / "picture.png"), np.full((128, 128, 3), 90, np.uint8))
    path, box = str(tmp_path / "picture.png"), {0: (9, 9, 50, 60)}
    picture = GroundingSample("picture", path, "the red circle", 128, 128, 1.0, 1, "referring", boxes=box)
    missing = replace(clips[1], video=str(tmp_path / "missing.mp4"))
    write_samples(tmp_path / "tubes.jsonl", [clips[0], missing, *clips[2:]])
    write_samples(tmp_path / "pictures.jsonl", [picture])
    write_samples(tmp_path / "questions.jsonl", [replace(clips[0], task="qa", answer="left.", boxes={}, interval=None)])
    names = ("tubes", "pictures", "questions")
    sources = ", ".join(f"{name}: {{path: {tmp_path / name}.jsonl, weight: {len(name)}}}" for name in names)
    settings = [*FEW, f"data.sources={{{sources}}}", "data.batch_size=8", "schedule.steps=5", "schedule.save_every=5"]
    whole = train(load_config("tiny", settings), tmp_path / "whole", tensorboard=False)
    assert {"loss_language", "loss_box", "loss_presence"} <= set().union(*whole.state.log_history)
    train(load_config("tiny", settings), tmp_path / "cut", tensorboard=False, callbacks=[StopAtStep(2)])
    resumed = train(load_config("tiny", settings), tmp_path / "cut", tensorboard=False)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    listed = [json.loads(line)["id"] for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()]
    assert listed == [missing.id]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.sources={a: {path: nowhere.jsonl}}"], r"nowhere\.jsonl cannot be read"),
        (["data.batch_size=3", "scale.accumulate=2"], r"multiple of processes x scale.accumulate \(1 x 2\), got 3"),
        (["scale.strategy=fsdp"], "scale.strategy must be one of ddp, fsdp2, deepspeed, got 'fsdp'"),
        (["scale.strategy=fsdp2"], "start it with torchrun"),
        (["scale.precision=float16"], "scale.precision must be one of float32, bfloat16"),
        (["scale.replicas=2"], r"must divide the number of processes \(1\), got 2"),
        (["scale.strategy=deepspeed", "scale.precision=bfloat16"], r"deepspeed needs scale\.precision=float32"),
        (["scale.accumulate=0"], "scale.accumulate must be an integer >= 1, got 0"),
        (["scale.deepspeed=ds.json"], "for scale.strategy=deepspeed only"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(tmp_path, settings, message):
    with pytest.raises((ConfigError, SampleError), match=message) as caught:
        train(load_config("tiny", [*FEW, *settings]), tmp_path, tensorboard=False)
    assert "\n" not in str(caught.value)


def test_deepspeed_has_to_be_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match="needs the package deepspeed, which is not installed"):
        train(load_config("tiny", [*FEW, "scale.strategy=deepspeed"]), tmp_path, tensorboard=False)


def test_the_backbone_learns_at_a_rate_of_its_own(tmp_path):
    settings = [*FEW, "schedule.steps=1", "schedule.backbone_learning_rate=1e-5", "schedule.warmup_steps=0"]
    trainer = train(load_config("tiny", settings), tmp_path, tensorboard=False)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault(names[id(parameter)].split(".")[0] == "backbone", set()).add(group["initial_lr"])
    assert rates == {True: {1e-5}, False: {1e-3}}


def test_bfloat16_is_for_the_backbone_alone(tmp_path):
    model, processor = build_model(load_config("tiny"))
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            seen[name] = output.dtype

        return hook

    model.backbone.model.language_model.layers[0].mlp.register_forward_hook(note("llm"))
    model.backbone.lm_head.register_forward_hook(note("answer"))
    for name in ("memory_projection", "dense_alignment"):
        getattr(model, name).register_forward_hook(note(name))
    clips = "data.phases=[{steps: 1, mix: {single: 1}}]"
    settings = [*FEW, "schedule.steps=1", "scale.precision=bfloat16", clips]
    train(load_config("tiny", settings), tmp_path, tensorboard=False, build=lambda config: (model, processor))
    assert seen == {
        "llm": torch.bfloat16,
        "answer": torch.bfloat16,
        "memory_projection": torch.float32,
        "dense_alignment": torch.float32,
    }


def test_activations_are_computed_again_where_asked(tmp_path):
    model, processor = build_model(load_config("tiny"))
    calls = []
    for layer in (model.backbone.model.language_model.layers[1].mlp, model.backbone.model.visual.blocks[0].mlp):
        layer.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    settings = [*FEW, "schedule.steps=1", "scale.gradient_checkpointing=true"]
    train(load_config("tiny", settings), tmp_path, tensorboard=False, build=lambda config: (model, processor))
    assert len(calls) == 4
