"""Kernels without a GPU: compiled ahead of time, and interpreted.

`@triton.jit` decides between the compiler and the interpreter when a kernel module is imported, so the two need two
processes. `test_<op>.py` sees compiled kernels. `interpreted/test_<op>.py` sees interpreted ones: the plain `pytest`
runs each of these files in a child with TRITON_INTERPRET=1 (`test_interpreted.py`), and
`TRITON_INTERPRET=1 pytest tests/triton_kernels` runs them directly, leaving out the rest.
"""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
INTERPRETED = sorted((HERE / "interpreted").glob("test_*.py"))

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = [str(HERE / "test_*.py")]
else:
    collect_ignore = [str(HERE / "interpreted")]


@pytest.fixture
def poisoned():
    """New tensors hold NaN, or the largest integer, until something writes them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
