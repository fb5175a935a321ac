#!/usr/bin/env bash
# docs/forgetting.md out of the words of docs/forgetting/page.md: a line `[STREAM]` becomes that stream's report and picture,
# `[label-free]` what all streams say of the measures without labels.
set -euo pipefail
cd "$(dirname "$0")/../docs"
while IFS= read -r line; do
  if [[ $line == "[label-free]" ]]; then
    python3 ../tools/label_free.py forgetting/{atari-digits-40,atari-digits-20,fashion-split,five-periods,near-duplicates}/results.json
  elif [[ $line =~ ^\[([a-z0-9-]+)\]$ ]]; then
    stream=${BASH_REMATCH[1]}
    if [ -f "forgetting/$stream/report.md" ]; then
      cat "forgetting/$stream/report.md"
      echo "![kNN accuracy on each period over the versions](forgetting/$stream/accuracy.svg)"
    else
      echo "Not measured yet."
    fi
  else
    echo "$line"
  fi
done < forgetting/page.md > forgetting.md.partial
mv forgetting.md.partial forgetting.md
