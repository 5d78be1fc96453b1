"""The backend table: what it lists, what it picks, what it refuses."""

from __future__ import annotations

import pytest

from bridge_stg.ops import BackendStatus, backends
from bridge_stg.ops.core import backends as _backends
from bridge_stg.ops.core.backends import Backend, choose_backend, find_backend, register_backend


@pytest.fixture
def table(monkeypatch):
    """A table of one op, `double`: a slow backend for any device, a fast one for CUDA, a broken one."""
    monkeypatch.setattr(_backends, "_REGISTRY", {})
    register_backend(Backend("double", "reference", lambda x: x + x))
    register_backend(Backend("double", "cuda", lambda x: x << 1, devices=("cuda",), limits=only_small))
    register_backend(Backend("double", "native", lambda x: x, obstacle=lambda: "its library is not installed"))
    register_backend(Backend("double", "triton", lambda x: x * 2, devices=("cuda", "cpu"), only_if_asked=("cpu",)))


def only_small(size=0, **call):
    return f"it takes at most 4, got {size}" if size > 4 else None


def test_every_op_has_a_usable_reference():
    listed = {(status.op, status.name): status for status in backends()}
    for op in ("patchify_frames", "prune_tokens", "prune_tokens_varlen", "attend_memory"):
        status = listed[op, "reference"]
        assert status.usable and status.reason is None and status.devices == ()


def test_statuses_say_why_not(table):
    assert backends() == [
        BackendStatus("double", "cuda", ("cuda",), True, None),
        BackendStatus("double", "native", (), False, "its library is not installed"),
        BackendStatus("double", "triton", ("cuda", "cpu"), True, None),
        BackendStatus("double", "reference", (), True, None),
    ]


def test_the_first_that_can_run_is_picked(table):
    assert choose_backend("double", None, "cuda") == "cuda"
    assert choose_backend("double", None, "cuda", size=5) == "triton"
    assert choose_backend("double", None, "cpu") == "reference"
    assert find_backend("double", "reference").forward(3) == 6


def test_a_request_is_honoured_or_refused(table):
    assert choose_backend("double", "reference", "cuda") == "reference"
    assert choose_backend("double", "triton", "cpu") == "triton"
    with pytest.raises(ValueError, match=r"double cannot run on backend 'cuda': it runs on cuda tensors, got cpu\."):
        choose_backend("double", "cuda", "cpu")
    with pytest.raises(ValueError, match=r"cannot run on backend 'cuda': it takes at most 4, got 5\."):
        choose_backend("double", "cuda", "cuda", size=5)
    with pytest.raises(ValueError, match=r"cannot run on backend 'native': its library is not installed\."):
        choose_backend("double", "native", "cpu")
    with pytest.raises(ValueError, match=r"has no backend 'magic'; it has 'cuda', 'native', 'triton', 'reference'\."):
        choose_backend("double", "magic", "cpu")


def test_no_backend_at_all_is_an_error(monkeypatch):
    monkeypatch.setattr(_backends, "_REGISTRY", {})
    register_backend(Backend("double", "cuda", lambda x: x, devices=("cuda",)))
    with pytest.raises(ValueError, match="double has no backend that runs on 'cpu' here"):
        choose_backend("double", None, "cpu")
