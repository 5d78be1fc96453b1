"""What all kernels share: configurations, tuning, NVTX ranges."""
