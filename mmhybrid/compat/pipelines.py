"""Detectors and segmentors in one process, and grey pictures, through the interfaces of both.

mmdet and mmseg give transforms the same names, and look them up in the scope that the model built
last has left behind: ``inference_detector`` after ``init_model`` finds mmseg's ``LoadAnnotations``,
which does not know ``with_bbox``. Both change the config of the model when they are given an
array, and then read no file any more. And mmdet fails on the array of a grey picture, though it
reads the same picture from a file.
"""
from __future__ import annotations

import functools
import threading

import numpy as np
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS, DefaultScope

__all__ = ['install', 'is_installed']

LOADERS = ('LoadImageFromNDArray', 'InferencerLoader')
_lock = threading.RLock()  # the scope belongs to the process; a pipeline may hold others


def install() -> None:
    """Have pipelines built in the scope that knows all their transforms, if the current does not.

    Nothing changes for a pipeline that could be built before.
    """
    classes = [Compose]
    try:
        from mmcv.transforms import Compose as MmcvCompose
        classes.append(MmcvCompose)
    except ImportError:  # a classifier does without
        pass
    for compose in classes:
        if not hasattr(compose.__init__, '__wrapped__'):
            compose.__init__ = _in_scope(compose.__init__)


def is_installed() -> bool:
    """Whether pipelines are built that way."""
    return hasattr(Compose.__init__, '__wrapped__')


def _in_scope(build):
    @functools.wraps(build)
    def init(self, transforms):
        transforms = list(transforms or [])
        scope = _other_scope(transforms)
        if scope is None:
            build(self, transforms)
        else:
            with _lock, DefaultScope.overwrite_default_scope(scope):
                build(self, transforms)
        if self.transforms and _takes_arrays(self.transforms[0]):
            self.transforms[0] = _FileOrArray(self.transforms[0])

    return init


def _other_scope(transforms: list) -> str | None:
    """The one scope that knows all transforms; None if the current one does, or none or more do."""
    names = {step['type'] for step in transforms
             if isinstance(step, dict) and isinstance(step.get('type'), str)}
    names = {name for name in names if '.' not in name}
    current = DefaultScope.get_current_instance()
    if current is None or _knows(current.scope_name, names):
        return None
    others = [scope for scope in TRANSFORMS.children
              if scope != current.scope_name and _knows(scope, names)]
    return others[0] if len(others) == 1 else None


def _knows(scope: str, names: set[str]) -> bool:
    with TRANSFORMS.switch_scope_and_registry(scope) as registry:
        return all(registry.get(name) is not None for name in names)


def _takes_arrays(loader) -> bool:
    kind = type(loader)
    return kind.__name__ in LOADERS and kind.__module__.startswith(('mmdet.', 'mmseg.'))


class _FileOrArray:
    """A loader of arrays that also reads the file when it is given a path, and grey arrays."""

    def __init__(self, loader):
        self.loader = loader
        # mmseg's preprocessing gives a grey picture its three channels, and a model may want one.
        self.in_colour = (type(loader).__module__.startswith('mmdet.')
                          and getattr(loader, 'from_file', loader).color_type == 'color')

    def __call__(self, data):
        if isinstance(data, dict) and 'img' not in data and data.get('img_path') and not hasattr(
                self.loader, 'from_file'):
            from mmcv.transforms import LoadImageFromFile
            return LoadImageFromFile.transform(self.loader, data)
        return self.loader(_three_channels(data) if self.in_colour else data)

    def __repr__(self):
        return repr(self.loader)


def _three_channels(data):
    """A grey picture (H, W) or (H, W, 1) as OpenCV reads it from a file, in three channels."""
    picture = data.get('img') if isinstance(data, dict) else data
    if not isinstance(picture, np.ndarray) or picture.ndim > 2 and picture.shape[2] != 1:
        return data
    colour = np.repeat(picture.reshape(*picture.shape[:2], 1), 3, axis=2)
    return {**data, 'img': colour} if isinstance(data, dict) else colour
