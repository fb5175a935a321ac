#!/usr/bin/env bash
# A release binary with the cuda feature, on a machine with neither a GPU nor a CUDA toolkit: CUDA 13.0 from PyPI wheels,
# candle's kernels without the quantised ones. The binary needs no CUDA to start; on a GPU it opens the driver's and CUDA 13's
# libraries by name (LD_LIBRARY_PATH). CUDA_COMPUTE_CAP says for which GPU, 90 (H100) if unset.
# Its own target folder: tools/cuda/check.sh leaves empty kernels in the other one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
target=${CARGO_TARGET_DIR:-target}
export CARGO_TARGET_DIR=$target/cuda
mkdir -p "$target/tools/cuda"
"${CARGO:-cargo}" fetch --locked
"$here/toolchain.sh" "$target/tools/cuda"
# shellcheck source=/dev/null
. "$target/tools/cuda/env.sh"
"${CARGO:-cargo}" build --release --locked --features cuda "$@"
binary=$CARGO_TARGET_DIR/release/palimpsest
if readelf -d "$binary" | grep -E 'NEEDED.*(libcu|libnv|libnccl)'; then
  echo "build.sh: $binary needs CUDA's libraries to start" >&2
  exit 1
fi
echo "built $binary for compute capability $CUDA_COMPUTE_CAP"
