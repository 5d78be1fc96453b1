"""A tiny model with random weights, and clips for it."""

import numpy as np
import pytest
import torch

from bridge_stg.data import VOCABULARY, SyntheticTubes
from bridge_stg.models import BridgeSTGForVideoGrounding
from bridge_stg.models.tiny import tiny_config, tiny_processor


@pytest.fixture(scope="session")
def processor():
    return tiny_processor(VOCABULARY)


@pytest.fixture
def make_model(processor):
    def make(**overrides):
        torch.manual_seed(0)
        model = BridgeSTGForVideoGrounding(tiny_config(processor, **overrides)).eval()
        model.processor = processor
        return model

    return make


@pytest.fixture(scope="session")
def clips():
    data = SyntheticTubes("val", seed=3, count=2, size=(64, 64), frame_count=8)
    return [data[i] for i in range(2)]


@pytest.fixture(scope="session")
def batch(processor, clips):
    """Training inputs of two clips with sentences of different length."""
    features = processor(
        [clip.render() for clip in clips],
        [(np.arange(8) / 4).tolist()] * 2,
        ["the red circle that moves left", "what moves up?"],
        ["From 0.5 s to 1.2 s.", "From 0.0 s to 2.0 s."],
        training=True,
    )
    answer = features.pop("answer_tokens")
    return {**features, "frame_index": torch.tensor([[0, 3, 5], [1, 2, 7]])}, answer
