#!/usr/bin/env bash
# Runs the forgetting benchmark on every stream and puts docs/forgetting.md together: forgetting.sh TARGET [OPTION ...]. What is done
# already is not done again (results lie in docs/forgetting/STREAM, trained versions in TARGET/forgetting); the options go to
# every `palimpsest bench`. JOBS runs at a time, one a core if it is not set.
set -euo pipefail
target=$1
shift
cd "$(dirname "$0")/.."
jobs=${JOBS:-$(nproc)}

bench() { # STREAM SEEDS METHODS
  "$target/release/palimpsest" bench --config config/forgetting.toml --stream "$target/streams/$1" --seeds "$2" --methods "$3" \
    --jobs "$jobs" --out "docs/forgetting/$1" --work "$target/forgetting" "${options[@]}"
}

options=("$@")
baselines=finetune,finetune:lr=1e-3
bench atari-digits-40 5 "random,$baselines,lwf:lambda=1,lwf,lwf:lambda=16,lwf:lr=1e-3,cassle,cosine,replay,joint"
bench atari-digits-20 5 "random,$baselines,lwf,lwf:lr=1e-3,cassle"
bench fashion-split 3 "random,$baselines,lwf,lwf:lr=1e-3,cassle"
bench five-periods 3 "$baselines,lwf,cassle,replay"
tools/forgetting_page.sh
