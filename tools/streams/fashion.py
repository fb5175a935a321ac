"""Fashion-MNIST (Zalando, MIT), 28 x 28 grey pictures of ten kinds of clothes, out of Debian's dataset-fashion-mnist."""

import gzip
import pathlib

import numpy
from PIL import Image

LABELS = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
# The two halves of the published set.
FILES = {"train": "train", "test": "t10k"}


def images_of(folder, split, label):
    """(number in the half, Pillow image) of each picture of one kind, in the set's order."""
    pictures = read(folder, split, "images-idx3-ubyte", 16).reshape(-1, 28, 28)
    labels = read(folder, split, "labels-idx1-ubyte", 8)
    for number in numpy.flatnonzero(labels == LABELS.index(label)):
        yield int(number), Image.fromarray(pictures[number])


def read(folder, split, name, header):
    """The bytes behind an IDX file's header."""
    path = pathlib.Path(folder) / f"{FILES[split]}-{name}.gz"
    with gzip.open(path) as file:
        return numpy.frombuffer(file.read(), numpy.uint8, offset=header)


def write(writer, period, folder, labels, counts):
    """`counts`: pictures of each label, by half."""
    for label in labels:
        for split, count in counts.items():
            for _, (number, image) in zip(range(count), images_of(folder, split, label)):
                writer.add(period, split, label, f"picture{number:05}-0000", image)
