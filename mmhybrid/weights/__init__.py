"""Weights of others: find them, fetch them, read them safely, say whose they are.

Everything up to tensors by name; :mod:`mmhybrid.models.checkpoints` puts those into models.
"""
from __future__ import annotations

import os

from .addresses import is_remote, shown
from .download import sha256_of
from .errors import WeightsError, printable
from .nesting import strip_parallel, strip_wrappers, unwrap
from .reading import (
    TRUST_VARIABLE,
    check_file,
    check_path,
    file_format,
    read_file,
    safetensors_metadata,
    trusted,
)
from .recognition import Identity, identify, kind_of
from .released import RELEASED, Released, released_as
from .shards import is_folder_of_pieces, put_together
from .sources import fetch, is_known_source

__all__ = ['Identity', 'RELEASED', 'Released', 'TRUST_VARIABLE', 'WeightsError', 'check_file',
           'check_path', 'fetch', 'file_format', 'identify', 'is_known_source', 'is_remote',
           'kind_of', 'printable', 'read_checkpoint', 'read_file', 'released_as',
           'safetensors_metadata', 'sha256_of', 'shown', 'strip_parallel', 'strip_wrappers',
           'trusted', 'unwrap']


def read_checkpoint(source: str | os.PathLike, map_location='cpu', trust: bool = False) -> object:
    """Fetch and read a checkpoint without running anything in it.

    Args:
        source: path, http(s) address, ``hf://organisation/repository[/file][@revision]`` or short
            name; see :func:`fetch`.
        map_location: device of the tensors, as in ``torch.load``.
        trust: see :func:`read_file`.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: if a path does not exist.
        WeightsError: if it cannot be fetched, is damaged or could run code.
    """
    name = os.fsdecode(source)
    path = os.path.expanduser(name)
    if '://' not in name and not is_known_source(name) and (
            os.sep in name or os.path.lexists(path)):
        if is_folder_of_pieces(path):
            return put_together(path, lambda file: read_file(file, map_location, trust))
        check_path(path, name)
    return read_file(fetch(source), map_location, trust, name=name)
