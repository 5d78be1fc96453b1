"""What nvcc makes of the CUDA kernel, without a GPU: no stack, no spills, no more registers than committed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bridge_stg.ops.core.native import library_obstacle

ROOT = Path(__file__).parents[3]
TABLE = Path(__file__).parent / "resources" / "patchify_frames_cuda.json"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
KERNELS = """
#include "patchify_frames/patchify_frames.cuh"
using namespace bridge_stg;
template <typename Value>
const void* kernels[] = {(const void*)patchify_kernel<Value, 14>, (const void*)patchify_kernel<Value, 16>,
                         (const void*)patchify_kernel<Value, 0>};
const void** every_kernel[] = {kernels<float>, kernels<__half>};
"""  # bfloat16 differs from float16 by one instruction


def usage(folder: Path, architecture: str) -> dict[str, dict[str, int]]:
    """Registers, stack frame, spills and static shared memory in bytes, by kernel."""
    source = folder / "kernels.cu"
    source.write_text(KERNELS)
    command = [str(NVCC), "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-cubin", f"-arch={architecture}", "-Xptxas=-v"]
    done = subprocess.run(
        [*command, str(source), "-o", str(folder / "kernels.cubin")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    table = {}
    for entry in done.stderr.split("Compiling entry function")[1:]:
        name = re.search(r"patchify_kernelI(\w+?)Li(\d+)", entry)
        numbers = [re.search(rf"(\d+) {what}", entry) for what in ("registers", "bytes stack frame", "bytes spill")]
        assert name is not None and all(numbers), entry
        value = {"f": "float32", "6__half": "float16"}[name[1]]
        registers, stack, spills = (int(number[1]) for number in numbers if number)
        table[f"{value}, patch {name[2]}"] = {"registers": registers, "stack": stack, "spills": spills}
    return table


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_resources_are_as_committed(architecture, tmp_path):
    found = usage(tmp_path, architecture)
    assert len(found) == 6
    for name, row in found.items():
        assert row["stack"] == 0 and row["spills"] == 0, (name, row)
        assert 8 < row["registers"] <= 80, (name, row)  # 3 blocks of 256 threads a multiprocessor
    version = re.search(
        r"release ([\d.]+)", subprocess.run([str(NVCC), "--version"], capture_output=True, text=True).stdout
    )
    assert version is not None
    committed = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    rows = committed.setdefault(f"nvcc {version[1]}", {})
    if os.environ.get("BRIDGE_STG_UPDATE_RESOURCES") == "1":
        rows[architecture] = found
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(committed, indent=2, sort_keys=True) + "\n")
    elif architecture in rows:  # another compiler counts differently; the bounds above hold for all
        assert {name: row["registers"] for name, row in found.items()} == {
            name: row["registers"] for name, row in rows[architecture].items()
        }


@pytest.mark.skipif(library_obstacle("cuda") is not None, reason=str(library_obstacle("cuda")))
def test_the_library_loads_without_a_driver():
    code = (
        "import torch, bridge_stg.ops.core.native as native; assert native.library_obstacle('cuda') is None; "
        "assert torch._C._dispatch_has_kernel_for_dispatch_key('bridge_stg_native::patchify_frames', 'CUDA'); "
        "assert not torch.cuda.is_initialized()"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
