#!/usr/bin/env python3
"""How hard the demo's labels are without any learning: kNN on raw pixels, walks held out.

    python3 -m venv /tmp/render && /tmp/render/bin/pip install pillow==13.0.0 numpy==2.4.6 scikit-learn==1.9.1
    /tmp/render/bin/python samples/freedoom/check.py

Pictures become 16x16 RGB vectors; every fourth walk of a map is a query, the others are the bank; k = 20 and k = 1, cosine.
A label's share of the queries is the chance level. The README.md beside this file quotes the output.
"""

import pathlib

import numpy as np
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier


def read(period):
    """(vectors, labels, walk numbers) of one period's frames."""
    vectors, labels, walks = [], [], []
    for path in sorted(period.glob("*/*.jpg")):
        vectors.append(np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BOX), np.float32).ravel())
        labels.append(path.parent.name)
        walks.append(int(path.name[4:6]))
    vectors = np.stack(vectors) / 255.0
    return vectors - vectors.mean(0), np.array(labels), np.array(walks)


def main():
    print("| period | maps | walks | frames | bytes | chance | kNN k=20 | kNN k=1 |\n|---|---|---|---|---|---|---|---|")
    for period in sorted(p for p in pathlib.Path(__file__).resolve().parent.glob("[0-9][0-9]-*") if p.is_dir()):
        x, y, walk = read(period)
        query = walk % 4 == 3
        score = {
            k: KNeighborsClassifier(k, metric="cosine").fit(x[~query], y[~query]).score(x[query], y[query]) for k in (20, 1)
        }
        maps = sorted(set(y))
        size = sum(p.stat().st_size for p in period.glob("*/*.jpg"))
        walks = len(set(zip(y, walk)))
        print(
            f"| `{period.name}` | {', '.join(maps)} | {walks} | {len(y)} | {size:,} | {1 / len(maps):.1%} "
            f"| {score[20]:.1%} | {score[1]:.1%} |"
        )


if __name__ == "__main__":
    main()
