"""One process, two with DDP, two with FSDP2: the same losses; killed at any moment and resumed: the same again."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bridge_stg.models import load_model
from bridge_stg.training import load_config, train
from bridge_stg.training.checkpoints import STAGING, latest_checkpoint
from tests.training.test_run import losses

ROOT = Path(__file__).parents[2]
STEPS = 20
CONFIG = f"""
data:
  batch_size: 4
  images_per_clip: 2
  workers: 0
  phases:  # steps of images have no label for half of the losses, steps of clips have all
    - {{steps: 6, mix: {{image: 1.0}}}}
    - {{steps: 20, mix: {{single: 0.5, twins: 0.2, image: 0.3}}}}
schedule: {{steps: {STEPS}, warmup_steps: 2, log_every: 1, save_every: 5}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "equal.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def single(config, tmp_path_factory):
    """The run that the others are compared with: its losses and the folder of its model."""
    folder = tmp_path_factory.mktemp("single") / "run"
    return losses(train(load_config(config), folder, tensorboard=False)), folder


def start(processes, config, out, *arguments):
    """The exit code of a run in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tests.training.worker"]
    run = subprocess.run(
        [*command, str(config), str(out), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return run.returncode, run.stderr[-2000:]


def saved_losses(folder):
    """Losses by step, as the last checkpoint of a run tells them."""
    history = json.loads((latest_checkpoint(folder) / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize(
    ("strategy", "accumulate", "where", "at", "left"),
    [("ddp", 1, "save", "10", "checkpoint-5"), ("fsdp2", 2, "step", "13", "checkpoint-10")],
)
def test_two_processes_killed_and_resumed_learn_as_one(config, single, tmp_path, strategy, accumulate, where, at, left):
    settings = [f"scale.strategy={strategy}", f"scale.accumulate={accumulate}"]
    code, _ = start(2, config, tmp_path / "run", *settings, "--die", where, at)
    assert code != 0
    assert latest_checkpoint(tmp_path / "run").name == left
    code, errors = start(2, config, tmp_path / "run", *settings)
    assert code == 0, errors
    expected, folder = single
    found = saved_losses(tmp_path / "run")
    assert list(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(expected, abs=1e-4)
    a, b = (load_model(path).state_dict() for path in (folder, tmp_path / "run"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed")
def test_deepspeed_learns_as_one_process_where_every_step_has_every_label(config, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    clips = ["data.phases=[{steps: 1, mix: {single: 0.5, twins: 0.5}}]", "schedule.steps=6", "schedule.save_every=3"]
    expected = losses(train(load_config(config, clips), tmp_path / "single", tensorboard=False))
    settings = [*clips, "scale.strategy=deepspeed"]
    code, _ = start(2, config, tmp_path / "run", *settings, "--die", "step", "5")
    assert code != 0 and latest_checkpoint(tmp_path / "run").name == "checkpoint-3"
    code, errors = start(2, config, tmp_path / "run", *settings)
    assert code == 0, errors
    assert saved_losses(tmp_path / "run") == pytest.approx(expected, abs=1e-4)


def test_a_run_killed_before_a_checkpoint_has_its_name_goes_on_from_the_one_before(config, single, tmp_path):
    code, _ = start(1, config, tmp_path / "run", "--die", "publish", "10")
    assert code == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "run" / STAGING).iterdir()] == ["checkpoint-10"]
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-5"
    resumed = train(load_config(config), tmp_path / "run", tensorboard=False)
    assert losses(resumed) == pytest.approx(single[0], abs=1e-6)
    assert not (tmp_path / "run" / STAGING).exists()
    assert not (tmp_path / "run" / ".model").exists()


def test_a_step_is_the_same_however_it_is_cut(config, single, tmp_path):
    few = ["schedule.steps=9", "schedule.decay_share=0"]
    whole = losses(train(load_config(config, few), tmp_path / "whole", tensorboard=False))
    settings = [*few, "scale.accumulate=4", "scale.gradient_checkpointing=true"]
    cut = losses(train(load_config(config, settings), tmp_path / "cut", tensorboard=False))
    assert cut == pytest.approx(whole, abs=1e-4)
    assert len(set(cut.values())) == 9
