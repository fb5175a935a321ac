"""PyTorch's settings and the measure of CPU seconds that every side shares."""

import time

import torch


class TorchSide:
    """What a side has that runs in this process alone. `check` is compared with our side's numbers."""

    check = []

    def __init__(self, threads):
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        # Denormal gradients of a converged model would slow PyTorch down for no use.
        torch.set_flush_denormal(True)
        self.versions = {"torch": torch.__version__}

    @staticmethod
    def cpu_seconds():
        return time.process_time()


def channels_last(module_or_tensor):
    return module_or_tensor.to(memory_format=torch.channels_last)
