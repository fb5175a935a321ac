#!/usr/bin/env bash
# Checks deploy/prometheus with promtool: the one on PATH, else Debian's, unpacked into target/tools and not installed,
# else it says that it skips.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
tools=${CARGO_TARGET_DIR:-target}/tools
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)

# Debian's package without installing it: 20 MB, and no service is started.
unpack_debian_package() (
  command -v apt-get > /dev/null && command -v dpkg > /dev/null || return 1
  folder=$(mktemp -d "$tools/.prometheus.XXXX")
  trap 'rm -rf "$folder"' EXIT
  cd "$folder"
  if ! apt-get download -qq prometheus > log 2>&1; then
    apt-get update -qq >> log 2>&1 || true # needs root; without it the old lists may do
    apt-get download -qq prometheus >> log 2>&1 || { tail -1 log; return 1; }
  fi
  dpkg -x prometheus_*.deb "$tools/prometheus"
)

if ! promtool=$(command -v promtool); then
  promtool=$tools/prometheus/usr/bin/promtool
  if [ ! -x "$promtool" ] && ! unpack_debian_package; then
    echo "skipped: promtool is neither on PATH nor to be had through apt-get download prometheus"
    exit 0
  fi
fi
cd "$root/deploy/prometheus"
"$promtool" check config prometheus.yml
"$promtool" test rules alerts_test.yml
