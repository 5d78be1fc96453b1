"""Every test: one thread, one seed; tests marked `gpu` only where there is a CUDA device."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
# A job of a shell without job control ignores Ctrl-C, and so would the processes that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure():
    """A build named by hand, such as one with sanitizers, must not be passed over in silence."""
    from bridge_stg.ops.core.native import library_obstacle

    if os.environ.get("BRIDGE_STG_LIBRARY_FOLDER") and (obstacle := library_obstacle("cpu")):
        pytest.exit(f"BRIDGE_STG_LIBRARY_FOLDER: {obstacle}", returncode=1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
