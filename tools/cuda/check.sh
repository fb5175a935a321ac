#!/usr/bin/env bash
# Type check of everything behind the `cuda` feature; needs neither a GPU nor a CUDA toolkit. Kernels are not compiled:
# `make cuda` does that. The capability 8.7 belongs to no server GPU: it makes cargo run the build scripts again when
# a real build follows in the same target folder, so that none ever links the empty outputs of the stand-in.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
export NVCC=$here/nvcc-empty CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=87
unset CUDA_HOME CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR
exec "${CARGO:-cargo}" check --locked --features cuda --all-targets "$@"
