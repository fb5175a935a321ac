#!/usr/bin/env python3
"""Makes a stream on which an encoder forgets: a rich first period, Atari games, and a narrow second one, digits.

    atari_digits.py DIR              # games 0-39
    atari_digits.py DIR --games 20   # games 0-19

Period `01-atari`: a label a game, 200 frames to train on from four rollouts and 100 to test on from two others.
Period `02-digits`: a label a digit, 100 to train on and 70 to test on (all that are left, where there are fewer).
Frames are grey, 32 x 32. A rollout's frames are named after it, `rollout04-0017.png`, in the order of play.
"""

import argparse
import pathlib

import atari
import digits
import layout

SEED = 1
ROLLOUTS = {"train": range(0, 4), "test": range(4, 6)}
DIGITS = {"train": 100, "test": 70}
# Of the whole stream, by the number of games.
DIGESTS = {
    40: "99ba5a9e617e06b647bd1e4aae74885837689e69d3bf4bd27b065f78bc03e81a",
    20: "27968460245228d86045fbc85eea204e67165c1544e7a92c5877dd5972222219",
}


def write_games(writer, period, games):
    for game in games:
        for split, rollouts in ROLLOUTS.items():
            for number in rollouts:
                for place, image in enumerate(atari.rollout(game, number, SEED)):
                    writer.add(period, split, game, f"rollout{number:02}-{place:04}", image)


def write_digits(writer, period):
    for digit in range(10):
        images = digits.images_of(digit, SEED)
        for split, count in DIGITS.items():
            # `zip` stops at the shorter one: not every digit has as many.
            for _, (number, image) in zip(range(count), images):
                writer.add(period, split, str(digit), f"digit{number:04}-0000", image)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--games", type=int, choices=sorted(DIGESTS), default=40)
    arguments = parser.parse_args()

    def write_frames(writer):
        write_games(writer, "01-atari", atari.GAMES[: arguments.games])
        write_digits(writer, "02-digits")

    layout.make(arguments.folder, DIGESTS[arguments.games], write_frames)


if __name__ == "__main__":
    main()
