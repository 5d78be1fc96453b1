"""The functional API: one module an op, each with its contract, checks, reference, registration and autograd."""

from .attend_memory.api import attend_memory
from .attend_memory.projected_attention import projected_attention
from .attend_memory.share_memory import share_memory
from .core.backends import BackendStatus, backends
from .core.warmup import warmup
from .patchify_frames.api import patchify_frames, patchify_videos
from .prune_tokens.api import PrunedTokens, ScoredTokens, prune_tokens, score_tokens
from .prune_tokens.varlen import PackedTokens, prune_tokens_varlen

__all__ = [
    "BackendStatus",
    "PackedTokens",
    "PrunedTokens",
    "ScoredTokens",
    "attend_memory",
    "backends",
    "patchify_frames",
    "patchify_videos",
    "projected_attention",
    "prune_tokens",
    "prune_tokens_varlen",
    "score_tokens",
    "share_memory",
    "warmup",
]
