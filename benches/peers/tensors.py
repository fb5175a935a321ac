"""Reads safetensors files: eight bytes of length, a JSON header, then the tensors' bytes."""

import json
import pathlib

import numpy

TYPES = {"F32": numpy.float32, "I64": numpy.int64}


def load(path):
    """Every tensor of the file by its name, as NumPy arrays."""
    content = pathlib.Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    arrays = {}
    for name, entry in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        flat = numpy.frombuffer(content[start + begin : start + end], dtype=TYPES[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"]).copy()
    return arrays
