"""Kernels and launchers of `prune_tokens` and `prune_tokens_varlen`."""
