"""Baselines that are trained and measured in the same way as the model."""
