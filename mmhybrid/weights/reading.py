"""Files of weights into tensors, without running anything that a file may contain."""
from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import struct
import tarfile
import zipfile
from typing import BinaryIO

import torch

from .allowed import Refused, allowed_names, check_pickle, harmless_globals
from .errors import WeightsError

__all__ = ['TRUST_VARIABLE', 'check_file', 'file_format', 'read_file', 'safetensors_metadata',
           'trusted']

#: Environment variable that allows everything a pickle may do.
TRUST_VARIABLE = 'MMHYBRID_TRUST_CHECKPOINTS'
_AGAIN = 'fetch it again'
_LEGACY_MAGIC = 0x1950a86a20f9469cfc6c
_log = logging.getLogger(__name__)


def trusted() -> bool:
    """Whether the user vouches for every checkpoint of this program."""
    return os.environ.get(TRUST_VARIABLE, '0') not in ('', '0')


def read_file(file: str | os.PathLike | BinaryIO, map_location='cpu', trust: bool = False,
              name: str | None = None) -> object:
    """Read a .pth, .pt, .ckpt or .safetensors file; its content decides which it is.

    Args:
        file: path, or an open binary file.
        map_location: device of the tensors, as in ``torch.load``.
        trust: also read pickles that may run code.  The environment variable
            ``MMHYBRID_TRUST_CHECKPOINTS=1`` does the same for a whole program.
        name: what messages call the file; its path by default.

    Returns:
        What was saved.  Settings that trainers save beside the weights may come back empty.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is incomplete, no file of weights, or could run code.
        ImportError: for safetensors without that package.
    """
    if isinstance(file, (str, os.PathLike)):
        path = os.path.expanduser(os.fspath(file))
        if not os.path.isfile(path):
            raise FileNotFoundError(f'there is no checkpoint file {os.path.abspath(path)}; check '
                                    'the path or download the file first')
        with open(path, 'rb') as opened:
            return read_file(opened, map_location, trust, name or os.fspath(file))
    name = name or 'the checkpoint'
    kind = file_format(file, name)
    if kind == 'safetensors':
        return _read_safetensors(file, map_location, name)
    trust = trust or trusted()
    allowed_names()  # not within the try statement: an error of ours is no damaged file
    try:
        if not trust:
            _check_pickles(file, kind, name)
        file.seek(0)
        if trust:
            _log.warning('%s is read with everything its pickle may do, because it is trusted',
                         name)
            return torch.load(file, map_location=map_location, weights_only=False)
        with harmless_globals():
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's reader raises this for a file that ends too early, too, and it wraps errors of
        # the harmless functions in pages of advice.
        within = re.search(r'GLOBAL (\S+)|(getattr\(.*\)|an encoding .*)', str(error))
        culprit = str(error) if isinstance(error, Refused) else (
            within and (within[1] or within[2]))
        if trust or culprit is None:
            raise WeightsError(f'{name} is cut off or damaged ({_last_line(error)}); {_AGAIN}'
                               ) from error
        raise WeightsError(
            f'{name} was not loaded: it contains {culprit}, and reading that could run code from '
            'the file. Only if you trust where it comes from: set '
            f'{TRUST_VARIABLE}=1, or convert it once with tools/convert_checkpoint.py --trust'
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError,
            OverflowError, struct.error) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f'{name} is cut off or damaged ({_last_line(error)}); {_AGAIN}'
                           ) from error


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split('\n')[-1].strip()


def check_file(path: str | os.PathLike) -> str:
    """Look at the beginning and the end of a file; returns its format, see :func:`file_format`."""
    with open(path, 'rb') as file:
        return file_format(file, os.fspath(path))


def file_format(file: BinaryIO, name: str) -> str:
    """Tell formats apart: 'safetensors', 'zip' (torch since 1.6) or 'pickle' (before).

    Raises:
        WeightsError: for anything else, saying what it is.
    """
    file.seek(0)
    head = file.read(512)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = head.lstrip(b'\xef\xbb\xbf \t\r\n')[:32].lower()
    if not size:
        raise WeightsError(f'{name} is empty; {_AGAIN}')
    if start.startswith((b'<!doctype', b'<html', b'<head', b'<?xml', b'<!--')):
        shown = head.strip().split(b'\n')[0][:40].decode('latin1')
        raise WeightsError(
            f'{name} is a web page ({shown}), not weights: the address shows a page or asks to '
            'sign in; use the link that downloads the file (on Hugging Face with /resolve/ in '
            'place of /blob/)')
    if start.startswith(b'version https://git-lfs'):
        raise WeightsError(f'{name} is the placeholder of a file in Git LFS, not the file; run: '
                           'git lfs pull')
    if head.startswith(b'PK'):
        return _checked_zip(file, name, size)
    if head.startswith(b'\x80'):
        return 'pickle'
    if size > 8 and head[8:9] == b'{':
        _checked_safetensors(file, name, size)
        return 'safetensors'
    if start.startswith((b'{', b'[')):
        raise WeightsError(f'{name} is text ({start[:20].decode("latin1")}...), not weights')
    if len(head) == 512 and head[257:262] == b'ustar' or _is_tar(file):
        raise WeightsError(f'{name} is a tar archive, as torch wrote before 2017, which is not '
                           'safe to read; unpack it or convert it with an old torch')
    shown = head[:8].hex(' ')
    raise WeightsError(f'{name} is no file of weights (it begins with the bytes {shown}), or it '
                       f'is damaged; expected .pth, .pt, .ckpt or .safetensors; {_AGAIN}')


def _is_tar(file: BinaryIO) -> bool:
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode='r:'):
            return True
    except tarfile.TarError:
        return False
    finally:
        file.seek(0)


def _checked_zip(file: BinaryIO, name: str, size: int) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, struct.error) as error:
        raise WeightsError(f'{name} is cut off: its end is missing ({size:,} bytes are there); '
                           f'{_AGAIN}') from error
    if any(each.endswith('/constants.pkl') or '/code/' in each for each in names):
        raise WeightsError(f'{name} is a TorchScript program, not weights; save its state_dict()')
    if len(set(names)) != len(names) or len(_programs(names)) != 1:
        raise WeightsError(f'{name} is an archive, but not one that torch.save wrote; expected '
                           '.pth, .pt, .ckpt or .safetensors')
    return 'zip'


def _programs(names: list[str]) -> list[str]:
    return [each for each in names if re.fullmatch(r'[^/]+/data\.pkl', each)]


def _check_pickles(file: BinaryIO, kind: str, name: str) -> None:
    """Check every pickle that torch.load would execute."""
    file.seek(0)
    if kind == 'zip':
        with zipfile.ZipFile(file) as archive:
            program, = _programs(archive.namelist())
            check_pickle(io.BytesIO(archive.read(program)))
        return
    # The format before torch 1.6: magic number, version, system, the object, names of storages;
    # raw data follow.
    for _ in range(5):
        check_pickle(file)
    file.seek(0)
    if _first_number(file) != _LEGACY_MAGIC:
        raise WeightsError(f'{name} is a plain pickle that torch.save did not write, so it holds '
                           'no tensors that could be read safely; expected .pth, .pt, .ckpt or '
                           '.safetensors')


def _first_number(file: BinaryIO) -> object:
    class Numbers(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f'{module}.{name}')

    return Numbers(file).load()


# --- safetensors ---

def _header(file: BinaryIO, name: str, size: int) -> tuple[dict, int]:
    file.seek(0)
    length = struct.unpack('<Q', file.read(8))[0]
    if length > min(size - 8, 100 * 2**20):
        raise WeightsError(f'{name} is cut off or damaged: its header should have {length:,} '
                           f'bytes and {size:,} are there in all; {_AGAIN}')
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise WeightsError(f'{name} is damaged: its header is no JSON ({error}); {_AGAIN}'
                           ) from error
    return header, 8 + length


def _checked_safetensors(file: BinaryIO, name: str, size: int) -> None:
    header, start = _header(file, name, size)
    try:
        ends = [entry['data_offsets'][1] for key, entry in header.items() if key != '__metadata__']
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise WeightsError(f'{name} is JSON, but not the header of a safetensors file') from error
    end = start + max(ends, default=0)
    if end > size:
        raise WeightsError(f'{name} is cut off: {size:,} of {end:,} bytes are there; {_AGAIN}')


def safetensors_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Give the texts that a safetensors file carries beside its tensors."""
    with open(path, 'rb') as file:
        if file_format(file, os.fspath(path)) != 'safetensors':
            return {}
        size = file.seek(0, os.SEEK_END)
        return _header(file, os.fspath(path), size)[0].get('__metadata__') or {}


def _read_safetensors(file: BinaryIO, map_location, name: str) -> dict:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file
    except ImportError as error:
        raise ImportError(f'reading {name} needs the safetensors package; '
                          'run: pip install safetensors') from error
    path = getattr(file, 'name', None)
    try:
        if isinstance(path, str) and isinstance(map_location, (str, torch.device, type(None))):
            return load_file(path, device=str(map_location or 'cpu'))
        file.seek(0)
        return load(file.read())
    except SafetensorError as error:
        raise WeightsError(f'{name} is damaged ({error}); {_AGAIN}') from error
