"""Frames of Atari games played at random, with ale-py, whose wheel holds the ROMs.

A frame is a grey square cut out of the screen at a random place: whole screens are told apart without learning, by
their frame and score alone. Every random choice comes from (seed, game, rollout).
"""

import ale_py
import ale_py.roms
import numpy
from PIL import Image

# The first 40 of ale-py's games by name that run. `combat` (as `joust` and `maze_craze` after these) is for two players
# and ends the process. A list, because another version of ale-py has other games.
GAMES = """
    adventure air_raid alien amidar assault asterix asteroids atlantis atlantis2 backgammon
    bank_heist basic_math battle_zone beam_rider berzerk blackjack bowling boxing breakout carnival
    casino centipede chopper_command crazy_climber crossbow darkchambers defender demon_attack donkey_kong double_dunk
    earthworld elevator_action enduro entombed et fishing_derby flag_capture freeway frogger frostbite
""".split()

FRAMES_A_ROLLOUT = 50
# A new action every so many emulator frames, and a frame is kept after every third action: 15 apart.
FRAMES_AN_ACTION = 5
ACTIONS_A_FRAME = 3
CROP = 80
FRAMES_A_WALK = 20
# Actions before its first frame, at least and below: walks of a game begin at different places in it.
BEFORE_A_WALK = (20, 120)
FRAMES_A_SECOND = 60


def rollout(game, number, seed):
    """Yields FRAMES_A_ROLLOUT grey Pillow images of CROP x CROP."""
    rng = numpy.random.default_rng([seed, GAMES.index(game), number])
    emulator = start(game, int(rng.integers(1 << 31)))
    actions = emulator.getMinimalActionSet()
    for _ in range(FRAMES_A_ROLLOUT):
        for _ in range(ACTIONS_A_FRAME):
            act(emulator, actions[rng.integers(len(actions))])
        screen = emulator.getScreenGrayscale()
        top, left = (int(rng.integers(length - CROP + 1)) for length in screen.shape)
        yield Image.fromarray(screen[top : top + CROP, left : left + CROP])


def walk(game, number, seed):
    """Yields FRAMES_A_WALK times in milliseconds and images that follow each other closely, all cut out at one place."""
    rng = numpy.random.default_rng([seed, GAMES.index(game), number])
    emulator = start(game, int(rng.integers(1 << 31)))
    actions = emulator.getMinimalActionSet()
    for _ in range(rng.integers(*BEFORE_A_WALK)):
        act(emulator, actions[rng.integers(len(actions))])
    top, left = (int(rng.integers(length - CROP + 1)) for length in emulator.getScreenGrayscale().shape)
    for place in range(FRAMES_A_WALK):
        act(emulator, actions[rng.integers(len(actions))])
        screen = emulator.getScreenGrayscale()
        yield place * FRAMES_AN_ACTION * 1000 // FRAMES_A_SECOND, Image.fromarray(screen[top : top + CROP, left : left + CROP])


def start(game, seed):
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.setInt("random_seed", seed)
    # The policy is random already: actions need not stick.
    emulator.setFloat("repeat_action_probability", 0.0)
    emulator.loadROM(ale_py.roms.get_rom_path(game))
    return emulator


def act(emulator, action):
    for _ in range(FRAMES_AN_ACTION):
        if emulator.game_over():
            emulator.reset_game()
        emulator.act(action)
