"""Images in one folder per class."""
from __future__ import annotations

import os
import os.path as osp
from collections.abc import Mapping, Sequence

from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from mmhybrid.errors import UserError
from mmhybrid.registry import DATASETS

__all__ = ['ImageFolder']

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
