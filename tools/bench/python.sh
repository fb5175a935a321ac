#!/usr/bin/env bash
# Prints the interpreter of the benchmark's peers: $PYTHON if it is set, else one in the folder $1 with exactly
# benches/peers/requirements.txt, which is made or brought up to date first.
set -euo pipefail
if [ -n "${PYTHON:-}" ]; then
  echo "$PYTHON"
  exit
fi
environment=$1
requirements=$(cd "$(dirname "$0")/../.." && pwd)/benches/peers/requirements.txt
if ! cmp -s "$requirements" "$environment/installed.txt"; then
  echo "== installing the peers' Python packages into $environment" >&2
  rm -rf "$environment"
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet --requirement "$requirements" >&2
  # Last, so that an installation that was broken off begins anew.
  cp "$requirements" "$environment/installed.txt"
fi
echo "$environment/bin/python"
