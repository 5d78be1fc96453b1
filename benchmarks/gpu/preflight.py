"""What `run_on_gpu.sh` stands on: packages, tools and files before the build, usable backends after it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "triton", "numpy", "pytest", "hypothesis", "setuptools", "pybind11")
USED_IF_THERE = ("transformers", "torchvision", "xdist", "matplotlib", "xformers", "flash_attn")
FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "csrc", "triton_kernels", "bridge_stg", "tests", "benchmarks")
# Tools, and what does their work where they are missing.
TOOLS = {"c++": None, "cmake": "cmake"}
GPU_TOOLS = ("nvcc", "nvidia-smi", "compute-sanitizer", "ncu")


def preflight(dry_run: bool) -> list[str]:
    """Print what was found; what is missing, one sentence each."""
    print(f"python {sys.version.split()[0]}")
    missing = []
    for name in (*NEEDED, *USED_IF_THERE):
        state = _import(name)
        print(f"{name}: {state or _version(name)}")
        if state is not None and name in NEEDED:
            missing.append(f"Python package {name}: {state}.")
    missing += [f"file {name} is not there." for name in FILES if not (ROOT / name).exists()]
    for tool, module in TOOLS.items():
        if not shutil.which(tool) and (module is None or importlib.util.find_spec(module) is None):
            missing.append(f"{tool} is not on PATH.")
    for tool in GPU_TOOLS:
        print(f"{tool}: {shutil.which(tool) or ('absent here' if dry_run else 'absent')}")
    import torch

    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    elif not dry_run:
        missing.append("torch finds no CUDA device.")
    return missing


def unusable_backends() -> list[str]:
    """Backends that do not run in this installation."""
    from bridge_stg.ops import backends

    for status in backends():
        print(f"{status.op} {status.name}: {'usable' if status.usable else status.reason}")
    return [f"{s.op} has no usable backend {s.name}: {s.reason}." for s in backends() if not s.usable]


def _import(name: str) -> str | None:
    """Why the package cannot be imported, or None; the large optional ones are only looked up."""
    if name in USED_IF_THERE:
        return None if importlib.util.find_spec(name) else "not installed"
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    return None


def _version(name: str) -> str:
    try:
        return metadata.version({"xdist": "pytest-xdist", "flash_attn": "flash-attn"}.get(name, name))
    except metadata.PackageNotFoundError:
        return "version unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="a machine without a GPU will do")
    parser.add_argument("--built", action="store_true", help="check the backends after the build instead")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    missing = unusable_backends() if options.built else preflight(options.dry_run)
    for line in missing:
        print(f"missing: {line}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
