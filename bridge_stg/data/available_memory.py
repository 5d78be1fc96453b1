"""The memory that this process may still take, as far as the system says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import VideoError, printable

_UNLIMITED = 1 << 60  # version 1 of control groups states a number above this where there is no limit
_CHECKED = 1 << 28  # bytes; for less, the system is not asked


def check_memory(path: str, count: int, width: int, height: int) -> None:
    """Refuse `count` RGB frames of `width` x `height` pixels that do not fit in memory.

    Raises:
        VideoError: they take more than what is free.
    """
    needed = count * width * height * 3
    if needed < _CHECKED:
        return
    free = available_memory()
    if free is not None and needed > free:
        raise VideoError(
            f"{printable(path)} does not fit in memory: {count} of its frames of {width} x {height} pixels take "
            f"{needed / 1e9:.1f} GB, and {max(0, free) / 1e9:.1f} GB are free."
        )


def available_memory() -> int | None:
    """Bytes that may still be allocated: the least that system, control group and process allow; None if unknown."""
    return min(_limits(), default=None)


def _limits() -> Iterator[int]:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    if found:
        yield int(found[1]) * 1024
    for group, limit, usage, cache in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, used = _read(f"{group}/{limit}").strip(), _read(f"{group}/{usage}").strip()
        if most.isdecimal() and used.isdecimal() and int(most) < _UNLIMITED:
            # The kernel counts cached files as used, and drops them where memory is needed.
            cached = re.search(rf"^{cache} (\d+)$", _read(f"{group}/memory.stat"), re.MULTILINE)
            yield int(most) - int(used) + (int(cached[1]) if cached else 0)
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    size = re.match(r"(\d+) ", _read("/proc/self/statm"))
    most_addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if size and most_addresses != resource.RLIM_INFINITY:
        yield most_addresses - int(size[1]) * resource.getpagesize()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:  # another system, or another version of control groups
        return ""
