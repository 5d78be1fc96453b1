"""Holds what the compiler makes of the kernels at their target shapes against a committed table.

Registers and shared memory have tables of their own (`resource_tables.py`). This table holds what decides how fast a
kernel runs: widths of accesses, asynchronous copies, tensor-core instructions, barriers, loads under way, waves and
launches.
"""

from __future__ import annotations

import json
import os
from typing import Any

from benchmarks.gpu.model import PROCESSORS, Kernel

from .resource_tables import TABLES, TRITON, write_entry

PATH = TABLES / "sass.json"
# Of these a smaller value is worse; of all others a larger one.
MORE_IS_BETTER = ("load_bits", "store_bits", "async_bits", "bulk_copies", "wgmma", "loads_in_flight", "last_wave")


def measured(kernel: Kernel) -> dict[str, Any]:
    """What is held of a kernel.

    load_bits, store_bits, async_bits: the widest access of the kind; narrow_loads: loads of less than 128 bit.
    wgmma, mma, waits_at_loop_top: 1 where there are such instructions.
    last_wave: how full the last of several waves is, 1 where there is but one.
    """
    sass = kernel.sass
    whole = int(kernel.waves)
    return {
        "load_bits": max(sass.widths("LDG"), default=0),
        "store_bits": max(sass.widths("STG"), default=0),
        "async_bits": max(sass.widths("LDGSTS"), default=0),
        "narrow_loads": sum(count for bits, count in sass.widths("LDG", "LDGSTS").items() if bits < 128),
        "bulk_copies": sass.count("UTMALDG", "UBLKCP"),
        "wgmma": int(kernel.product == "HGMMA"),
        "mma": int(kernel.product == "HMMA"),
        "barriers_in_loops": sass.barriers_in_loops,
        "loads_in_flight": sass.loads_in_flight,
        "waits_at_loop_top": int(sass.waits_for_all_at_a_loop_top),
        "waves": -(-kernel.programs // (PROCESSORS * kernel.resident)),
        "last_wave": 1.0 if whole == 0 or kernel.waves == whole else round(kernel.waves - whole, 2),
    }


def gate(name: str, used: dict[str, Any], version: str = TRITON) -> None:
    """Fail where a value got worse than `resources/sass.json` says; unknown versions of the compiler are let through.

    BRIDGE_STG_UPDATE_RESOURCES=1 writes the entry in place of comparing, also where something got better.
    """
    if os.environ.get("BRIDGE_STG_UPDATE_RESOURCES") == "1":
        write_entry(PATH, name, 90, used, version)
        return
    table = json.loads(PATH.read_text())
    if version not in table:
        return
    known = table[version].get(name, {}).get("90")
    assert known is not None, f"{name} is not in {PATH.name}; BRIDGE_STG_UPDATE_RESOURCES=1 adds it"
    assert known.keys() == used.keys(), f"{name}: {PATH.name} holds other values than are measured"
    worse = {key: (known[key], used[key]) for key in used if got_worse(key, known[key], used[key])}
    assert not worse, f"{name} got worse than {PATH.name} says: {worse} (was, is)"


def got_worse(key: str, was: float, now: float) -> bool:
    return now < was if key in MORE_IS_BETTER else now > was
