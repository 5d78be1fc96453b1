"""The functional API: one module an op, each with its contract, checks, reference, registration and autograd."""

from ._backends import BackendStatus, backends
from ._warmup import warmup
from .attend_memory import attend_memory
from .memory_hub import share_memory
from .patchify_frames import patchify_frames, patchify_videos
from .projected_attention import projected_attention
from .prune_tokens import PrunedTokens, ScoredTokens, prune_tokens, score_tokens
from .prune_tokens_varlen import PackedTokens, prune_tokens_varlen

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
