"""The rank, world size and device of this process, as `torchrun` sets them, and its share of the work."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from .errors import ConfigError
from .settings import show

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DEVICES = ("auto", "cpu", "cuda")


def rank_and_size() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without `torchrun`.

    Raises:
        ConfigError: RANK, WORLD_SIZE or LOCAL_RANK is not an integer in its range, or RANK is not below WORLD_SIZE.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if rank >= size:
        raise ConfigError(f"RANK must be below WORLD_SIZE, got {rank} of {size}: start the processes with torchrun.")
    _number("LOCAL_RANK", 0)  # libraries read it too, and their messages say less
    return rank, size


def shard(items: Iterable[T], rank: int, world_size: int) -> Iterator[T]:
    """Yield the share of one rank: every `world_size`-th item, from the `rank`-th on.

    The shares of all ranks together hold every item once. Items may be endless.
    """
    return itertools.islice(items, rank, None, world_size)


def check_rendezvous() -> None:
    """Check the address by which the ranks of a training run find each other, before a library waits for it.

    Raises:
        ConfigError: see `rank_and_size`; or there are several ranks or a LOCAL_RANK, and another variable that
            `torchrun` sets is missing, or MASTER_PORT is not a port.
    """
    _, size = rank_and_size()
    if size == 1 and "LOCAL_RANK" not in os.environ:
        return
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"{name} is not set, and WORLD_SIZE or LOCAL_RANK is: start the processes with torchrun.")
    if _number("MASTER_PORT", 1) > 65535:
        raise ConfigError(
            f"MASTER_PORT must be an integer <= 65535, got {os.environ['MASTER_PORT']}: torchrun sets it."
        )


def own_device(name: str = "auto") -> torch.device:
    """Return the device of this process; each process of a machine has a GPU of its own.

    Args:
        name: "cpu"; "cuda"; "auto" for a GPU where there is one.

    Raises:
        ConfigError: another name, cuda without a GPU for this process, or a LOCAL_RANK that is not a number.
    """
    import torch  # here, so that `--help` does not wait for it

    if name not in DEVICES:
        raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {name!r}.")
    local = _number("LOCAL_RANK", 0)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    if local >= found:
        raise ConfigError(f"Process {local} of this machine has no GPU of its own: torch sees {found}.")
    return torch.device("cuda", local)


def _number(name: str, least: int) -> int:
    """Read an integer from the environment; a variable that is not set counts as `least`."""
    text = os.environ.get(name, str(least))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise ConfigError(f"{name} must be an integer >= {least}, got {show(text)}: torchrun sets it.")
    return int(text)
