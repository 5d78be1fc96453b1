"""Longer comparisons that answer one question each: ablation, coupled baseline, prefill, loader memory."""
