#!/usr/bin/env bash
# Every operation on the first CUDA device against its twin on the CPU. Where nothing was tested, that is a failure: no device, no
# driver, or no test of that name. The toolkit and CUDA's libraries are fetched where they are missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if ! nvidia-smi -L; then
  echo "gpu_test.sh: no CUDA device here: nothing was tested" >&2
  exit 1
fi
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
target=${CARGO_TARGET_DIR:-target}
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-$capability} LD_LIBRARY_PATH=$here/../../$target/tools/cuda/lib:${LD_LIBRARY_PATH:-}
output=$(mktemp)
trap 'rm -f "$output"' EXIT
CUDA_PARTS=libs "$here/cargo.sh" test --release --lib gpu::parity 2>&1 | tee "$output"
if ! grep -qE '^test result: ok\. [1-9][0-9]* passed' "$output"; then
  echo "gpu_test.sh: nothing was tested" >&2
  exit 1
fi
