#!/usr/bin/env bash
# Everything that needs a GPU, without network, in fifteen minutes on one machine; nothing is installed:
#
#   benchmarks/run_on_gpu.sh --build       compile the libraries (nvcc, no GPU), to be brought along in build/gpu
#   benchmarks/run_on_gpu.sh --part 1      warm up, check and time the target shapes, then the GPU tests: 400 s
#   benchmarks/run_on_gpu.sh --part 2      profile, sanitizers, crossovers, tuning, on the warm cache: 300 s
#   benchmarks/run_on_gpu.sh --dry-run     both parts on the CPU: every import, file and flag
#
# PYTHON (default python3) needs torch, triton, pytest and, without brought libraries, the build tools. OUT (default
# benchmarks/results/run) takes five files, rewritten after every case. The exit status is 1 when a step failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$@"
