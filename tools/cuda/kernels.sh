#!/usr/bin/env bash
# Compiles every kernel of ours for compute capabilities 8.0 (A100) and 9.0 (H100), warnings being errors, on a machine with neither
# a GPU nor a CUDA toolkit, and says what each takes of a multiprocessor: docs/kernels.md. With --check it changes nothing and
# fails where that page says something else. Usage: kernels.sh [--check]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
target=${CARGO_TARGET_DIR:-target}
page=docs/kernels.md
mkdir -p "$target/tools/cuda"
"${CARGO:-cargo}" fetch --locked --quiet
"$here/toolchain.sh" "$target/tools/cuda" > /dev/null
# shellcheck source=/dev/null
. "$target/tools/cuda/env.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() { # SOURCE CAPABILITY -> lines of "source kernel capability registers shared spilled"
  "$REAL_NVCC" -std=c++17 -O3 -cubin -arch="sm_$2" -Werror all-warnings -Xptxas -v,-Werror -o "$work/$(basename "$1").$2.cubin" "$1" 2>&1 |
    awk -v source="$(basename "$1")" -v capability="$2" '
      /error|warning/ { print > "/dev/stderr" }
      /Compiling entry function/ { split($0, part, "\047"); kernel = part[2] }
      /spill stores/ { spilled = $5 + $9 }
      /Used [0-9]+ registers/ {
        registers = $0; sub(/.*Used /, "", registers); sub(/ registers.*/, "", registers)
        shared = 0
        if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART, RLENGTH) + 0
        print source, kernel, capability, registers, shared, spilled
      }'
}

for source in src/model/ops/*.cu; do
  for capability in 80 90; do compile "$source" "$capability"; done
done > "$work/found"

{
  echo '# What our CUDA kernels take'
  echo
  echo 'Made by `tools/cuda/kernels.sh` with nvcc 13.0.88, without a GPU; `make test` holds it against the compiler. All run in blocks of 256 threads. A'
  echo 'multiprocessor has 65,536 registers: with at most 32 a thread eight blocks fit it, with 40 six. The program carries PTX, which the'
  echo 'driver translates for its GPU: its figures may differ.'
  echo
  echo '| file | kernel | registers a thread, sm_80 / sm_90 | shared memory a block, bytes | spilled, bytes, sm_80 / sm_90 |'
  echo '|---|---|--:|--:|--:|'
  sort -s -k1,2 "$work/found" | awk '
    { key = $1 " " $2 }
    key == last { printf "| `%s` | `%s` | %s / %s | %s | %s / %s |\n", $1, $2, registers, $4, ($5 > shared ? $5 : shared), spilled, $6 }
    { last = key; registers = $4; shared = $5; spilled = $6 }'
} > "$work/page"

if [ "${1:-}" = --check ]; then
  diff "$page" "$work/page" || { echo "kernels.sh: $page is not what the compiler says: run tools/cuda/kernels.sh" >&2; exit 1; }
else
  cp "$work/page" "$page"
fi
echo "kernels.sh: $(($(wc -l < "$work/found") / 2)) kernels compiled for sm_80 and sm_90"
