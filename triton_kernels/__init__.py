"""Triton kernels and their launchers. Installed as `bridge_stg.triton_kernels`."""
