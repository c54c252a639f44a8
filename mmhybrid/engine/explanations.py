"""What to say of errors that others raise and a person can put right."""
from __future__ import annotations

import re
import traceback

import torch

from mmhybrid.mmcv_ops import CompiledOpMissing, TorchvisionMissing
from mmhybrid.weights import WeightsError

from ..errors import NO_WRITING, UserError

__all__ = ['SINGLE_VALUE_ADVICE', 'explain']

SINGLE_VALUE_ADVICE = (
    'Give each process at least 2 images (--cfg-options train_dataloader.batch_size=2), leave '
    'out a last batch of one image (train_dataloader.drop_last=True), or normalize without the '
    "batch: norm_cfg=dict(type='GN', num_groups=32). optim_wrapper.accumulative_counts does not "
    'help here, because each image still goes through alone.')
# Limits of the machine and mistakes of use that others report in their own words: parts of their
# text, and ours. A worker passes an error on as text, so the text decides.
KNOWN_TEXTS = (
    (('insufficient shared memory', 'unable to open shared memory', 'killed by signal: Bus error',
      'unable to write to file </torch', 'received 0 items of ancdata'),
     'Data loading workers ran out of shared memory (/dev/shm) or of file descriptors. Make it '
     'larger (docker run --shm-size=16g; ulimit -n 65536), or use fewer workers: --cfg-options '
     'train_dataloader.num_workers=1'),
    (('DataLoader worker (pid',),
     'A data loading worker was killed, usually because memory ran out (`dmesg` tells), or shared '
     'memory (docker run --shm-size=16g). Use fewer workers (--cfg-options '
     'train_dataloader.num_workers=1), smaller batches or images'),
    (("DefaultCPUAllocator: can't allocate memory", 'Insufficient memory',
      'Unable to allocate', '[Errno 12]'),
     'The memory of the machine is used up. Use fewer workers (--cfg-options '
     'train_dataloader.num_workers=1), smaller batches or smaller images'),
    (('Too many open files', '[Errno 24]'),
     'Too many files are open at once. Raise the limit (ulimit -n 65536), or use fewer workers: '
     '--cfg-options train_dataloader.num_workers=1'),
    (('File too large', '[Errno 27]', '. unexpected pos'),
     'A file could not be written whole: the disk is full, or files have a limit. Raise it (ulimit '
     '-f unlimited), free some space, or write elsewhere: --work-dir FOLDER'),
    (("'RepeatDataset' object has no attribute 'get_cat_ids'",
      "'ConcatDataset' object has no attribute 'get_cat_ids'"),
     'ClassBalancedDataset needs to know the classes of each image, which it cannot ask of the '
     'data set that it wraps. Put it inside: RepeatDataset or ConcatDataset around '
     'ClassBalancedDataset around CocoDataset'),
)


def explain(error: BaseException) -> str | None:
    """Text to show instead of a traceback, or None for an error we know nothing about."""
    text = str(error)
    if isinstance(error, UserError) or f'{UserError.__qualname__}: ' in text:
        # A data loading worker passes an error on as text, at the end of its own traceback.
        return text.rpartition(f'{UserError.__qualname__}: ')[2].strip()
    if isinstance(error, (WeightsError, CompiledOpMissing, TorchvisionMissing)):
        return text
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (f'The GPU is out of memory. {text.splitlines()[0]}\nUse smaller images or '
                'batches, mixed precision (--amp), or gradient checkpointing (--cfg-options '
                'model.backbone.with_cp=True).')
    if isinstance(error, ValueError) and 'Expected more than 1 value per channel' in text:
        return (f'A layer normalizes over the batch, and there is a single value: {text}.\n'
                f'{SINGLE_VALUE_ADVICE}')
    if isinstance(error, OSError) and error.errno in NO_WRITING:
        return (f'{error}\nFree some space, or write elsewhere: --work-dir FOLDER. A training '
                'goes on from its last whole checkpoint with --resume.')
    if isinstance(error, IndexError) and re.search(r'Target \d+ is out of bounds', text):
        return (f'An annotation holds a label that the head has no class for: {text}\n'
                'Compare num_classes of the heads with the largest label in the annotation '
                'files, and check reduce_zero_label: with True, 0 becomes "ignore" and label n '
                'becomes n - 1.')
    if isinstance(error, ValueError) and 'is not a subset of classes' in text:
        return (f'metainfo.classes names classes that the data set type does not have: {text}\n'
                "For a data set of your own use type='BaseSegDataset' with img_suffix and "
                'seg_map_suffix.')
    if any(part in text for part in ('num_samples should be a positive integer',
                                     'need at least one array to concatenate')):
        return ('The data set is empty: no image is left after filtering. Check the annotation '
                'file, the image folder and suffix, the classes in metainfo, and filter_cfg of the '
                'data set (it may leave out images without objects, or small ones).')
    if isinstance(error, KeyError) and _raised_in(error, '_save_best_checkpoint'):
        metrics = list(traceback.walk_tb(error.__traceback__))[-1][0].f_locals.get('metrics') or {}
        return (f'default_hooks.checkpoint.save_best names {text}, but the validation gives '
                f'{", ".join(metrics) or "no metrics"}. Name one of them, or "auto" for the first.')
    if 'device-side assert triggered' in text:
        return (f'The GPU found an index out of range. {text.splitlines()[0]}\nThe usual cause is '
                'a label in the annotations that the head has no class for: compare num_classes '
                'of the heads with the largest label. The same command on the CPU '
                '(CUDA_VISIBLE_DEVICES=-1) names the value.')
    return _known(error, text)


def _known(error: BaseException, text: str) -> str | None:
    for parts, sentence in KNOWN_TEXTS:
        for line in text.splitlines():
            if any(part in line for part in parts):
                return f'{sentence}.\n{line.strip()}'
    if isinstance(error, MemoryError):
        return _known(error, KNOWN_TEXTS[2][0][0])
    return None


def _raised_in(error: BaseException, function: str) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_code.co_name == function
