#!/usr/bin/env bash
# Prints a folder with Fashion-MNIST's files (MIT, 70,000 pictures of 28 x 28): fashion.sh FOLDER. It is where Debian's package
# dataset-fashion-mnist is installed, else FOLDER, into which the package is downloaded and unpacked; that needs no root.
set -euo pipefail
installed=/usr/share/datasets/fashion-mnist
if [ -d "$installed" ]; then
  echo "$installed"
  exit
fi
folder=$1
unpacked=$folder$installed
if [ ! -d "$unpacked" ]; then
  echo "== downloading dataset-fashion-mnist into $folder" >&2
  mkdir -p "$(dirname "$folder")"
  partial=$(mktemp -d -p "$(dirname "$folder")")
  trap 'rm -rf "$partial"' EXIT
  (cd "$partial" && apt-get download dataset-fashion-mnist >&2) ||
    { echo "fashion.sh: install it: sudo apt-get install dataset-fashion-mnist" >&2; exit 1; }
  dpkg-deb -x "$partial"/dataset-fashion-mnist_*.deb "$partial/unpacked"
  # In one step, so that an interrupted download begins anew.
  rm -rf "$folder"
  mv "$partial/unpacked" "$folder"
fi
echo "$unpacked"
