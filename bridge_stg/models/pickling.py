"""Pickling a model that has run, without the closures by which `transformers` records hidden states."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

_RECORDER = "transformers.utils.output_capturing"
_INSTALLED = "_output_capturing_hooks_installed"


def without_recorders(module: nn.Module, made: dict[int, nn.Module] | None = None) -> nn.Module:
    """Copy a module tree without these hooks; the copy shares all tensors, and the next pass sets the hooks again.

    Args:
        made: copies so far by the id of their original, so that a module in two places stays one.
    """
    made = {} if made is None else made
    if id(module) not in made:
        made[id(module)] = plain = copy.copy(module)
        plain.__dict__ |= state_without_recorders(module.__dict__, made)
        plain.__dict__.pop(_INSTALLED, None)
    return made[id(module)]


def state_without_recorders(state: dict[str, Any], made: dict[int, nn.Module] | None = None) -> dict[str, Any]:
    """The given `module.__dict__` without these hooks and with such copies of its children."""
    made = {} if made is None else made
    every = state["_forward_hooks"]
    hooks = {key: hook for key, hook in every.items() if getattr(hook, "__module__", None) != _RECORDER}
    children = {
        name: child if child is None else without_recorders(child, made) for name, child in state["_modules"].items()
    }
    return state | {"_forward_hooks": type(every)(hooks), "_modules": children}
