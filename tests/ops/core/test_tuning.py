"""`bridge-stg tune`: what it says where it cannot time anything."""

from __future__ import annotations

import pytest
import torch

from bridge_stg.errors import BridgeSTGError
from bridge_stg.ops.core.tuning import tune_op

pytest.importorskip("triton")


def test_bad_requests_are_one_sentence(tmp_path):
    with pytest.raises(BridgeSTGError, match=r"tune knows prune_tokens and prune_tokens_varlen, got 'attend'\."):
        tune_op("attend", tmp_path / "tuned.json")
    for shape in ("64,196,256", "64,196,0,8", "a,b,c,d"):
        with pytest.raises(BridgeSTGError, match=f"four positive integers, got '{shape}'"):
            tune_op("prune_tokens", tmp_path / "tuned.json", [shape])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_without_a_gpu(tmp_path):
    with pytest.raises(BridgeSTGError, match=r"on a GPU, and there is none here\."):
        tune_op("prune_tokens", tmp_path / "tuned.json", ["8,196,256,8"])
    assert not (tmp_path / "tuned.json").exists()
