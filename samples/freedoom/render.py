#!/usr/bin/env python3
"""Renders the demo's frames from the maps of Freedoom: Phase 2, with ViZDoom.

    python3 -m venv /tmp/render && /tmp/render/bin/pip install vizdoom==1.3.2 pillow==13.0.0 numpy==2.4.6
    /tmp/render/bin/python samples/freedoom/render.py            # writes into this file's own folder
    /tmp/render/bin/python samples/freedoom/render.py --out DIR  # writes elsewhere, e.g. to compare

The wad lies inside the vizdoom wheel: nothing else is needed, neither a screen nor a network. Every random choice comes
from a seed made of (period, map, walk), and the game runs one tic per call, so the same versions render the same bytes.
The README.md beside this file states the naming rule and the licence.
"""

import argparse
import os
import pathlib
import random
import shutil
import sys
import tempfile

import numpy as np
import vizdoom
from PIL import Image

# A period: folder name, maps, walks a map, frames a walk. The first is rich, the later ones are narrow and look different
# from it (and from each other): what an encoder unlearns on such a stream is what the demo shows.
PERIODS = [
    ("01-bases", ["MAP01", "MAP03", "MAP04", "MAP05", "MAP07", "MAP08", "MAP09", "MAP11", "MAP13", "MAP15"], 16, 9),
    ("02-inferno", ["MAP21", "MAP25", "MAP27", "MAP30"], 28, 12),
    ("03-ruins", ["MAP16", "MAP17", "MAP31", "MAP32"], 28, 12),
]
WIDTH, HEIGHT, QUALITY = 64, 48, 80
GAMMA = 0.75  # Freedoom is dark: midtones are lifted once, here, not by whoever reads the frames
TICS_APART = 18  # about half a second of play; the least distance of two frames of a walk
MAX_TICS = 9000  # a walk that has not found its frames by then is begun anew with another seed
MIN_LUMA, MIN_CONTRAST = 22.0, 14.0  # of the scaled frame, 0-255: below, it is black or one flat wall
MIN_MEDIAN_DEPTH = 7  # of the depth buffer, 0-255: below, a wall fills the picture
MIN_NOVELTY = 7.0  # mean absolute difference of 16x12 grey thumbnails to every frame kept of the map


def open_map(name, seed):
    """The game on one map: no HUD, weapon, messages or red flashes; every door opens, monsters are scenery."""
    package = pathlib.Path(vizdoom.__file__).parent
    game = vizdoom.DoomGame()
    game.set_doom_game_path(str(package / "freedoom2.wad"))
    game.set_doom_map(name)
    game.set_doom_skill(2)
    game.set_seed(seed)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_depth_buffer_enabled(True)
    game.set_render_hud(False)
    game.set_render_weapon(False)
    game.set_render_crosshair(False)
    game.set_render_messages(False)
    game.set_render_screen_flashes(False)
    game.set_episode_timeout(0)
    game.add_game_args("+con_midtime 0")  # no text in the middle of the picture either
    buttons = [vizdoom.Button.MOVE_FORWARD, vizdoom.Button.TURN_LEFT_RIGHT_DELTA, vizdoom.Button.USE]
    game.set_available_buttons(buttons)
    game.set_available_game_variables([vizdoom.GameVariable.POSITION_X, vizdoom.GameVariable.POSITION_Y])
    game.init()
    for cheat in ("god", "notarget", "give keys"):
        game.send_game_command(cheat)
    return game


class Walker:
    """Walks towards open space: turns away from what the depth buffer shows near, opens doors, turns round when stuck."""

    def __init__(self, rng):
        self.rng, self.turn, self.left_of_turn, self.place = rng, 0.0, 0, (0.0, 0.0)

    def action(self, state, tic):
        if self.left_of_turn > 0:
            self.left_of_turn -= 1
            return [self.turn == 0.0 or abs(self.turn) < 4, self.turn, 0]
        depth = state.depth_buffer[40:75].astype(np.float32)
        left, ahead, right = depth[:, :53].mean(), depth[:, 60:100].mean(), depth[:, 107:].mean()
        x, y = state.game_variables
        stuck = tic % 12 == 0 and abs(x - self.place[0]) + abs(y - self.place[1]) < 24
        if tic % 12 == 0:
            self.place = (x, y)
        if stuck:
            self.turn, self.left_of_turn = self.rng.choice([-9.0, 9.0]), self.rng.randint(6, 18)
            return [0, self.turn, 1]
        if ahead < 9:
            self.turn, self.left_of_turn = (6.0 if right > left else -6.0), self.rng.randint(3, 8)
            return [0, self.turn, 1]
        self.turn, self.left_of_turn = self.rng.uniform(-2.5, 2.5), self.rng.randint(4, 10)
        return [1, self.turn, 0]


def scaled(state):
    """The screen as a 64x48 picture with lifted midtones."""
    picture = Image.fromarray(state.screen_buffer).resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    return picture.point([round(255 * (v / 255) ** GAMMA) for v in range(256)] * 3)


def worth_keeping(picture, depth, kept):
    """Neither black nor flat nor a wall from close by nor seen before on this map. Appends its thumbnail to `kept`."""
    luma = np.asarray(picture.convert("L"), np.float32)
    if luma.mean() < MIN_LUMA or luma.std() < MIN_CONTRAST or np.median(depth) < MIN_MEDIAN_DEPTH:
        return False
    thumbnail = luma.reshape(12, 4, 16, 4).mean((1, 3))
    if kept and np.abs(np.stack(kept) - thumbnail).mean((1, 2)).min() < MIN_NOVELTY:
        return False
    kept.append(thumbnail)
    return True


def walk(name, seed, frames, kept):
    """One walk's pictures in order, or None where the walk left the map or found too little to see."""
    rng, seen, pictures = random.Random(seed), list(kept), []
    game = open_map(name, seed)
    walker, next_look = Walker(rng), rng.randint(1, 700)  # walks begin apart: before the first look they wander off
    for tic in range(MAX_TICS):
        if game.is_episode_finished():
            break
        state = game.get_state()
        if tic >= next_look:
            picture = scaled(state)
            if worth_keeping(picture, state.depth_buffer, seen):
                pictures.append(picture)
                next_look = tic + TICS_APART
        if len(pictures) == frames:
            break
        game.make_action(walker.action(state, tic), 1)
    game.close()
    if len(pictures) < frames:
        return None
    kept[:] = seen
    return pictures


def render_map(folder, name, walks, frames, seed):
    """Writes one map's walks; returns how many bytes. A failed walk is begun anew with the next seed of its own range."""
    folder.mkdir(parents=True)
    kept, size = [], 0
    for number in range(walks):
        for attempt in range(20):
            pictures = walk(name, seed + number * 20 + attempt, frames, kept)
            if pictures:
                break
        else:
            sys.exit(f"{name} walk {number}: no {frames} frames in 20 attempts")
        for index, picture in enumerate(pictures):
            path = folder / f"walk{number:02d}-{index:04d}.jpg"
            picture.save(path, "JPEG", quality=QUALITY, optimize=True)
            size += path.stat().st_size
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent)
    out = parser.parse_args().out.resolve()
    os.chdir(tempfile.mkdtemp())  # the engine leaves its settings in the working directory
    total = 0
    for number, (period, maps, walks, frames) in enumerate(PERIODS, 1):
        shutil.rmtree(out / period, ignore_errors=True)
        size = 0
        for name in maps:
            size += render_map(out / period / name, name, walks, frames, number * 100_000 + int(name[3:]) * 1000)
            print(f"{period}/{name}: {walks} walks of {frames} frames", flush=True)
        print(f"{period}: {len(maps) * walks * frames} frames, {size} bytes", flush=True)
        total += size
    print(f"all: {total} bytes")


if __name__ == "__main__":
    main()
