#!/usr/bin/env bash
# Every operation on the first CUDA device against its twin on the CPU. Where no device is nothing is tested, and that is a failure.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if ! nvidia-smi -L; then
  echo "gpu_test.sh: no CUDA device here: nothing was tested" >&2
  exit 1
fi
exec "$here/cargo.sh" test --release --lib gpu::parity
