"""Records and replays without a GPU: a replay computes again what was recorded, in the same places.

As on a GPU, inputs and outputs keep their addresses and are overwritten by the next replay, and a
replay draws from the generator as it stands then.
"""
import random

import numpy as np
import torch


class Generator:
    """PyTorch's generator of the CPU, with what a generator of a GPU has besides."""

    def get_offset(self):
        return torch.get_rng_state()

    def set_offset(self, offset):
        torch.set_rng_state(offset)


class Recorder:
    """As :class:`mmhybrid.engine.graphs.CudaRecorder`, with a count of what it did."""

    def __init__(self):
        self.pools = self.warm_ups = self.records = self.replays = 0

    def takes(self, x):
        return True

    def generators(self, device):
        return [Generator()]

    def host_state(self):
        return repr((random.getstate(), np.random.get_state()))

    def new_pool(self):
        self.pools += 1

    def warm_up(self, run):
        self.warm_ups += 1
        run()

    def record(self, run):
        self.records += 1
        run()

        def replay():
            self.replays += 1
            run()

        return replay
