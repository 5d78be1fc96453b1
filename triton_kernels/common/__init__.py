"""What all kernels share: configurations, tuning and NVTX ranges."""
