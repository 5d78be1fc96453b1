"""Training batches: they move and are pinned as a whole, and answer to what the Trainer asks."""

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from bridge_stg.data import VOCABULARY
from bridge_stg.models.tiny import tiny_processor
from bridge_stg.training import Phase, SyntheticCurriculum, collate_grounding


@pytest.fixture(scope="module")
def batch():
    data = SyntheticCurriculum([Phase(1, {"single": 1.0})], batch_size=2)
    return collate_grounding([data[0], data[1]], tiny_processor(VOCABULARY))


def tensors(batch):
    return [*batch.inputs.values(), *vars(batch.targets).values()]


def test_accelerate_moves_every_tensor(batch):
    moved = send_to_device(batch, torch.device("meta"))
    assert moved.inputs.keys() == batch.inputs.keys()
    assert all(tensor.is_meta for tensor in tensors(moved)) and not any(tensor.is_meta for tensor in tensors(batch))


def test_the_loader_pins_every_tensor(batch, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + tensor if tensor.ndim else tensor)
    for before, after in zip(tensors(batch), tensors(pin_memory(batch)), strict=True):
        torch.testing.assert_close(after, before + before, equal_nan=True)


def test_the_trainer_finds_its_inputs(batch):
    assert "labels" in batch and "targets" not in batch
    assert len(batch) == len(batch.inputs) and batch["labels"] is batch.inputs["labels"]
