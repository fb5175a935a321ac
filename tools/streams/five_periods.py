#!/usr/bin/env python3
"""Makes a stream of five periods that look different: games, digits, clothes, a shooter's maps, other games.

    five_periods.py DIR --fashion FOLDER

`01-atari`: Atari games 0-19, as in atari_digits.py; `02-digits` as there; `03-fashion`: Fashion-MNIST's ten kinds of clothes, 100 to
train on and 70 to test on of each; `04-freedoom`: the demo's frames, 18 maps, every fourth walk tested on; `05-atari`: games 20-39.
Frames are grey, 32 x 32.
"""

import argparse
import pathlib

import atari
import atari_digits
import fashion
import freedoom
import layout

FASHION = {"train": 100, "test": 70}
DIGEST = "af3b2a872cafc36e39eab0171c98f063445cff58330a73fc89ae931d481cdca3"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--fashion", type=pathlib.Path, required=True, help="as fashion.sh prints it")
    arguments = parser.parse_args()

    def write_frames(writer):
        atari_digits.write_games(writer, "01-atari", atari.GAMES[:20])
        atari_digits.write_digits(writer, "02-digits")
        fashion.write(writer, "03-fashion", arguments.fashion, fashion.LABELS, FASHION)
        freedoom.write(writer, "04-freedoom")
        atari_digits.write_games(writer, "05-atari", atari.GAMES[20:40])

    layout.make(arguments.folder, DIGEST, write_frames)


if __name__ == "__main__":
    main()
