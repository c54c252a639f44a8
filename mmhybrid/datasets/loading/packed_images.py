"""Reading images from the databases that ``mmhybrid pack`` writes, as a backend of mmengine."""
from __future__ import annotations

import functools
import os

from mmengine.fileio import BaseStorageBackend, register_backend

from ..packed import DATABASE, find_database

__all__ = ['PackedImages']


class PackedImages(BaseStorageBackend):
    """Files out of an ``images.lmdb`` in their folder or one above it.

    In a config ``backend_args=dict(backend='mmhybrid_lmdb')`` of whatever loads files; paths stay
    what they are.
    """

    def get(self, filepath) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: if there is no database, or it does not hold the file.
        """
        path = os.fspath(filepath)
        database, below = _where(os.path.dirname(path))
        key = f'{below}{os.path.basename(path)}'
        with _opened(database).begin(buffers=False) as transaction:
            content = transaction.get(key.encode())
        if content is None:
            raise FileNotFoundError(f'{database} holds no {key}. Write it again with mmhybrid pack '
                                    '--force, or remove the image from the annotations.')
        return content

    def get_text(self, filepath, encoding: str = 'utf-8') -> str:
        """The same as text."""
        return self.get(filepath).decode(encoding)


@functools.lru_cache(maxsize=4096)
def _where(folder: str) -> tuple[str, str]:
    """The database for a folder's files, and what stands before their names in it."""
    found = find_database(os.path.join(folder, 'x'))
    if found is None:
        raise FileNotFoundError(f'No folder above the files of {folder} holds an {DATABASE}. Write '
                                'it with mmhybrid pack FOLDER, or leave backend_args out.')
    return found[0], found[1][:-1]


@functools.lru_cache(maxsize=64)
def _opened(database: str):
    """An open database."""
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{database} needs the package lmdb: pip install lmdb',
                                  name='lmdb') from error
    return lmdb.open(database, readonly=True, lock=False, readahead=False, max_spare_txns=1)


# LMDB does not survive a fork, nor opens what a process has inherited open: workers open their own.
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(before=_opened.cache_clear)
register_backend('mmhybrid_lmdb', PackedImages, force=True)
