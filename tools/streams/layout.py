"""A benchmark stream on disk, `NN-period/{train,test}/LABEL/NAME.png`, and the digest of its bytes.

A stream is written beside its place and moved there when it is whole, so a folder of that name is never half a stream.
"""

import hashlib
import pathlib
import shutil
import sys

from PIL import Image

SIDE = 32


class StreamWriter:
    """Takes frames in any order; `finish` moves them to `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)

    def add(self, period, split, label, name, image):
        """`split` is train or test; `image` a grey Pillow image of any size, which becomes SIDE x SIDE."""
        label_folder = self.partial / period / split / label
        label_folder.mkdir(parents=True, exist_ok=True)
        # Pillow's bilinear filter averages over what it leaves out, in integers: the same on every processor.
        small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        small.save(label_folder / f"{name}.png")

    def finish(self):
        self.partial.rename(self.folder)


def digest(folder):
    """SHA-256 over every file's path and bytes, by path."""
    total = hashlib.sha256()
    for path in sorted(pathlib.Path(folder).rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix()):
        content = path.read_bytes()
        total.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


def make(folder, expected, write_frames):
    """Has `write_frames(writer)` fill the stream unless it is there, then prints its digest and compares it."""
    folder = pathlib.Path(folder)
    if folder.exists():
        print(f"{folder} is there already", file=sys.stderr)
    else:
        writer = StreamWriter(folder)
        write_frames(writer)
        writer.finish()
    found = digest(folder)
    frames = sum(1 for _ in folder.rglob("*.png"))
    print(f"{folder}: {frames} frames, sha256 {found}")
    if found != expected:
        sys.exit(f"{folder} should have the digest {expected}: other versions than requirements.txt's made it")
