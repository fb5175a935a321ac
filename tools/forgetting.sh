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
common=random,finetune,finetune:lr=1e-3,lwf,lwf:share=0,cassle
bench atari-digits-40 5 "$common,lwf:share=0:lambda=1,cosine,replay,joint,lwf:share=0:lambda=16,lwf:lr=1e-3,finetune:share=0.5,lwf:share=0.3,cassle:share=0"
bench atari-digits-20 5 "$common,lwf:lr=1e-3"
bench fashion-split 3 "$common,lwf:lr=1e-3"
bench five-periods 3 "finetune,finetune:lr=1e-3,lwf,lwf:share=0,cassle,replay,lwf:share=0.3,cassle:share=0"
bench near-duplicates 3 "finetune,finetune:spacing=0:distance=0,finetune:spacing=0,finetune:distance=0"
tools/forgetting_page.sh
