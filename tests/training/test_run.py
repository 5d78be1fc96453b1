"""Whole runs: the loss falls, a stopped run resumes exactly, the saved model grounds."""

import json

import pytest
import torch
from transformers import TrainerCallback

from bridge_stg.errors import ConfigError, ModelError
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


def test_a_run_out_of_time_stops_with_a_checkpoint(tmp_path):
    trainer = train(load_config("tiny", [*FEW, "schedule.steps=6"]), tmp_path, tensorboard=False, max_seconds=0.0)
    assert trainer.state.global_step == 1
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").is_file()


def test_a_wrong_model_field_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be built"):
        train(load_config("tiny", ["model.keep=7"]), tmp_path, tensorboard=False)
