"""Runs each file of `interpreted/` in a process whose kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .conftest import HERE, INTERPRETED


@pytest.mark.parametrize("path", INTERPRETED, ids=lambda path: path.stem)
def test_interpreted(path):
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)],
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
