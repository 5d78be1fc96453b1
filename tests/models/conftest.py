"""A tiny model with random weights, and clips for it."""

import numpy as np
import pytest
import torch

from bridge_stg.data import VOCABULARY, SyntheticTubes
from bridge_stg.models import BridgeSTGForVideoGrounding
from bridge_stg.models.tiny import tiny_config, tiny_processor
from tests.models.checkpoints import write_checkpoint

SMALL_FRAMES = {"min_pixels": 1024, "max_pixels": 1536}
SMALL_DECODER = {
    "bridge_tokens": 3,
    "bridge_layers": 2,
    "decoder_dim": 32,
    "decoder_heads": 2,
    "decoder_ffn_dim": 48,
    "score_dim": 16,
    "max_answer_tokens": 4,
}


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


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a small random checkpoint of each family, written when first asked for."""
    root = tmp_path_factory.mktemp("backbones")

    def folder(model_type, seed=0):
        path = root / f"{model_type}-{seed}"
        return path if path.is_dir() else write_checkpoint(path, model_type, seed)

    return folder


@pytest.fixture(scope="session")
def load_backbone(checkpoints):
    """A model on such a checkpoint, with a small spatial half."""

    def load(model_type, seed=0, **overrides):
        folder = checkpoints(model_type, seed)
        torch.manual_seed(1)
        settings = SMALL_DECODER | overrides
        return BridgeSTGForVideoGrounding.from_backbone(folder, processor=SMALL_FRAMES, **settings)

    return load
