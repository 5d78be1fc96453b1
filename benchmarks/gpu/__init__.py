"""What runs on a machine with a GPU, around `run_on_gpu.sh`."""
