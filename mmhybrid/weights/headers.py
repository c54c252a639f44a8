"""The header of a safetensors file: JSON that says where each tensor is."""
from __future__ import annotations

import json
import math
import os
import struct
from itertools import pairwise
from typing import BinaryIO, TypeGuard

from .errors import WeightsError, printable

__all__ = ['check_header', 'read_header']

_MOST = 100 * 2**20  # bytes, as the format itself allows
_BYTES = {'BOOL': 1, 'U8': 1, 'I8': 1, 'F8_E5M2': 1, 'F8_E4M3': 1, 'I16': 2, 'U16': 2, 'F16': 2,
          'BF16': 2, 'I32': 4, 'U32': 4, 'F32': 4, 'F64': 8, 'I64': 8, 'U64': 8, 'C64': 8}
_AGAIN = 'fetch it again'


class _Twice(ValueError):
    """A name is there twice."""


def read_header(file: BinaryIO, name: str) -> tuple[dict, int]:
    """Read the header.

    Returns:
        Its JSON, and the place of the first tensor's first byte.

    Raises:
        WeightsError: if there is none.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = struct.unpack('<Q', file.read(8))[0]
    if length > min(size - 8, _MOST):
        raise WeightsError(f'{name} is cut off or damaged: its header should have {length:,} '
                           f'bytes and {size:,} are there in all; {_AGAIN}')
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_once)
    except _Twice as error:
        raise WeightsError(f'{name} is damaged: its header has {printable(error, 80)} twice; '
                           f'{_AGAIN}') from error
    except (ValueError, RecursionError) as error:
        reason = 'nested too deeply' if isinstance(error, RecursionError) else error
        raise WeightsError(f'{name} is damaged: its header is not JSON ({reason}); {_AGAIN}'
                           ) from error
    return header, 8 + length


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        raise _Twice(next(repr(key) for key in names if names.count(key) > 1))
    return found


def check_header(header: object, start: int, size: int, name: str) -> None:
    """Raise WeightsError unless the tensors of a header fill the file exactly, one by one.

    Args:
        header: its JSON.
        start: place of the first tensor's first byte.
        size: of the file.
        name: what messages call the file.
    """
    if not isinstance(header, dict):
        raise WeightsError(f'{name} is JSON, but not the header of a safetensors file')
    notes = header.get('__metadata__', {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise WeightsError(f'{name} is damaged: the __metadata__ of its header are not texts by '
                           f'name; {_AGAIN}')
    tensors = {key: entry for key, entry in header.items() if key != '__metadata__'}
    for key, entry in tensors.items():
        if not isinstance(entry, dict):
            raise WeightsError(f'{name} is JSON, but not the header of a safetensors file: '
                               f'{printable(key, 80)} is not a description of a tensor')
        problem = _problem(entry)
        if problem:
            raise WeightsError(f'{name} is damaged: {printable(key, 80)} {problem}; {_AGAIN}')
    _check_places(tensors, start, size, name)


def _check_places(tensors: dict, start: int, size: int, name: str) -> None:
    spans = sorted((*entry['data_offsets'], key) for key, entry in tensors.items())
    end = start + (max(span[1] for span in spans) if spans else 0)
    if end > size:
        raise WeightsError(f'{name} is cut off: {size:,} of {end:,} bytes are there; {_AGAIN}')
    if end < size:
        raise WeightsError(f'{name} is damaged: {size - end:,} bytes follow its last tensor; '
                           f'{_AGAIN}')
    for before, after in pairwise([(0, 0, 'the header'), *spans]):
        if before[1] != after[0]:
            raise WeightsError(f'{name} is damaged: {printable(after[2], 80)} does not begin where '
                               f'{printable(before[2], 80)} ends; {_AGAIN}')


def _problem(entry: dict) -> str | None:
    """What is wrong with the description of one tensor."""
    kind, shape, span = (entry.get(key) for key in ('dtype', 'shape', 'data_offsets'))
    if not isinstance(kind, str):
        return 'has no dtype'
    if not _are_sizes(shape):
        return 'has no shape'
    if not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        return 'has no data_offsets, a first and a last byte'
    # of dtypes that are younger than this list, the safetensors package knows the size
    if kind in _BYTES and math.prod(shape) * _BYTES[kind] != span[1] - span[0]:
        return (f'has {span[1] - span[0]:,} bytes, but {kind} and its shape '
                f'{tuple(shape)} need another number')
    return None


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and len(values) <= 64 and all(
        type(value) is int and 0 <= value < 2**48 for value in values)
