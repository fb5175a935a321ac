"""scikit-learn's handwritten digits, 1,797 pictures of 8 x 8 (UCI, CC BY 4.0), as grey images."""

import numpy
from PIL import Image
from sklearn.datasets import load_digits

# Of a pixel, 0 to it.
BRIGHTEST = 16


def images_of(digit, seed):
    """(number in scikit-learn's set, Pillow image) of each picture of `digit`, in a random order."""
    digits = load_digits()
    numbers = numpy.flatnonzero(digits.target == digit)
    for number in numpy.random.default_rng([seed, digit]).permutation(numbers):
        pixels = (digits.images[number] * 255 / BRIGHTEST).astype(numpy.uint8)
        yield int(number), Image.fromarray(pixels)
