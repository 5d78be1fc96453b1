"""Peak memory of one call: the allocator's high-water mark on CUDA, that of the process on the CPU.

On the CPU the resident set is what counts: it sees scratch that kernels take from malloc, which torch's own
allocation events do not. Linux resets the mark through `/proc/self/clear_refs`; the heap is trimmed first, so that
pages left over by earlier calls are not reused unseen.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def can_measure(device: torch.device) -> bool:
    """Whether `peak_bytes` works here: anywhere on CUDA, on Linux for the CPU."""
    if device.type == "cuda":
        return True
    try:
        return sys.platform == "linux" and _reset_high_water() is None and _resident("VmHWM") > 0
    except OSError:
        return False


def peak_bytes(call: Callable[[], object], device: torch.device) -> tuple[int, object]:
    """(bytes above what was in use before, at the call's worst moment; what it returned). Collect garbage first."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    _reset_high_water()
    before = _resident("VmRSS")
    result = call()
    return max(0, _resident("VmHWM") - before), result


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t is not None and t.numel() and t.device.type != "meta"
    }
    return sum(storages.values())


def _reset_high_water() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR.write_text("5")


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0
