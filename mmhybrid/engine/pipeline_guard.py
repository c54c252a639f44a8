"""Data pipelines that name the file in which something is wrong."""
from __future__ import annotations

import logging
import os

from mmengine.logging import print_log

from ..datasets.label_images import label_problem
from .errors import UserError

__all__ = ['guard_image_files']


def guard_image_files() -> None:
    """Make data pipelines name the file when one cannot be read.

    Decoders fail in their own ways (an assertion, ``UnidentifiedImageError`` without a path, an
    OpenCV error), also inside worker processes.
    """
    from mmengine.dataset import Compose
    if getattr(Compose.__call__, 'guarded', False):
        return

    def call(self, data):
        for transform in self.transforms:
            before = data
            try:
                data = transform(data)
            except UserError:
                raise
            except Exception as error:
                if not type(transform).__name__.startswith('Load'):
                    raise
                raise UserError(_unreadable(before, error)) from error
            if data is None:
                return None
            if type(transform).__name__ == 'LoadAnnotations':
                _check_sizes(data)
        return data

    call.guarded = True
    Compose.__call__ = call


_told = set()


def _check_sizes(sample: dict) -> None:
    """Annotations belong to an image of their size; mmdet and mmseg go on with any other."""
    shape, path = tuple(sample.get('ori_shape') or ()), sample.get('img_path')
    labels = sample.get('gt_seg_map')
    if labels is not None and sample.get('seg_map_path') and shape:
        problem = label_problem(labels, shape, sample['seg_map_path'])
        if problem:
            raise UserError(f'{problem}.')
    stated = (sample.get('height'), sample.get('width'))
    if shape and None not in stated and shape != stated and 'size' not in _told:
        _told.add('size')
        turned = ' as it is read (EXIF orientation counts)' if shape == stated[::-1] else ''
        print_log(f'{path} is {shape[1]} x {shape[0]}{turned}, but the annotation file says '
                  f'{stated[1]} x {stated[0]}. Its boxes and masks are taken as they are; look '
                  'whether they fit, with tools/visualize.py for example. Further images like '
                  'this are not reported.', logger='current', level=logging.WARNING)


def _unreadable(sample: dict, error: Exception) -> str:
    paths = [sample[key] for key in ('img_path', 'seg_map_path') if sample.get(key)]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        return (f'{missing[0]} does not exist, but the data set lists it. Fetch the missing file, '
                'or remove it from the annotations.')
    bad = next((path for path in paths if not _decodes(path)), None)
    if bad is None and 'reduce_zero_label' in str(error):
        return f'reduce_zero_label of the data set and of its pipeline differ. {error}.'
    if bad is None:
        return (f'The annotations of {paths[0] if paths else "an image"} could not be loaded: '
                f'{type(error).__name__}: {error}. Correct or remove this entry.')
    return (f'{bad} cannot be decoded ({os.path.getsize(bad)} bytes; {type(error).__name__}). The '
            'file is damaged or no image. Fetch it again, or remove it from the data set.')


def _decodes(path: str) -> bool:
    from PIL import Image
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:
        return False
    return True
