"""Drop-in `nn.Module`s over the ops; usable without transformers."""

from .frame_contrast import FrameContrast
from .frame_patchifier import FramePatchifier
from .importance import importance
from .memory_cross_attention import MemoryCrossAttention
from .multi_layer_query_cross_attention import MultiLayerQueryCrossAttention
from .query_guided_token_pruner import QueryGuidedTokenPruner
from .semantic_bridge import SemanticBridge
from .spatial_decoder import SpatialDecoder

__all__ = [
    "FrameContrast",
    "FramePatchifier",
    "MemoryCrossAttention",
    "MultiLayerQueryCrossAttention",
    "QueryGuidedTokenPruner",
    "SemanticBridge",
    "SpatialDecoder",
    "importance",
]
