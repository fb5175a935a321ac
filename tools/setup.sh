#!/usr/bin/env bash
# What cargo doesn't bring: librdkafka needs a C compiler, make, pkg-config and OpenSSL's headers. Quiet where all is there.
set -euo pipefail
packages=()
command -v cc > /dev/null || packages+=(gcc libc6-dev)
command -v c++ > /dev/null || packages+=(g++)
command -v make > /dev/null || packages+=(make)
command -v pkg-config > /dev/null || packages+=(pkg-config)
if ! command -v pkg-config > /dev/null || ! pkg-config --exists openssl; then packages+=(libssl-dev); fi

if [ ${#packages[@]} -gt 0 ]; then
  install="apt-get install -y --no-install-recommends ${packages[*]}"
  if ! command -v apt-get > /dev/null; then
    echo "setup: missing: ${packages[*]} (Debian's names). Install them and run this again." >&2
    exit 1
  elif [ "$(id -u)" -ne 0 ]; then
    echo "setup: missing: ${packages[*]}. Run: sudo $install" >&2
    exit 1
  fi
  echo "setup: installing ${packages[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $install -qq > /dev/null
fi

if ! command -v "${CARGO:-cargo}" > /dev/null; then
  echo "setup: missing: cargo. Install Rust (the version is rust-version in Cargo.toml) from https://rustup.rs" >&2
  exit 1
fi
