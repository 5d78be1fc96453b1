"""Kernels launched and host synchronisations of one call on CUDA, read off the profiler's runtime events."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

_RANGE = "bridge_stg_bench_call"
_LAUNCH = re.compile(r"^cu(da)?LaunchKernel|^cu(da)?LaunchCooperativeKernel")
_SYNC = re.compile(r"^cu(da)?(Stream|Device|Event|Ctx)Synchronize|^cudaMemcpy$|^cuMemcpy(DtoH|HtoD)_v2$")


class Counts(NamedTuple):
    """Of one call: kernels launched, and calls in which the host waited for the device."""

    kernels: int
    syncs: int


def count_launches(call: Callable[[], object]) -> Counts | None:
    """Profile one call; None where the profiler sees no runtime events."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    profiler = torch.profiler.profile(activities=activities)
    try:
        profiler.start()
    except RuntimeError:  # no CUPTI here, or no right to it
        return None
    with torch.profiler.record_function(_RANGE):
        call()
    torch.cuda.synchronize()
    profiler.stop()
    events = profiler.events() or []
    return counts_of((e.name, e.time_range.start, e.time_range.end) for e in events)


def counts_of(events: Iterable[tuple[str, float, float]]) -> Counts | None:
    """Counts from (name, start, end) of host events, of those that begin inside the marked range."""
    rows = list(events)
    ranges = [(start, end) for name, start, end in rows if name == _RANGE]
    if not any(name.startswith("cu") for name, _, _ in rows) or not ranges:
        return None
    start, end = min(ranges)  # the device's copy of the range starts later
    inside = [name for name, begin, _ in rows if start <= begin <= end]
    return Counts(sum(bool(_LAUNCH.match(n)) for n in inside), sum(bool(_SYNC.match(n)) for n in inside))
