"""A folder of images in one LMDB database, which lies in that folder.

Reading a million small files is slow on network drives, and so is copying them; one large file is
neither. The database ``images.lmdb`` holds the files as they are, under their path below the
folder.
"""
from __future__ import annotations

import os
import os.path as osp
import shutil
from collections.abc import Callable

__all__ = ['DATABASE', 'find_database', 'pack']

DATABASE = 'images.lmdb'
SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
_PAGE, _LONGEST = 4096, 511  # bytes of a page of LMDB, and of a key
_AT_ONCE = 1000  # files between two commits


def pack(folder: str | os.PathLike, force: bool = False,
         progress: Callable[[int, int], None] | None = None) -> int:
    """Write all images below a folder into its database; the files stay.

    Args:
        folder: of the images.
        force: whether to replace a database that is there.
        progress: called with files done and files to do.

    Returns:
        How many images.

    Raises:
        ModuleNotFoundError: without the package lmdb.
        FileNotFoundError: if there is no such folder, or no image in it.
        FileExistsError: if there is a database already.
        ValueError: for a path that is too long for a key.
    """
    folder = os.fspath(folder)
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Packing images needs the package lmdb: pip install lmdb',
                                  name='lmdb') from error
    if not osp.isdir(folder):
        raise FileNotFoundError(f'There is no folder {folder}.')
    target = osp.join(folder, DATABASE)
    if osp.lexists(target) and not force:
        raise FileExistsError(f'{target} is there already; --force replaces it.')
    names = sorted(_images(folder))
    if not names:
        raise FileNotFoundError(f'{folder} holds no images ({", ".join(SUFFIXES)}).')
    long = next((name for name in names if len(name.encode()) > _LONGEST), None)
    if long is not None:
        raise ValueError(f'{osp.join(folder, long)}: the path below the folder has more than '
                         f'{_LONGEST} bytes, which LMDB cannot hold. Pack a folder further down.')
    part = f'{target}.part'
    shutil.rmtree(part, ignore_errors=True)
    try:
        with lmdb.open(part, map_size=_room(folder, names)) as database:
            for start in range(0, len(names), _AT_ONCE):
                with database.begin(write=True) as transaction:
                    for name in names[start:start + _AT_ONCE]:
                        with open(osp.join(folder, name), 'rb') as file:
                            transaction.put(name.encode(), file.read())
                if progress is not None:
                    progress(min(start + _AT_ONCE, len(names)), len(names))
        if osp.isdir(target):
            shutil.rmtree(target)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(names)


def _images(folder: str):
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(DATABASE)]
        below = osp.relpath(path, folder)
        for name in files:
            if name.lower().endswith(SUFFIXES):
                yield osp.normpath(osp.join(below, name)).replace(os.sep, '/')


def _room(folder: str, names: list[str]) -> int:
    """Bytes that the database may take: whole pages for each image, and as much again for keys."""
    sizes = (osp.getsize(osp.join(folder, name)) for name in names)
    return sum(-(-(size + 16) // _PAGE) * _PAGE + _PAGE for size in sizes) + (64 << 20)


def find_database(path: str) -> tuple[str, str] | None:
    """The database that may hold a file, and its key there; None where no folder above has one."""
    folder, key = osp.split(path)
    while folder and key:
        database = osp.join(folder, DATABASE)
        if osp.isdir(database):
            return database, key
        above, name = osp.split(folder)
        if above == folder:
            return None
        folder, key = above, f'{name}/{key}'
    return None
