"""Arguments of every op: what is no value for them is refused in a sentence; NumPy's numbers are taken as Python's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bridge_stg import warmup
from bridge_stg.ops import (
    attend_memory,
    patchify_frames,
    patchify_videos,
    prune_tokens,
    prune_tokens_varlen,
    score_tokens,
)

X, Q = torch.linspace(-1, 1, 72).view(2, 9, 4), torch.linspace(1, 2, 24).view(2, 3, 4)
VIDEO = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prune_tokens": (prune_tokens, {"tokens": X, "queries": Q, "keep": 2}),
    "score_tokens": (score_tokens, {"tokens": X, "queries": Q}),
    "prune_tokens_varlen": (
        prune_tokens_varlen,
        {"tokens": X[0], "cu_seqlens": torch.tensor([0, 4, 9]), "queries": Q, "budget": 2, "capacity": 9},
    ),
    "attend_memory": (attend_memory, {"query": Q, "memory": X, "scale": 0.5}),
    "patchify_frames": (patchify_frames, {"video": VIDEO, "size": (28, 28), "mean": (0.5,) * 3, "std": (0.5,) * 3}),
    "patchify_videos": (patchify_videos, {"videos": [VIDEO], "size": (28, 28), "mean": (0.5,) * 3, "std": (0.5,) * 3}),
}
SCORED = ("prune_tokens", "score_tokens", "prune_tokens_varlen")
PRUNED = ("prune_tokens", "prune_tokens_varlen")
PATCHIFIED = ("patchify_frames", "patchify_videos")
NUMBERS = (math.nan, math.inf, -math.inf, 1e-60, 1e39, 10**400, "1", [1.0], True, 1j, torch.tensor(1.0))
INTEGERS = (0, -1, 2**70, 2.0, math.nan, "2", None, True, [2], np.float32(2), torch.tensor(2))
NAMES = (None, 3, "none", b"dot", ["dot"], np.array(["dot"]))
FLAGS = (None, 1, "yes", [True], torch.tensor(True))
TRIPLES = (0.5, None, "0.5", (0.5, 0.5), (0.5,) * 4, {0.5}, (0.5, None, 0.5), torch.full((3,), 0.5))
SIZES = (28, None, "28", (28,), (28, 28, 28), (28, 0), (28, 27), (28.0, 28), (28, 2**70), {28: 28})


def refusals():
    for op, names, values in (
        (SCORED, ("scale",), NUMBERS),
        (("attend_memory",), ("scale",), (*NUMBERS, None)),
        (SCORED, ("scoring", "reduce"), NAMES),
        (("prune_tokens",), ("keep",), (*INTEGERS, 10)),
        (("prune_tokens",), ("return_scores", "validate"), FLAGS),
        (("prune_tokens_varlen",), ("capacity",), INTEGERS),
        (("prune_tokens_varlen",), ("budget",), (-1, 2**70, 2.0, math.nan, "2", None, True, [2])),
        (("prune_tokens_varlen",), ("policy",), NAMES),
        (("prune_tokens_varlen",), ("validate",), FLAGS),
        (("attend_memory",), ("return_mass", "validate"), FLAGS),
        (PATCHIFIED, ("mean",), (*TRIPLES, *((0.5, x, 0.5) for x in NUMBERS))),
        (PATCHIFIED, ("std",), (*TRIPLES, *((0.5, x, 0.5) for x in (*NUMBERS, 0, -0.5, 1e-42)))),
        (PATCHIFIED, ("rescale_factor",), (*NUMBERS, 0, -1, None)),
        (PATCHIFIED, ("size",), SIZES),
        (PATCHIFIED, ("patch_size", "temporal_patch_size", "merge_size"), INTEGERS),
        (PATCHIFIED, ("layout", "interpolation"), NAMES),
        (PATCHIFIED, ("dtype",), (None, "float32", torch.float64, np.float32)),
        (PATCHIFIED, ("validate",), FLAGS),
        (("patchify_videos",), ("videos",), (VIDEO, None, 3, {}, {"a": VIDEO}, [VIDEO[0]], [None])),
        (("patchify_videos",), ("frame_index",), (torch.tensor([0]), 3, [[0]], [None, None])),
        (PRUNED + ("attend_memory",) + PATCHIFIED, ("backend",), (["native"], 3, b"native", "abacus", True)),
    ):
        for name in names:
            for each in op:
                yield from (pytest.param(each, name, value, id=f"{each}-{name}-{value!s:.20}") for value in values)


@pytest.mark.parametrize(("op", "name", "value"), list(refusals()))
def test_what_is_no_value_is_refused_in_a_sentence(op, name, value):
    function, arguments = CALLS[op]
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**(arguments | {name: value}))
    message = str(caught.value)
    assert message.startswith(op) and message.endswith(".") and "\n" not in message and len(message) < 400
    assert name in message and any(word in message for word in ("must", "has no"))


@pytest.mark.parametrize(
    ("policy", "budget"),
    [(p, b) for p in ("top_p", "threshold") for b in (*NUMBERS, None)] + [("top_p", 0), ("top_p", 1.5)],
)
def test_budgets_that_are_no_share_and_no_score(policy, budget):
    function, arguments = CALLS["prune_tokens_varlen"]
    with pytest.raises((TypeError, ValueError), match="budget must be"):
        if isinstance(budget, torch.Tensor):
            budget = budget.long()
        function(**(arguments | {"budget": budget, "policy": policy}))


def test_pixel_values_stay_within_their_dtype():
    """A spread that float32 bears is too small for float16, whose largest number is 65504."""
    function, arguments = CALLS["patchify_frames"]
    arguments = arguments | {"video": VIDEO + 255, "std": (1e-6,) * 3}
    assert function(**arguments)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"pixel values of at most 65504 in magnitude, what torch\.float16 holds"):
        function(**arguments, dtype=torch.float16)


def test_numbers_of_numpy_are_numbers():
    for op, changes in (
        ("prune_tokens", {"keep": np.int64(2), "scale": np.float32(1), "return_scores": np.True_}),
        ("score_tokens", {"scale": np.int32(1)}),
        ("prune_tokens_varlen", {"budget": np.int16(2), "capacity": np.uint8(9), "scale": np.float64(1)}),
        ("attend_memory", {"scale": np.float32(0.5)}),
        (
            "patchify_frames",
            {"size": np.array([28, 28]), "mean": np.full(3, 0.5), "std": [np.float32(0.5)] * 3, "patch_size": np.int8(14)},
        ),
        ("patchify_videos", {"size": (np.int64(28), 28), "rescale_factor": np.float64(1 / 255)}),
    ):
        function, arguments = CALLS[op]
        found, expected = (function(**call) for call in (arguments | changes, arguments))
        found, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))


def test_dense_tensors_are_asked_for():
    with pytest.raises(TypeError, match=r"tokens must be a dense tensor, got layout torch\.sparse_coo\."):
        prune_tokens(X.to_sparse(), Q, 2)


SHAPE = {"op": "prune_tokens", "segments": 2, "tokens": 6, "width": 8, "queries": 2, "keep": 3}


@pytest.mark.parametrize(
    "shapes", [SHAPE, None, 3, ["prune_tokens"], [SHAPE | {"tokens": "6"}], [SHAPE | {"segments": 0}], [SHAPE | {"op": []}]]
)
def test_warmup_names_what_is_no_shape(shapes):
    with pytest.raises((TypeError, ValueError), match=r"^warmup: .* must .*got .*\.$"):
        warmup(shapes, "cpu")


def test_warmup_names_what_is_no_device():
    with pytest.raises(ValueError, match=r"^warmup: device must be .*, got 'gpu'\.$"):
        warmup([SHAPE], "gpu")
