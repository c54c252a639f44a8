"""What a file gave is plain data, all the way down, and small enough to be walked through."""
from __future__ import annotations

import argparse
import pathlib
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch

from .allowed import (
    Method,
    Name,
    Storage,
    UnfinishedArray,
    UnfinishedDtype,
    Unusable,
    history_buffer,
)

__all__ = ['NotData', 'check_tree']

DEEPEST = 100
MOST = 30_000_000  # values, when those that are referred to many times are counted each time
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set, frozenset, argparse.Namespace)
_LEAVES = (str, bytes, int, float, complex, bool, type(None), torch.Tensor, torch.nn.Parameter,
           torch.device, torch.dtype, torch.Size, pathlib.PurePosixPath)


class NotData(Exception):
    """The message says which value of a file is not plain data, and what it is."""


def check_tree(root: object) -> None:
    """Look at every value.

    Raises:
        NotData: if one has another class than those that stand for data, if one contains itself,
            or if walking through all of them would take for ever.
    """
    sizes: dict[int, int] = {}  # of finished containers, by identity
    path = [_Level(root, '')]
    while path:
        level = path[-1]
        key, value = next(level.rest, (None, level))
        if value is not level:
            if type(value) not in _CONTAINERS:
                _check_leaf(value, path, key)
                level.size += 1
            elif id(value) in sizes:
                level.size += sizes[id(value)]
            elif any(each.value is value for each in path):
                raise NotData(f'{_place(path, key)} contains itself')
            elif len(path) >= DEEPEST:
                raise NotData(f'{_place(path[:4], "...")} is nested more than {DEEPEST} levels '
                              'deep')
            else:
                path.append(_Level(value, key))
            continue
        path.pop()
        sizes[id(level.value)] = level.size
        if level.size > MOST:
            raise NotData(f'{_place(path, level.key)} repeats its parts until it has more than '
                          f'{MOST:,} values')
        if path:
            path[-1].size += level.size


class _Level:
    """A container that is being looked at, and what of it is still to be looked at."""

    def __init__(self, value: object, key: object):
        self.value, self.key, self.size = value, key, 1
        self.rest = iter(_parts(value) if type(value) in _CONTAINERS else [(key, value)])


def _parts(value: Any):
    if type(value) is argparse.Namespace:
        return vars(value).items()
    if isinstance(value, dict):
        notes = vars(value).get('_metadata') if type(value) is OrderedDict else None
        return [*value.items(), *([('_metadata', notes)] if notes is not None else [])]
    return enumerate(value)


def _check_leaf(value: object, path: list[_Level], key: object) -> None:
    if type(value) in _LEAVES or _is_numeric(value):
        return
    if history_buffer() is not None and type(value) is history_buffer():
        return
    raise NotData(f'{_place(path, key)} is {_named(value)}')


def _is_numeric(value: object) -> bool:
    if type(value) is np.ndarray:
        value = value.dtype
    if isinstance(value, np.generic):
        value = value.dtype
    return isinstance(value, np.dtype) and value.kind in 'biufc' and value.names is None


def _named(value: object) -> str:
    if isinstance(value, Unusable):
        return value.what
    if isinstance(value, Name):
        return f'the name {value.name}'
    if isinstance(value, (Storage, Method)):
        return 'a part of a tensor' if isinstance(value, Storage) else 'a method'
    if isinstance(value, (UnfinishedArray, UnfinishedDtype)):
        return 'a numpy value without its second half'
    return f'a {type(value).__name__}'


def _place(path: list[_Level], key: object) -> str:
    """Name a value by the keys that lead to it."""
    keys = [level.key for level in path[1:]] + [key]
    text = ''.join(f'[{each}]' if type(each) is int else f'.{str(each)[:60]}' for each in keys)
    return text.strip('.') or 'what it holds'
