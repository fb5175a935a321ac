#!/usr/bin/env python3
"""Makes a stream full of near-duplicates, as frames of a video are: walks of neighbouring frames, `near_duplicates.py DIR`.

Periods `01-atari` (games 0-19) and `02-atari` (games 20-39): a label a game, 200 frames to train on from ten walks of twenty
frames each, 5 emulator frames apart (a twelfth of a second) at one place of the screen, and 100 to test on as in atari_digits.py.
Frames are grey, 32 x 32. A frame's name tells its walk and its time in milliseconds, `walk03@583.png`.
"""

import argparse
import pathlib

import atari
import layout

SEED = 7
WALKS = 10
# Rollouts that are tested on, with numbers that no walk has: the number is part of what is drawn by.
TESTED = range(10, 12)
DIGEST = "0aa317c45c4ca1478f0a64490dd296f69b7b7bee4d584a7c56445b5c57962ffa"


def write_games(writer, period, games):
    for game in games:
        for number in range(WALKS):
            for time, image in atari.walk(game, number, SEED):
                writer.add(period, "train", game, f"walk{number:02}@{time}", image)
        for number in TESTED:
            for place, image in enumerate(atari.rollout(game, number, SEED)):
                writer.add(period, "test", game, f"rollout{number:02}-{place:04}", image)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()

    def write_frames(writer):
        write_games(writer, "01-atari", atari.GAMES[:20])
        write_games(writer, "02-atari", atari.GAMES[20:40])

    layout.make(arguments.folder, DIGEST, write_frames)


if __name__ == "__main__":
    main()
