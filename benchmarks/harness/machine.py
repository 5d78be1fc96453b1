"""What the numbers were taken on, and how fast it can go: names, versions, revision, measured ceilings."""

from __future__ import annotations

import functools
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "torchvision", "transformers", "xformers", "flash-attn")
_ROOT = Path(__file__).parents[2]
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes read plus written in a second by a large copy, operations by a large matrix product."""

    bytes_per_second: float
    flops_per_second: float

    def floor_seconds(self, moved: int, flops: int) -> float:
        """The larger of the two times that the work cannot undercut."""
        return max(moved / self.bytes_per_second, flops / self.flops_per_second)


def device_label(device: torch.device) -> str:
    """Name of the device, with the threads torch may use on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1].strip() if found else name
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def folder_name(label: str) -> str:
    """The label as a folder: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


@functools.cache
def versions() -> str:
    """Python and the packages that providers come from, as "name version" joined by semicolons."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found.append(f"cuda {torch.version.cuda}")
    return "; ".join(found)


@functools.cache
def revision() -> str:
    """Short commit, with "+" for a changed tree; `BRIDGE_STG_REVISION` where there is no repository; else unknown."""
    if "BRIDGE_STG_REVISION" in os.environ:
        return os.environ["BRIDGE_STG_REVISION"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        text = _CACHE.read_text().strip()
        return int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
    except (OSError, KeyError, ValueError):
        return 32 * 2**20


@functools.cache
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copy and multiply once, large; float32 products without TF32. Integer work is held to float32's rate."""
    cuda = device.type == "cuda"
    source = torch.ones(2**28 if cuda else 2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    size = 8192 if cuda else 1024
    kind = dtype if dtype.is_floating_point else torch.float32
    # A generator of its own: after a failed graph capture the default one refuses.
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(kind)
    product = _median_seconds(lambda: a @ a, device)
    return Ceilings(2 * source.nbytes / copy, 2 * size**3 / product)


def _median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
