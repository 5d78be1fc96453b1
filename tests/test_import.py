"""`import bridge_stg` is lean: what it must not load, it does not load."""

import subprocess
import sys
from pathlib import Path

import pytest

import bridge_stg


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("module", ["bridge_stg", "bridge_stg.ops", "bridge_stg.modules"])
def test_neither_transformers_nor_cuda_is_touched(module):
    code = f"import {module}, sys, torch; print('transformers' in sys.modules, torch.cuda.is_initialized())"
    assert run(code) == ["False", "False"]


def test_the_bare_import_loads_nothing_but_itself():
    """Its cost beside `import torch` is two standard-library imports: no module of the package comes along."""
    code = "import bridge_stg, sys; print(*[m for m in sys.modules if m.startswith(('bridge_stg.', 'torch', 'cv2'))])"
    assert run(code) == []


def test_modules_work_where_transformers_is_missing():
    code = """
import sys
sys.modules["transformers"] = None
import torch
from bridge_stg.modules import MemoryCrossAttention, SemanticBridge, SpatialDecoder, QueryGuidedTokenPruner
pruned = QueryGuidedTokenPruner(8, 8, 4, 0.5)(torch.randn(2, 6, 8), torch.randn(2, 3, 8))
print(pruned.tokens.shape[1])
"""
    assert run(code) == ["3"]


def test_a_checkout_that_is_not_installed_works():
    root = Path(bridge_stg.__file__).parents[1]
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, {str(root)!r})
import torch, bridge_stg
from bridge_stg.triton_kernels import prune_tokens
print(bridge_stg.prune_tokens(torch.randn(2, 6, 8), torch.randn(2, 3, 8), 3, backend="reference")[0].shape[1])
"""
    assert run(code) == ["3"]


@pytest.mark.parametrize("name", bridge_stg.__all__)
def test_every_public_name_is_there(name):
    assert getattr(bridge_stg, name).__name__ == name
    assert name in dir(bridge_stg)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bridge_stg.nothing


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert bridge_stg.__version__ == version("bridge-stg")
