"""The two containers of torch.save, a zip archive and a row of pickles, into what was saved."""
from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from typing import IO, BinaryIO

import torch
from torch.serialization import default_restore_location

from .allowed import Budget, Damaged
from .pickles import CutOff, read_pickle

__all__ = ['Placement', 'Unfit', 'open_archive', 'programs', 'read_archive', 'read_row']

_LEGACY_MAGIC = 0x1950a86a20f9469cfc6c
_CHUNK = 2**22
_END_OF_ARCHIVE, _END_SIZE = b'PK\x05\x06', 22
# Everything that zipfile is known to raise for archives whose bytes were changed.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError,
               RuntimeError, OSError, struct.error, OverflowError)


class Unfit(Exception):
    """A whole file that cannot be used here; the message goes on after the file's name."""


class Placement:
    """Where tensors go: ``map_location`` of ``torch.load``."""

    def __init__(self, map_location):
        self.map_location = map_location

    def __call__(self, memory: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        """Move memory that was on ``location`` when it was saved.

        Raises:
            Unfit: if there is no such device.
        """
        given, wanted = self.map_location, location
        if isinstance(given, dict):
            wanted = given.get(location, location)
        elif callable(given):
            moved = given(memory, location)
            if moved is not None:
                return moved
        elif given is not None:
            wanted = str(given)
        try:
            return default_restore_location(memory, wanted)
        except (RuntimeError, AssertionError) as error:
            raise Unfit(f'has tensors that cannot go to the device {wanted!r} '
                        f"({_first_line(error)}); read it with map_location='cpu'") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split('\n')[0].rstrip('.')


# --- zip, since torch 1.6 ---

def open_archive(file: BinaryIO, size: int) -> zipfile.ZipFile:
    """Open an archive and look at its table of contents.

    Raises:
        Damaged: if it cannot be read, or holds more than the file can.
    """
    try:
        archive = zipfile.ZipFile(file)
    except _ZIP_ERRORS as error:
        file.seek(max(size - 2**16 - _END_SIZE, 0))
        tail = file.read()
        if 0 <= tail.rfind(_END_OF_ARCHIVE) <= len(tail) - _END_SIZE:
            raise Damaged('the table of contents of its archive cannot be read') from error
        raise CutOff(f'its end is missing ({size:,} bytes are there)') from error
    entries = archive.infolist()
    if any(entry.flag_bits & 1 for entry in entries):
        raise Damaged('parts of its archive are encrypted')
    odd = [entry for entry in entries
           if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
    if odd:
        raise Damaged(f'{odd[0].filename} is compressed in a way that torch does not know')
    # torch.save compresses nothing; what was packed again may be somewhat larger unpacked
    packed = any(entry.compress_type == zipfile.ZIP_DEFLATED for entry in entries)
    total = sum(entry.file_size for entry in entries)
    if total > (16 * size + 2**26 if packed else size):
        raise Damaged(f'it would unpack to {total:,} bytes, and {size:,} are there')
    if not any(entry.CRC for entry in entries):
        # torch.serialization.set_crc32_options(False) leaves all of them at 0
        for entry in entries:
            entry.CRC = None  # type: ignore[assignment]  # zipfile compares none then
    return archive


def read_archive(file: BinaryIO, size: int, place: Placement) -> object:
    """Read what torch.save put into a zip archive."""
    with open_archive(file, size) as archive:
        program = programs(archive.namelist())[0]
        folder = program[:-len('data.pkl')]
        order = f'{folder}byteorder'
        swapped = order in archive.namelist() and _bytes(_member(archive, order)) == b'big'
        found: dict[str, tuple] = {}

        def storage(key: str, dtype: torch.dtype, count: int, location: str):
            if key not in found:
                values = _member(archive, f'{folder}data/{key}', count * dtype.itemsize)
                memory = values.untyped_storage()
                if swapped:
                    memory.byteswap(dtype)
                found[key] = dtype, count, place(memory, location)
            return _same_again(found[key], dtype, count)

        content = _bytes(_member(archive, program))
        return read_pickle(io.BytesIO(content), len(content), Budget(size), storage)


def programs(names: list[str]) -> list[str]:
    """Give the pickles among the names of an archive; torch.save writes one."""
    return [each for each in names if re.fullmatch(r'[^/]+/data\.pkl', each)]


def _same_again(known: tuple, dtype: torch.dtype, count: int) -> torch.UntypedStorage:
    if known[:2] != (dtype, count):
        raise Damaged('it gives the same values two types or sizes')
    return known[2]


def _member(archive: zipfile.ZipFile, name: str, expected: int | None = None) -> torch.Tensor:
    """Read a part of an archive, with its checksum."""
    if name not in archive.NameToInfo:
        raise Damaged(f'its archive lacks {name}')
    entry = archive.getinfo(name)
    if expected not in (None, entry.file_size):
        raise Damaged(f'{name} in its archive has {entry.file_size:,} bytes, expected {expected:,}')
    values = _room(entry.file_size)
    try:
        with archive.open(entry) as part:
            _fill(values, part)
    except _ZIP_ERRORS as error:
        raise Damaged(f'{name} in its archive is not what was written '
                      f'({_first_line(error)})') from error
    return values


def _bytes(values: torch.Tensor) -> bytes:
    return values.numpy().tobytes()


def _room(size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device='cpu')
    except RuntimeError as error:
        raise Unfit(f'needs {size:,} bytes of memory at once, which this machine does not have '
                    'left') from error


def _fill(values: torch.Tensor, stream: IO[bytes]) -> None:
    view, place = memoryview(values.numpy()), 0
    while place < len(view):
        chunk = stream.read(min(_CHUNK, len(view) - place))
        if not chunk:
            raise EOFError('it ends too early')
        view[place:place + len(chunk)] = chunk
        place += len(chunk)


# --- a row of pickles, before torch 1.6 ---

def read_row(file: BinaryIO, size: int, place: Placement) -> object:
    """Read magic number, version, system, what was saved, the keys of storages, and raw values."""
    file.seek(0)
    head = Budget(size)
    magic = read_pickle(file, size, head)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise Unfit('is a plain pickle that torch.save did not write, so it holds no tensors that '
                    'could be read safely; expected .pth, .pt, .ckpt or .safetensors')
    for _ in range(2):
        read_pickle(file, size, head)
    start = file.tell()
    found: dict[str, tuple] = {}

    def noted(key: str, dtype: torch.dtype, count: int, location: str):
        if key not in found:
            memory = torch.UntypedStorage(count * dtype.itemsize, device='meta')
            found[key] = dtype, count, memory, location
        return _same_again(found[key], dtype, count)

    # Values come after what they belong to: once for their sizes, once more when they are there.
    read_pickle(file, size, Budget(size), noted)
    keys = read_pickle(file, size, head)
    if type(keys) is not list or not all(type(key) is str for key in keys) \
            or sorted(keys) != sorted(found):
        raise Damaged('its list of values is not that of its tensors')
    end = file.tell() + sum(8 + memory.nbytes() for _, _, memory, _ in found.values())
    if end > size:
        raise CutOff(f'{size:,} of {end:,} bytes are there')
    for key in keys:
        dtype, count, memory, location = found[key]
        values = _room(memory.nbytes())
        if struct.unpack('<q', file.read(8)) != (count,):
            raise Damaged('a tensor has another number of values than its description says')
        _fill(values, file)
        found[key] = dtype, count, place(values.untyped_storage(), location)
    file.seek(start)
    return read_pickle(file, size, Budget(size), lambda key, *_: found[key][2])
