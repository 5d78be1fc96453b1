"""Holds what compiled Triton kernels use against limits and against a committed table."""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from benchmarks.gpu.ahead_of_time import Resources

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_LIMIT = 512
# Above its tensor memory Triton succeeds, and emits a kernel that only traps and uses 4 registers.
FEWEST_REGISTERS = 8

TABLES = Path(__file__).parent / "resources"
TRITON = ".".join(triton.__version__.split(".")[:2])


def gate(op: str, name: str, cc: int, resources: Resources) -> None:
    """Fail when a kernel spills, does not fit, traps, or uses more than `resources/<op>.json` has for it.

    The table is keyed by Triton version (major.minor), variant and compute capability; a version it does not know
    is held against the absolute limits alone. BRIDGE_STG_UPDATE_RESOURCES=1 writes the entry in place of comparing.
    """
    what = f"{op} {name} on sm_{cc}"
    assert resources.stack == 0, f"{what}: {resources.stack} bytes of stack"
    assert resources.local == 0, f"{what}: {resources.local} bytes of local memory"
    assert resources.shared <= SHARED_LIMIT[cc], f"{what}: {resources.shared} bytes of shared memory"
    assert resources.tensor_memory <= TENSOR_MEMORY_LIMIT, f"{what}: {resources.tensor_memory} tensor memory columns"
    assert resources.registers > FEWEST_REGISTERS, f"{what}: only {resources.registers} registers, code is missing"
    assert not resources.has_trap, f"{what}: its code traps"
    used = {key: asdict(resources)[key] for key in ("registers", "shared", "tensor_memory")}
    path = TABLES / f"{op}.json"
    if os.environ.get("BRIDGE_STG_UPDATE_RESOURCES") == "1":
        write_entry(path, name, cc, used)
        return
    table = json.loads(path.read_text()) if path.exists() else {}
    if TRITON not in table:
        return
    known = table[TRITON].get(name, {}).get(str(cc))
    assert known is not None, f"{what} is not in {path.name}; BRIDGE_STG_UPDATE_RESOURCES=1 adds it"
    worse = {key: (known[key], used[key]) for key in used if used[key] > known[key]}
    assert not worse, f"{what} got worse than {path.name} says: {worse} (was, is)"


def write_entry(path: Path, name: str, cc: int, used: dict[str, Any], version: str = TRITON) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # test workers write the same table
        file.seek(0)
        table = json.loads(file.read() or "{}")
        table.setdefault(version, {}).setdefault(name, {})[str(cc)] = used
        for known, variants in table.items():
            table[known] = {key: dict(sorted(variants[key].items())) for key in sorted(variants)}
        file.truncate(0)
        file.write(_dump(table))


def _dump(table: dict[str, Any]) -> str:
    """JSON with one line for each variant and compute capability."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\s*([^{}]*?)\s*\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text) + "\n"
