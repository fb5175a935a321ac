"""The demo's frames, rendered from maps of Freedoom: Phase 2 (BSD-3-Clause), as grey squares: a label a map."""

import pathlib

from PIL import Image

SAMPLES = pathlib.Path(__file__).resolve().parents[2] / "samples" / "freedoom"


def write(writer, period):
    """Every fourth walk of a map is tested on. A frame, 64 x 48, loses its left and right margin."""
    for folder in sorted(SAMPLES.glob("[0-9][0-9]-*/MAP[0-9][0-9]")):
        for path in sorted(folder.glob("*.jpg")):
            walk = int(path.name[len("walk") :][:2])
            split = "test" if walk % 4 == 3 else "train"
            image = Image.open(path).convert("L")
            left = (image.width - image.height) // 2
            writer.add(period, split, folder.name, path.stem, image.crop((left, 0, left + image.height, image.height)))
