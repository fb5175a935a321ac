#!/usr/bin/env python3
"""Makes a stream whose first period initial weights nearly know: tops, then footwear, of Fashion-MNIST.

    fashion_split.py DIR --fashion FOLDER

Period `01-tops`: t-shirt, pullover, dress, coat and shirt; period `02-footwear`: sandal, sneaker and boot. Of each label 400 pictures to
train on, 200 to test on. Frames are grey, 32 x 32.
"""

import argparse
import pathlib

import fashion
import layout

PERIODS = {"01-tops": ["t-shirt", "pullover", "dress", "coat", "shirt"], "02-footwear": ["sandal", "sneaker", "boot"]}
COUNTS = {"train": 400, "test": 200}
DIGEST = "67c6cf4fb5cf87933680bb0d2d74cbb8ece93f1dd5299d6091618934be0b8e8d"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--fashion", type=pathlib.Path, required=True, help="as fashion.sh prints it")
    arguments = parser.parse_args()

    def write_frames(writer):
        for period, labels in PERIODS.items():
            fashion.write(writer, period, arguments.fashion, labels, COUNTS)

    layout.make(arguments.folder, DIGEST, write_frames)


if __name__ == "__main__":
    main()
