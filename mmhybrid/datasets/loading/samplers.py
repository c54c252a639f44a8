"""The order in which images come."""
from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from mmhybrid.registry import DATA_SAMPLERS

__all__ = ['RepeatedAugmentSampler']


@DATA_SAMPLERS.register_module()
class RepeatedAugmentSampler(Sampler):
    """Each image several times in a row, spread over the processes, as DeiT's trainings have it.

    An epoch has as many samples as without repeats, so it sees a part of the images.

    Args:
        dataset: what is sampled.
        seed: of the order; None for one that all processes agree on.
        repeats: how often an image comes.
    """

    def __init__(self, dataset, seed: int | None = None, repeats: int = 3):
        if not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f'got repeats={repeats!r}, expected a positive integer such as 3')
        self.dataset = dataset
        self.seed = sync_random_seed() if seed is None else seed
        self.repeats = repeats
        self.rank, self.world_size = get_dist_info()
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)
        order = order.repeat_interleave(self.repeats)
        # padded from its start, so that all processes have the same number
        order = torch.cat([order, order[:self.world_size]])
        return iter(order[self.rank::self.world_size][:len(self)].tolist())

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch
