"""Kernels and launchers of `attend_memory`."""
