"""Which of how many processes this is, as `torchrun` says, and which device is its own."""

from __future__ import annotations

import os

import torch

from .errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without `torchrun`."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device(name: str = "auto") -> torch.device:
    """The device of this process: of several on a machine, each has a GPU of its own.

    Args:
        name: "cpu"; "cuda"; "auto" for a GPU where there is one.

    Raises:
        ConfigError: another name, or cuda without a GPU for this process.
    """
    if name not in DEVICES:
        raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {name!r}.")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= found:
        raise ConfigError(f"Process {local} of this machine has no GPU of its own: torch sees {found}.")
    return torch.device("cuda", local)
