"""The Hugging Face classes: configuration, model, processor. Importing this registers the Auto classes."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_bridge_stg import BridgeSTGConfig
from .grounding import BridgeSTGForVideoGrounding
from .loading import load_model, shipped_model
from .outputs import BridgeSTGOutput
from .processing_bridge_stg import BridgeSTGProcessor
from .result import GroundingResult, KeptTokens, PresencePoint, TubeEntry

AutoConfig.register(BridgeSTGConfig.model_type, BridgeSTGConfig, exist_ok=True)
AutoModel.register(BridgeSTGConfig, BridgeSTGForVideoGrounding, exist_ok=True)
AutoProcessor.register(BridgeSTGConfig, BridgeSTGProcessor, exist_ok=True)

__all__ = [
    "BridgeSTGConfig",
    "BridgeSTGForVideoGrounding",
    "BridgeSTGOutput",
    "BridgeSTGProcessor",
    "BridgeSTGVideoProcessor",
    "GroundingResult",
    "KeptTokens",
    "PresencePoint",
    "TubeEntry",
    "load_model",
    "shipped_model",
]


def __getattr__(name: str) -> Any:
    """`BridgeSTGVideoProcessor` alone needs torchvision: it is imported when it is asked for."""
    if name == "BridgeSTGVideoProcessor":
        from .video_processing_bridge_stg import BridgeSTGVideoProcessor

        return BridgeSTGVideoProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
