"""Bridge-STG: say when an event happens in a video, and where, frame by frame.

Importing the package is cheap: nothing below is loaded before it is used, CUDA is not initialised, and transformers
is imported only by the model classes.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# An installation has the Triton kernels as a subpackage. In a checkout that is not installed they stand beside it.
if not (Path(__file__).parent / "triton_kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from .data import GroundingSample, SyntheticTubes
    from .models import (
        BridgeSTGConfig,
        BridgeSTGForVideoGrounding,
        BridgeSTGProcessor,
        GroundingResult,
        load_model,
    )
    from .modules import importance
    from .ops import (
        attend_memory,
        backends,
        patchify_frames,
        patchify_videos,
        prune_tokens,
        prune_tokens_varlen,
        share_memory,
        warmup,
    )

__version__ = "0.1.0"

_HOMES = {
    "attend_memory": "ops",
    "backends": "ops",
    "patchify_frames": "ops",
    "patchify_videos": "ops",
    "prune_tokens": "ops",
    "prune_tokens_varlen": "ops",
    "share_memory": "ops",
    "warmup": "ops",
    "importance": "modules",
    "BridgeSTGConfig": "models",
    "BridgeSTGForVideoGrounding": "models",
    "BridgeSTGProcessor": "models",
    "GroundingResult": "models",
    "load_model": "models",
    "GroundingSample": "data",
    "SyntheticTubes": "data",
}

__all__ = [  # noqa: RUF022 - grouped by home: ops, modules, models, data
    "attend_memory",
    "backends",
    "patchify_frames",
    "patchify_videos",
    "prune_tokens",
    "prune_tokens_varlen",
    "share_memory",
    "warmup",
    "importance",
    "BridgeSTGConfig",
    "BridgeSTGForVideoGrounding",
    "BridgeSTGProcessor",
    "GroundingResult",
    "load_model",
    "GroundingSample",
    "SyntheticTubes",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
