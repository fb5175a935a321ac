#!/usr/bin/env bash
# A release binary with the cuda feature, target/cuda/release/palimpsest: see cargo.sh, which this gives its arguments.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
"$here/cargo.sh" build --release "$@"
binary=${CARGO_TARGET_DIR:-target}/cuda/release/palimpsest
if readelf -d "$binary" | grep -E 'NEEDED.*(libcu|libnv|libnccl)'; then
  echo "build.sh: $binary needs CUDA's libraries to start" >&2
  exit 1
fi
echo "built $binary for compute capability ${CUDA_COMPUTE_CAP:-90}"
