"""The machine code of the kernels at their target shapes does not get worse, and no op launches more kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.launches import CALLS, recorded, torch_operations
from benchmarks.gpu.model import LIBRARY, compiled, patchify_kernel
from bridge_stg.ops.core.native import build_info

from . import sass


def kernels():
    """(name, launch) of every distinct launch of the targets."""
    found = {}
    for (target, _), call in CALLS.items():
        for launch in recorded(call):
            found.setdefault(str((launch.variant, launch.grid)), (target, launch))
    names: dict[str, int] = {}
    for target, launch in found.values():
        name = f"{target}/{launch.kernel}"
        names[name] = count = names.get(name, 0) + 1
        yield pytest.param(name if count == 1 else f"{name}-{count}", launch, id=f"{name}-{count}")


@pytest.mark.parametrize(("name", "launch"), list(kernels()))
def test_the_code_of_a_kernel_does_not_get_worse(name, launch):
    sass.gate(name, sass.measured(compiled(launch)))


@pytest.mark.skipif(not LIBRARY.is_file(), reason="the CUDA library was not built")
def test_the_code_of_the_cuda_kernel_does_not_get_worse():
    info = build_info()
    compiler = str(info and info.get("cuda_compiler"))
    if "90" not in str(info and info.get("cuda_architectures")):
        pytest.skip("the CUDA library holds no code for sm_90")
    sass.gate("patchify_frames/patchify_kernel", sass.measured(patchify_kernel(LIBRARY)), compiler.rpartition(".")[0])


@pytest.mark.parametrize(("target", "mode"), CALLS)
def test_launches(target, mode):
    batch = int(target.rpartition("B")[2]) if target.startswith("attend") else 0
    others = torch_operations(batch, mode != "forward") if batch else 0
    sass.gate(
        f"{target}, {mode}", {"kernels": len(recorded(CALLS[target, mode])), "operations_of_torch": others}, "any"
    )


def test_a_worse_value_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("BRIDGE_STG_UPDATE_RESOURCES", raising=False)
    monkeypatch.setattr(sass, "PATH", tmp_path / "sass.json")
    known = {"load_bits": 128, "barriers_in_loops": 2, "last_wave": 0.8}
    Path(sass.PATH).write_text(json.dumps({"1.0": {"a kernel": {"90": known}}}))
    sass.gate("a kernel", known | {"load_bits": 256, "barriers_in_loops": 1}, "1.0")
    sass.gate("a kernel", {"load_bits": 8}, "2.0")
    for change in ({"load_bits": 64}, {"barriers_in_loops": 3}, {"last_wave": 0.1}):
        with pytest.raises(AssertionError, match=rf"a kernel got worse .*{next(iter(change))}"):
            sass.gate("a kernel", known | change, "1.0")
    with pytest.raises(AssertionError, match=r"another kernel is not in sass\.json"):
        sass.gate("another kernel", known, "1.0")
