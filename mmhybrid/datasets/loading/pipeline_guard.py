"""Data pipelines that name the image and the transform in which something goes wrong.

Decoders and transforms fail in their own ways (an assertion, ``UnidentifiedImageError`` without a
path, an OpenCV error), also inside worker processes, and some not at all: a pipe in place of an
image is waited for, a label without a class is left out of the loss or the score.
"""
from __future__ import annotations

import errno
import functools
import logging
import os
import os.path as osp
import re
import stat
import struct
import warnings
from dataclasses import dataclass

from mmengine.dataset import Compose
from mmengine.logging import print_log
from PIL import Image

from mmhybrid.compat import Patch, apply
from mmhybrid.errors import UserError

from ..label_images import UNREADABLE, label_problem, read_labels
from ..packed import find_database

__all__ = ['expect_labels', 'guard_image_files']

# The machine's limits, which `explain` has sentences for; no image is to blame.
NOT_THE_IMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
LARGEST = 2**31  # bytes of a file; decoders count in 32 bits
MANY = 2 * 89_478_485  # pixels from where Pillow refuses; OpenCV takes six times as many
EMPTY = 100  # pixels per byte; even a blank photograph has fewer as a JPEG
EIGHT_BITS = ('1', 'L', 'P')


@dataclass
class _Labels:
    classes: int
    in_files: int
    ignored: int


_expected: dict[str, _Labels] = {}
_told = set()


def expect_labels(folder: str, classes: int, in_files: int, ignored: int) -> None:
    """Have every label image from a folder compared with the classes when it is loaded.

    Args:
        folder: as it stands before the name in ``seg_map_path``.
        classes: how many the model knows.
        in_files: how many the files know; the data set may choose some.
        ignored: the label that means "ignore".
    """
    folder = osp.join(folder, '')
    known = _expected.get(folder)
    if known is None or known.classes <= classes:  # two data sets: the wider one holds for both
        _expected[folder] = _Labels(classes, in_files, ignored)


def guard_image_files() -> None:
    """Make data pipelines name the file and the transform when something goes wrong.

    All transforms of mmcv, mmdet and mmseg are called in one place, whichever wrapper holds them
    (mixes of images, test-time augmentation, random choices); other callables in mmengine's
    Compose. Forked workers inherit this.
    """
    apply(PATCH)


def _is_guarded() -> bool:
    return getattr(Compose.__call__, 'guarded', False)


def _guard() -> None:
    try:
        from mmcv.transforms import BaseTransform
    except ImportError:  # a classifier does without
        BaseTransform = None
    if _is_guarded():
        return

    def compose(self, data):
        for transform in self.transforms:
            whole = getattr(type(transform).__call__, 'guarded', False)
            data = transform(data) if whole else _apply(transform, transform, data)
            if data is None:
                return None
        return data

    compose.guarded = True
    Compose.__call__ = compose
    warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
    if BaseTransform is not None:
        plain = BaseTransform.__call__

        @functools.wraps(plain)
        def call(self, results):
            return _apply(self, functools.partial(plain, self), results)

        call.guarded = True
        BaseTransform.__call__ = call


PATCH = Patch(
    'image-files',
    'A pipeline that fails on a file or a label names neither; in our commands it does.',
    ('mmengine.dataset.Compose.__call__', 'mmcv.transforms.BaseTransform.__call__',
     "Pillow's DecompressionBombWarning (silent)"), _guard, _is_guarded)


def _apply(transform, call, sample):
    loads = type(transform).__name__.startswith('Load') and isinstance(sample, dict)
    if loads:
        _check_file(sample.get('seg_map_path' if 'img' in sample else 'img_path'))
    try:
        result = call(sample)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NOT_THE_IMAGE:
            raise
        tell = _unreadable if loads else _failed
        raise UserError(tell(transform, sample, error)) from error
    if isinstance(result, dict) and type(transform).__name__ == 'LoadAnnotations':
        _check_sizes(result)
        _check_labels(result)
    if isinstance(result, dict) and 'mix_results' in result and 'gt_masks' in result:
        _check_masks(transform, result)
    return result


def _is_local(path) -> bool:
    """Whether a path is a file of this machine; an image in a database need not be one."""
    return isinstance(path, (str, os.PathLike)) and '://' not in str(path) and (
        osp.lexists(path) or find_database(os.fspath(path)) is None)


def _check_file(path) -> None:
    """Refuse what would block or fill the memory if it were read."""
    if not _is_local(path):
        return
    try:
        status = os.stat(path)
    except OSError:
        return  # reading it says why
    if not stat.S_ISREG(status.st_mode):
        kind = {stat.S_IFIFO: 'a pipe', stat.S_IFSOCK: 'a socket', stat.S_IFDIR: 'a folder',
                stat.S_IFCHR: 'a device', stat.S_IFBLK: 'a device'}[stat.S_IFMT(status.st_mode)]
        raise UserError(f'{path} is {kind}; expected an image file. Remove it from the data set.')
    if status.st_size >= LARGEST:
        raise UserError(f'{path} has {status.st_size} bytes; image files of 2 GiB and more cannot '
                        'be decoded. Cut it into tiles, or remove it from the data set.')
    pixels = _pixels(path)
    if pixels > max(MANY, EMPTY * status.st_size):
        raise UserError(f'{path}: {_too_large(path, f"{pixels} pixels")}')


def _pixels(path) -> int:
    """How many pixels a file says it has; 0 if Pillow does not know its form."""
    with open(path, 'rb') as file:
        head = file.read(24)
    if head[:8] == b'\x89PNG\r\n\x1a\n' and len(head) == 24:
        _check_chunks(path)
        width, height = struct.unpack('>II', head[16:])  # OpenCV takes it without a right sum, too
        return width * height
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Image.DecompressionBombError as error:
        return int(re.search(r'(\d+) pixels', str(error))[1])
    except Exception:
        return 0  # the decoder of the pipeline has the last word


def _check_chunks(path) -> None:
    """OpenCV makes room for as many bytes as a part of a PNG says it has, up to 2 GiB."""
    size, place = os.path.getsize(path), 8
    with open(path, 'rb') as file:
        while place + 8 <= size:
            file.seek(place)
            length, name = struct.unpack('>I4s', file.read(8))
            if name == b'IEND':
                return
            place += length + 12
    if place > size:
        raise UserError(f'{path} cannot be decoded ({size} bytes; its parts say {place}). The file '
                        'is damaged. Fetch it again, or remove it from the data set.')


def _too_large(path, size) -> str:
    return (f'{os.path.getsize(path)} bytes that unpack to a picture too large to load ({size}). '
            'Cut it into tiles, or remove it from the data set.')


def _check_sizes(sample: dict) -> None:
    """Annotations belong to an image of their size; mmdet and mmseg go on with any other."""
    shape, path = tuple(sample.get('ori_shape') or ()), sample.get('img_path')
    labels = sample.get('gt_seg_map')
    if labels is not None and sample.get('seg_map_path') and shape:
        if labels.ndim < 2 and labels.size == shape[0] * shape[1]:
            # mmseg drops axes of length one, also those of an image one pixel high.
            sample['gt_seg_map'] = labels = labels.reshape(shape)
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


def _check_labels(sample: dict) -> None:
    """Every label is a class or "ignore". Below 0.1 ms for a label image of 8 bits."""
    labels, path = sample.get('gt_seg_map'), str(sample.get('seg_map_path'))
    folder = max((name for name in _expected if path.startswith(name)), key=len, default=None)
    if labels is None or folder is None:
        return
    expected = _expected[folder]
    problem = label_problem(labels, labels.shape, path, expected.classes, expected.ignored)
    try:
        if _is_local(path) and (problem or _mode(path) not in EIGHT_BITS):
            # As in the file: the labels are numbered anew, and of 16 bits the lowest 8 are left.
            values = read_labels(path)[0]
            problem = label_problem(values, labels.shape, path, expected.in_files,
                                    expected.ignored, bool(sample.get('reduce_zero_label')))
    except UNREADABLE:
        pass  # a form that only another decoder knows
    if problem:
        raise UserError(f'{problem}.')


def _mode(path: str) -> str:
    with Image.open(path) as image:
        return image.mode


def _paths(sample) -> list[str]:
    if not isinstance(sample, dict):
        return [sample] if isinstance(sample, str) else []
    found = [sample[key] for key in ('img_path', 'seg_map_path') if sample.get(key)]
    return [str(path) for path in found]


def _check_masks(transform, sample: dict) -> None:
    """mmdet's mixes of images move boxes; all but one leave the masks of the first image."""
    masks = sample['gt_masks']
    if ((masks.height, masks.width) != tuple(sample['img'].shape[:2])
            or len(masks) != len(sample['gt_bboxes'])):
        raise UserError(
            f'{_where(sample)}: {type(transform).__name__} moves boxes, but not masks. Train a '
            'detector of boxes alone (with_mask=False, and no mask head), or use CopyPaste, which '
            'knows masks.')


def _where(sample) -> str:
    paths = _paths(sample)
    mixed = [path for other in (sample.get('mix_results') or [] if isinstance(sample, dict) else [])
             for path in _paths(other)[:1]]
    return (paths[0] if paths else 'An image') + (f' (mixed with {", ".join(mixed)})' if mixed
                                                  else '')


def _failed(transform, sample, error: Exception) -> str:
    """What went wrong in a transform that reads no file."""
    where, name = _where(sample), type(transform).__name__
    if _no_memory(error):
        return (f'{where}: no memory is left for {name} ({_shape(sample)}). Use fewer workers '
                '(--cfg-options train_dataloader.num_workers=1) or smaller images.')
    if "in function 'resize'" in str(error):
        return (f'{where}: {name} would leave no pixel of its short side ({_shape(sample)}). '
                'Pad or cut this image, or remove it from the data set.')
    text = ' '.join(str(error).split())
    return (f'{where}: {name} failed ({_shape(sample)}). {type(error).__name__}: {text}. '
            '(--traceback shows where)')


def _no_memory(error: Exception) -> bool:
    """numpy and Python, torch and OpenCV say it in their own ways."""
    return isinstance(error, MemoryError) or any(
        part in str(error) for part in ("can't allocate memory", 'Insufficient memory'))


def _shape(sample) -> str:
    shape = getattr(sample.get('img') if isinstance(sample, dict) else None, 'shape', None)
    return f'the image is {shape[1]} x {shape[0]} there' if shape else 'no image is loaded there'


def _unreadable(transform, sample: dict, error: Exception) -> str:
    """Why a transform that reads files could not."""
    paths = _paths(sample)
    local = [path for path in paths if _is_local(path)]
    missing = [path for path in local if not osp.exists(path)]
    if missing:
        if osp.islink(missing[0]):
            return (f'{missing[0]} is a link to {os.readlink(missing[0])}, which does not exist. '
                    'Fetch the file, or remove it from the data set.')
        return (f'{missing[0]} does not exist, but the data set lists it. Fetch the missing file, '
                'or remove it from the annotations.')
    if isinstance(error, OSError) and error.errno:
        return (f'{error.filename or paths[0]} cannot be read: {error.strerror}. Correct its '
                'permissions or the disk, or remove it from the data set.')
    for path in local:
        reason = _reason(path, error)
        if reason:
            return f'{path} {reason}'
    if 'reduce_zero_label' in str(error):
        return f'reduce_zero_label of the data set and of its pipeline differ. {error}.'
    if not hasattr(transform, 'imdecode_backend') or 'img' in sample:
        return (f'The annotations of {paths[0] if paths else "an image"} could not be loaded: '
                f'{type(error).__name__}: {error}. Correct or remove this entry.')
    return (f'{paths[0]} is in a form that the decoder {transform.imdecode_backend!r} does not '
            f'read ({type(error).__name__}). Set imdecode_backend="pillow" of '
            f'{type(transform).__name__}, or convert it to JPEG or PNG.')


def _reason(path: str, error: Exception) -> str | None:
    """What is wrong with a file as Pillow sees it; None if nothing is."""
    size = os.path.getsize(path)
    if not size:
        return 'is empty (0 bytes). Fetch it again, or remove it from the data set.'
    if _no_memory(error):
        return (f'({size} bytes) does not fit into memory. Use fewer workers, or cut it into '
                'tiles.')
    try:
        with Image.open(path) as image:
            image.verify()  # sums of a PNG
        with Image.open(path) as image:
            image.load()
    except Image.DecompressionBombError as bomb:
        return f'has {_too_large(path, bomb)}'
    except Exception as found:
        kind = _foreign(path)
        if kind:
            return (f'is {kind} inside, which cannot be decoded here. Convert it to JPEG or PNG, '
                    'or remove it from the data set.')
        cause = '' if isinstance(found, Image.UnidentifiedImageError) else f': {found}'
        return (f'cannot be decoded ({size} bytes; {type(found).__name__}{cause}). The file is '
                'damaged or no image. Fetch it again, or remove it from the data set.')
    return None


def _foreign(path: str) -> str | None:
    with open(path, 'rb') as file:
        head = file.read(512).lstrip()
    if head[4:8] == b'ftyp':
        return 'a HEIC, AVIF or video file'
    if b'<svg' in head:
        return 'an SVG drawing'
    if head.startswith(b'version https://git-lfs'):
        return 'a Git LFS pointer (run: git lfs pull)'
    if head[:1] == b'<':
        return 'a web page or XML'
    return 'text' if head and head.isascii() and b'\0' not in head else None
