#!/usr/bin/env bash
# cargo with the cuda feature, on a machine with neither a GPU nor a CUDA toolkit: CUDA 13.0 from PyPI wheels, candle's kernels
# without the quantised ones. What it builds needs no CUDA to start; on a GPU it opens the driver's and CUDA 13's libraries by
# name (LD_LIBRARY_PATH; CUDA_PARTS=libs fetches CUDA's). CUDA_COMPUTE_CAP says for which GPU, 90 (H100) if unset.
# Usage: cargo.sh COMMAND [ARGUMENT ...]
# Its own target folder: tools/cuda/check.sh leaves empty kernels in the other one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
target=${CARGO_TARGET_DIR:-target}
command=$1
shift
mkdir -p "$target/tools/cuda"
"${CARGO:-cargo}" fetch --locked
# shellcheck disable=SC2086
"$here/toolchain.sh" "$target/tools/cuda" ${CUDA_PARTS:-}
# shellcheck source=/dev/null
. "$target/tools/cuda/env.sh"
export CARGO_TARGET_DIR=$target/cuda
exec "${CARGO:-cargo}" "$command" --locked --features cuda "$@"
