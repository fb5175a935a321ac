"""Decoding and SimCLR's augmentation with torchvision v2 in a DataLoader.

Variants are the decoders: `tensor` decodes with torchvision.io to uint8 tensors, `pil` with Pillow. There are as many
worker processes as threads, each with one; in the main process alone, images this small are slower on every thread.
"""

import os
import pathlib

import PIL
import PIL.Image
import torch
import torchvision
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from runtime import TorchSide

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def augmentation(plan):
    size, sigma = plan["image_size"], tuple(plan["blur_sigma"])
    kernel = 2 * max(round(size * 0.1) // 2, 1) + 1
    jitter = v2.ColorJitter(*plan["jitter"])
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=tuple(plan["crop_scale"]), antialias=True),
            v2.RandomHorizontalFlip(plan["flip_probability"]),
            v2.RandomApply([jitter], plan["jitter_probability"]),
            v2.RandomGrayscale(plan["grey_probability"]),
            v2.RandomApply([v2.GaussianBlur(kernel, sigma)], plan["blur_probability"]),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(plan["mean"], plan["std"]),
        ]
    )


class Frames(torch.utils.data.Dataset):
    """Two views of each frame, [2, 3, size, size]."""

    def __init__(self, folder, plan, decoder):
        self.paths = sorted(pathlib.Path(folder, "frames").iterdir())
        self.augmentation = augmentation(plan)
        self.decoder = decoder

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        if self.decoder == "pil":
            image = PIL.Image.open(self.paths[index]).convert("RGB")
        else:
            encoded = torch.frombuffer(bytearray(self.paths[index].read_bytes()), dtype=torch.uint8)
            image = decode_jpeg(encoded, mode=ImageReadMode.RGB)
        return torch.stack([self.augmentation(image), self.augmentation(image)])


class Side(TorchSide):
    def __init__(self, plan, arguments):
        super().__init__(arguments.threads)
        self.batches = plan["batches"]
        self.loader = torch.utils.data.DataLoader(
            Frames(arguments.folder, plan, arguments.variant),
            plan["batch"],
            shuffle=True,
            drop_last=True,
            num_workers=arguments.threads,
            persistent_workers=True,
        )
        self.versions |= {"torchvision": torchvision.__version__, "Pillow": PIL.__version__}
        self.description = f"torchvision v2, {arguments.variant}"

    def cpu_seconds(self):
        """With the loader's worker processes, which live until the end."""
        return super().cpu_seconds() + sum(map(process_seconds, children()))

    def repeat(self):
        batches = sum(1 for _ in self.loader)
        if batches != self.batches:
            raise RuntimeError(f"{batches} batches came, {self.batches} were expected")


def children():
    return pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def process_seconds(process):
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
