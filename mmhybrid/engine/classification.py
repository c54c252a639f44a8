"""Images in one folder per class: data, transforms, optimizer and accuracy, with mmengine alone."""
from __future__ import annotations

import math
import os
import os.path as osp
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from PIL import Image
from torch.utils.data import Sampler

from ..errors import UserError
from ..registry import DATA_SAMPLERS, DATASETS, METRICS, OPTIMIZERS, TRANSFORMS

__all__ = ['ImageFolder', 'LoadPicture', 'RepeatedAugmentSampler', 'TimmTransform', 'TopAccuracy',
           'lamb']

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.tif', '.tiff')


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """ImageNet's layout: ``data_root/train/<class>/*.jpg``, ``data_root/val/<class>/*.jpg``.

    Samples have ``img_path`` and ``labels``, the index of the class.

    Args:
        data_root: folder of the whole set.
        data_prefix: ``dict(img_path='train')`` or the like: folder of the split below it.
        metainfo: ``dict(classes=(...))`` gives the folders their order and leaves others out; by
            default they are all folders, sorted by name.
        pipeline: transforms of each sample.
        test_mode: as for mmengine's data sets.
        indices: only these samples, or so many of the first.

    Raises:
        UserError: if there are no folders or a class has no images.
    """

    def __init__(self, data_root: str, data_prefix: Mapping[str, str],
                 metainfo: Mapping | None = None, pipeline: Sequence = (), test_mode: bool = False,
                 indices: int | Sequence[int] | None = None):
        super().__init__(data_root=data_root, data_prefix=dict(data_prefix), metainfo=metainfo,
                         pipeline=list(pipeline), test_mode=test_mode, indices=indices)

    @staticmethod
    def read_classes(folder: str) -> tuple[str, ...]:
        """Names of the folders in the folder of a split, sorted."""
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries
                           if entry.is_dir() and not entry.name.startswith('.'))
        if not names:
            raise UserError(f'{folder} has no folders in it. Expected one per class, with its '
                            f'images: {osp.join(folder, "<class>", "<name>.jpg")}')
        return tuple(names)

    def load_data_list(self) -> list[dict]:
        """List the images of all classes."""
        folder = self.data_prefix['img_path']
        if self._metainfo.get('classes') is None:
            self._metainfo['classes'] = self.read_classes(folder)
        samples, left_out = [], []
        for label, name in enumerate(self._metainfo['classes']):
            inside = osp.join(folder, name)
            there = sorted(os.listdir(inside)) if osp.isdir(inside) else []
            files = [file for file in there if file.lower().endswith(EXTENSIONS)]
            left_out += [osp.join(inside, file) for file in sorted(set(there) - set(files))]
            if not files:
                raise UserError(f'{inside}/ has no images ({" ".join(EXTENSIONS)}), but it is one '
                                f'of the {len(self._metainfo["classes"])} classes.')
            samples += [dict(img_path=osp.join(inside, file), labels=label) for file in files]
        text = f'{len(samples)} images of {folder} in {label + 1} classes are used; '
        text += (f'{len(left_out)} files or folders are left out, since their names end with none '
                 f'of {" ".join(EXTENSIONS)} (for example {left_out[0]}).' if left_out
                 else 'none is left out.')
        print_log(text, logger='current')
        return samples


@TRANSFORMS.register_module()
class LoadPicture:
    """Reads ``img_path`` with Pillow into ``img``, in RGB."""

    def __call__(self, results: dict) -> dict:
        """Add the picture."""
        with Image.open(results['img_path']) as file:
            return {**results, 'img': file.convert('RGB')}


@TRANSFORMS.register_module()
class TimmTransform:
    """What ``timm.data.create_transform`` builds: ``img`` (PIL) to the tensor ``inputs``.

    Args:
        input_size: side of the result in pixels.
        is_training: random crop, flip and what the other settings say; else resize and crop.
        auto_augment: for example 'rand-m9-mstd0.5'.
        interpolation: 'bicubic', 'bilinear' or 'random'.
        re_prob: probability of random erasing.
        re_mode: 'const', 'rand' or 'pixel'.
        crop_pct: side of the test crop over the short side of the resized picture.
        crop_mode: 'center'; 'squash' resizes to a square before the test crop; 'border' adds a
            border where the resized picture is smaller than the crop.
        scale: range of the random crop's share of the picture's area.

    The result (3, input_size, input_size) is float32, with ImageNet's mean and spread removed.
    """

    def __init__(self, input_size: int = 224, is_training: bool = False,
                 auto_augment: str | None = None, interpolation: str = 'bicubic',
                 re_prob: float = 0.0, re_mode: str = 'pixel', crop_pct: float = 0.875,
                 scale: Sequence[float] = (0.08, 1.0), crop_mode: str = 'center'):
        try:
            from timm.data import create_transform
        except ImportError as error:
            raise UserError('The transforms of classification come from timm, which cannot be '
                            f'imported ({error}). Run: pip install timm') from error
        if crop_mode not in ('center', 'squash', 'border'):
            raise ValueError(f"got crop_mode={crop_mode!r}, expected 'center', 'squash' or "
                             "'border'")
        self.transform = create_transform(
            input_size, is_training=is_training, auto_augment=auto_augment,
            interpolation=interpolation, re_prob=re_prob, re_mode=re_mode, crop_pct=crop_pct,
            crop_mode=crop_mode, scale=tuple(scale))

    def __call__(self, results: dict) -> dict:
        """Replace the picture by the tensor."""
        results = dict(results)
        results['inputs'] = self.transform(results.pop('img'))
        return {key: results[key] for key in ('inputs', 'labels', 'img_path')}


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


@OPTIMIZERS.register_module(name='Lamb')
def lamb(params, lr: float, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-6,
         weight_decay: float = 0.01, max_grad_norm: float | None = 1.0) -> torch.optim.Optimizer:
    """LAMB of timm.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of gradients and their squares.
        eps: added to the root of the latter.
        weight_decay: share of the weights that is added to the update.
        max_grad_norm: norm to which gradients of all parameters are cut together; None for none.
    """
    try:
        from timm.optim import Lamb
    except ImportError as error:
        raise UserError(f'The optimizer LAMB comes from timm, which cannot be imported ({error}). '
                        'Run: pip install timm') from error
    return Lamb(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay,
                max_grad_norm=max_grad_norm)


@METRICS.register_module()
class TopAccuracy(BaseMetric):
    """Share of images, in percent, whose class is among the ``k`` with the largest scores.

    Args:
        topk: values of k; those above the number of classes are left out.
        collect_device: where several processes bring their results together, "cpu" or "gpu".
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1, 5), collect_device: str = 'cpu'):
        super().__init__(collect_device=collect_device)
        if not topk or any(not isinstance(k, int) or k < 1 for k in topk):
            raise ValueError(f'got topk={topk!r}, expected positive integers such as (1, 5)')
        self.topk = tuple(topk)

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Count how many other classes score at least as high (or nan) as the right one."""
        for sample in data_samples:
            scores, right = sample['scores'], sample['gt_label']
            ahead = int((~(scores < scores[right])).sum()) - 1
            self.results.append((ahead, len(scores)))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Give ``top1``, ``top5``, ..."""
        ahead, classes = np.asarray(results).T
        return {f'top{k}': round(100 * float(np.mean(ahead < k)), 3)
                for k in self.topk if k <= classes[0]}
