#!/usr/bin/env bash
# Runs one step of `make test` under a headline and tells its time: step.sh "headline" command...
set -uo pipefail
name=$1
shift
echo "== $name"
start=$SECONDS
"$@"
code=$?
if [ $code -eq 0 ]; then
  echo "== $name: done in $((SECONDS - start)) s"
else
  echo "== $name: FAILED with exit code $code after $((SECONDS - start)) s" >&2
fi
exit $code
