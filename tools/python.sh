#!/usr/bin/env bash
# Prints an interpreter that has exactly the packages of a requirements file: python.sh REQUIREMENTS FOLDER. It is
# $PYTHON if that is set, else the one of a virtual environment in FOLDER, which is made or brought up to date first.
set -euo pipefail
if [ -n "${PYTHON:-}" ]; then
  echo "$PYTHON"
  exit
fi
requirements=$1
environment=$2
if ! cmp -s "$requirements" "$environment/installed.txt"; then
  echo "== installing the Python packages of $requirements into $environment" >&2
  rm -rf "$environment"
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet --requirement "$requirements" >&2
  # Last, so that an installation that was broken off begins anew.
  cp "$requirements" "$environment/installed.txt"
fi
echo "$environment/bin/python"
