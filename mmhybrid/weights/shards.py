"""Checkpoints in pieces: a folder in which every process of a training wrote its own part.

::

    epoch_1.pth/rest.pth             all that is not divided, and 'pieces': how many, which shapes
    epoch_1.pth/piece_0_of_2.pth     'pieces': list of (keys that lead to a tensor, its first rows)
    epoch_1.pth/piece_1_of_2.pth     the rows after them
"""
from __future__ import annotations

import os
import os.path as osp
from collections.abc import Callable
from typing import Any

import torch

from .errors import WeightsError, printable

__all__ = ['REST', 'is_folder_of_pieces', 'piece_name', 'put_together']

REST = 'rest.pth'


def piece_name(rank: int, ranks: int) -> str:
    """Name of the file of one process."""
    return f'piece_{rank}_of_{ranks}.pth'


def is_folder_of_pieces(path: str | os.PathLike) -> bool:
    """Whether a path is a checkpoint in pieces."""
    return osp.isfile(osp.join(os.fsdecode(path), REST))


def put_together(folder: str | os.PathLike, read: Callable[[str], object]) -> dict:
    """Read a checkpoint in pieces as if it had been written as one file.

    Args:
        folder: of the pieces.
        read: reads one file safely.

    Raises:
        WeightsError: if a piece is missing, is of another checkpoint or does not fit the others.
    """
    folder = os.fsdecode(folder)
    rest = osp.join(folder, REST)
    checkpoint: Any = read(rest)
    about: Any = checkpoint.pop('pieces', None) if isinstance(checkpoint, dict) else None
    ranks, shapes = _described(about, rest)
    parts: list[list[torch.Tensor]] = [[] for _ in shapes]
    for rank in range(ranks):
        path = osp.join(folder, piece_name(rank, ranks))
        if not osp.isfile(path):
            raise WeightsError(f'{printable(folder)} lacks {piece_name(rank, ranks)}, the part of '
                               f'process {rank}; copy the whole folder')
        for own, (_, tensor) in zip(parts, _pieces(read(path), shapes, about['run'], path),
                                       strict=True):
            own.append(tensor)
    for (keys, shape), own in zip(shapes, parts, strict=True):
        _put(checkpoint, keys, _joined(own, keys, shape, folder), rest)
    return checkpoint


def _described(about: Any, path: str) -> tuple[int, list[tuple[tuple, tuple]]]:
    """Number of pieces, and keys and shape of every tensor."""
    try:
        shapes = [(tuple(keys), tuple(int(n) for n in shape)) for keys, shape in about['shapes']]
        ranks = about['ranks']
        if type(ranks) is int and ranks > 0 and 'run' in about and all(
                isinstance(key, (str, int)) for keys, _ in shapes for key in keys):
            return ranks, shapes
    except (TypeError, KeyError, ValueError):
        pass
    raise WeightsError(f'{printable(path)} does not describe the pieces beside it; expected '
                       'what a training with --fsdp sharded writes')


def _pieces(content: Any, shapes: list, run: object, path: str) -> list:
    """The (keys, tensor) of one process."""
    path = printable(path)
    found = content.get('pieces') if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(map(_is_piece, found)):
        raise WeightsError(f'{path} is not a piece of a checkpoint; expected what a training with '
                           '--fsdp sharded writes')
    if content.get('run') != run:
        raise WeightsError(f'{path} is a piece of another checkpoint than {REST} beside it; copy '
                           'the whole folder')
    if [tuple(keys) for keys, _ in found] != [keys for keys, _ in shapes]:
        raise WeightsError(f'{path} holds other tensors than {REST} says; copy the whole folder')
    return found


def _is_piece(each: object) -> bool:
    if not isinstance(each, (tuple, list)) or len(each) != 2:
        return False
    keys, tensor = each
    return isinstance(keys, (tuple, list)) and isinstance(tensor, torch.Tensor) and tensor.dim() > 0


def _joined(parts: list[torch.Tensor], keys: tuple, shape: tuple, folder: str) -> torch.Tensor:
    if all(part.shape[1:] == shape[1:] for part in parts) and sum(
            part.shape[0] for part in parts) == shape[0]:
        return torch.cat(parts)
    raise WeightsError(
        f'{printable(folder)}: the pieces of {printable(".".join(map(str, keys)))} have the shapes '
        f'{", ".join(str(tuple(part.shape)) for part in parts)}, which do not make up {shape}; '
        'copy the whole folder')


def _put(tree: dict, keys: tuple, tensor: torch.Tensor, path: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise WeightsError(f'{printable(path)} has something else where the pieces have '
                               f'{printable(".".join(map(str, keys)))}; copy the whole folder')
    tree[keys[-1]] = tensor
