#!/usr/bin/env bash
# dist/cuda/: as wheel.sh, with the CUDA kernels too, for the torch that is installed; needs nvcc of torch's CUDA, no GPU.
# This script has not been run to its end; a nightly test builds and loads the same extension (tests/test_build.py).
# TORCH_CUDA_ARCH_LIST picks the architectures; unset, those that nvcc and the kernels know (sm_80, sm_90, sm_100, sm_120).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-dist/cuda} FUSED_NCE_BUILD=cpu,cuda exec bash release/wheel.sh "$@"
