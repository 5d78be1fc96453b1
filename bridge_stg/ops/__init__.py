"""The functional API: one module an op, each with its contract, checks, reference, registration and autograd."""

from ._backends import BackendStatus, backends
from .attend_memory import attend_memory
from .patchify_frames import patchify_frames, patchify_videos
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
    "prune_tokens",
    "prune_tokens_varlen",
    "score_tokens",
]
