"""`warmup`: which calls it makes, and what it says of shapes it cannot use."""

from __future__ import annotations

import pytest
import torch

from bridge_stg import warmup
from bridge_stg.ops.core import warmup as _warmup

SEGMENTS = {"op": "prune_tokens", "segments": 2, "tokens": 6, "width": 8, "queries": 2, "keep": 3}
PACKED = {
    "op": "prune_tokens_varlen",
    "segments": 2,
    "tokens": 7,
    "width": 8,
    "queries": 2,
    "budget": 3,
    "capacity": 6,
    "policy": "per_clip",
}


def test_calls_every_op_forward_and_backward(monkeypatch):
    seen = []
    for op in ("prune_tokens", "prune_tokens_varlen"):
        original = _warmup._WARMUPS[op]

        def watched(*, device, original=original, **sizes):
            outputs = original(device=device, **sizes)
            outputs[0].register_hook(lambda grad: seen.append((str(device), grad.dtype)))
            return outputs

        monkeypatch.setitem(_warmup._WARMUPS, op, watched)
    assert warmup([SEGMENTS | {"dtype": torch.float32, "scoring": "cosine", "masked": True}, PACKED], "cpu") == 2
    assert seen == [("cpu", torch.float32), ("cpu", torch.bfloat16)]


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"op must be one of .*'prune_tokens', .*, got 'prune'\."):
        warmup([SEGMENTS | {"op": "prune"}], "cpu")
    with pytest.raises(ValueError, match=r"a shape of prune_tokens has a missing a required .*'keep'"):
        warmup([{key: value for key, value in SEGMENTS.items() if key != "keep"}], "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is none here"):
            warmup([SEGMENTS])
