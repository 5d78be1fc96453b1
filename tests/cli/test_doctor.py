"""What `bridge-stg doctor` finds."""

import pytest
import torch

from bridge_stg.cli import doctor as diagnosis
from bridge_stg.ops.core.backends import BackendStatus


@pytest.mark.parametrize("has_device", [False, True])
def test_nothing_is_usable_that_has_no_device(monkeypatch, has_device):
    table = [
        BackendStatus("op", "cuda", ("cuda",), True, None),
        BackendStatus("op", "interpreted", ("cuda", "cpu"), True, None),
        BackendStatus("op", "reference", (), True, None),
        BackendStatus("op", "broken", ("cuda",), False, "not built"),
    ]
    monkeypatch.setattr("bridge_stg.ops.backends", lambda: table)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_device)
    monkeypatch.setattr(diagnosis, "_device", lambda: "a device")
    found = {entry["name"]: (entry["usable"], entry["reason"]) for entry in diagnosis.diagnose()["backends"]}
    assert found == {
        "cuda": (True, None) if has_device else (False, "no CUDA device or driver found"),
        "interpreted": (True, None),
        "reference": (True, None),
        "broken": (False, "not built"),
    }
