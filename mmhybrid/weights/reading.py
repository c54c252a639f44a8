"""Files of weights into tensors, without running anything that a file may contain."""
from __future__ import annotations

import logging
import os
import stat
import tarfile
from typing import BinaryIO

import torch

from .addresses import shown
from .allowed import Damaged, NotPlain, Refused
from .containers import (
    Placement,
    Unfit,
    open_archive,
    programs,
    read_archive,
    read_row,
)
from .errors import WeightsError, printable
from .headers import check_header, read_header
from .pickles import CutOff
from .shards import REST, is_folder_of_pieces
from .tree import NotData, check_tree

__all__ = ['TRUST_VARIABLE', 'check_file', 'check_path', 'file_format', 'read_file',
           'safetensors_metadata', 'trusted']

#: Environment variable that allows everything a pickle may do.
TRUST_VARIABLE = 'MMHYBRID_TRUST_CHECKPOINTS'
_AGAIN = 'fetch it again'
_IF_TRUSTED = (f'Only if you trust where it comes from: set {TRUST_VARIABLE}=1, or convert it once '
               'with tools/convert_checkpoint.py --trust')
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
        name: what messages call the file, without the secrets of an address; its path by default.

    Returns:
        What was saved: dictionaries, lists, tuples, sets, texts, numbers, tensors, numpy arrays of
        numbers, and few more.  Settings that trainers save beside the weights may come back empty.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it is incomplete, no file of weights, or could run code.
        ImportError: for safetensors without that package.
    """
    if isinstance(file, (str, bytes, os.PathLike)):
        path, name = os.path.expanduser(os.fsdecode(file)), name or os.fsdecode(file)
        called = printable(shown(name))
        check_path(path, called)
        with _opened(path, called) as opened:
            return read_file(opened, map_location, trust, called)
    name = printable(shown(name or 'the checkpoint'))
    kind = file_format(file, name)
    if kind == 'safetensors':
        return _read_safetensors(file, map_location, name)
    if trust or trusted():
        return _read_trusted(file, map_location, name)
    size = file.seek(0, os.SEEK_END)
    read = read_archive if kind == 'zip' else read_row
    try:
        found = read(file, size, Placement(map_location))
        check_tree(found)
    except (Refused, NotData, NotPlain, CutOff, Damaged, Unfit) as error:
        raise WeightsError(_sentence(name, error)) from error
    return found


def _sentence(name: str, error: Exception) -> str:
    what = printable(error)
    if isinstance(error, Refused):
        return (f'{name} was not loaded: it contains {what}, and reading that could run code from '
                f'the file. {_IF_TRUSTED}')
    if isinstance(error, NotData):
        return (f'{name} was not loaded: {what}, expected nothing but texts, numbers and tensors. '
                f'{_IF_TRUSTED}')
    if isinstance(error, NotPlain):
        return (f'{name} was not loaded: it contains {what}; expected ordinary dense tensors, '
                'convert it before you save it')
    if isinstance(error, Unfit):
        return f'{name} {what}'
    return f'{name} is {"cut off" if isinstance(error, CutOff) else "damaged"}: {what}; {_AGAIN}'


def _read_trusted(file: BinaryIO, map_location, name: str) -> object:
    _log.warning('%s is read with everything its pickle may do, because it is trusted', name)
    file.seek(0)
    try:
        return torch.load(file, map_location=map_location, weights_only=False)
    except ImportError as error:
        raise WeightsError(f'{name} needs the package {error.name}, whose classes it contains; '
                           'install it, or save the weights alone') from error
    except Exception as error:  # whatever the file's own code raises
        raise WeightsError(f'{name} could not be read by torch: {type(error).__name__}: '
                           f'{printable(_last_line(error))}') from error


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split('\n')[-1].strip()


def check_path(path: str | os.PathLike, name: str | None = None) -> None:
    """Look at what a path leads to, without opening it.

    Raises:
        FileNotFoundError: if there is nothing.
        WeightsError: if it is something else than a file.
    """
    name = name or printable(os.fsdecode(path))
    try:
        mode = os.stat(path).st_mode
    except PermissionError as error:
        raise WeightsError(f'{name} cannot be looked at: this user may not enter a folder on the '
                           'way to it') from error
    except (OSError, ValueError) as error:
        # nothing there, a link to nothing, a name that no file can have
        absolute = printable(os.path.abspath(os.fsdecode(path)))
        raise FileNotFoundError(f'there is no checkpoint file {absolute}; check the path or '
                                'download the file first') from error
    if stat.S_ISDIR(mode):
        raise WeightsError(f'{name} is a folder, expected a file of weights; give the path of a '
                           'file in it')
    if not stat.S_ISREG(mode):
        raise WeightsError(f'{name} is a pipe, a device or a socket, expected a file of weights')


def _opened(path: str | os.PathLike, name: str) -> BinaryIO:
    try:
        return open(path, 'rb')
    except PermissionError as error:
        raise WeightsError(f'{name} may not be read by this user; change its permissions'
                           ) from error


def check_file(path: str | os.PathLike) -> str:
    """Look at the beginning and the end of a file; returns its format, see :func:`file_format`."""
    name = printable(os.fsdecode(path))
    if is_folder_of_pieces(path):
        path, name = (os.path.join(os.fsdecode(each), REST) for each in (path, name))
    check_path(path, name)
    with _opened(path, name) as file:
        return file_format(file, name)


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
    if not head.strip(b'\0'):
        raise WeightsError(f'{name} begins with nothing but zeros: its content was never written, '
                           f'or was lost; {_AGAIN}')
    if head[257:262] == b'ustar' or _is_tar(file):
        raise WeightsError(f'{name} is a tar archive, as torch wrote before 2017, which is not '
                           'safe to read; unpack it or convert it with an old torch')
    shown = head[:8].hex(' ')
    raise WeightsError(f'{name} is not a file of weights (it begins with the bytes {shown}), or it '
                       f'is damaged; expected .pth, .pt, .ckpt or .safetensors; {_AGAIN}')


def _is_tar(file: BinaryIO) -> bool:
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode='r:'):
            return True
    except (tarfile.TarError, ValueError, OSError, EOFError):
        return False
    finally:
        file.seek(0)


def _checked_zip(file: BinaryIO, name: str, size: int) -> str:
    try:
        with open_archive(file, size) as archive:
            names = archive.namelist()
    except Damaged as error:
        raise WeightsError(_sentence(name, error)) from error
    if any(each.endswith('/constants.pkl') or '/code/' in each for each in names):
        raise WeightsError(f'{name} is a TorchScript program, not weights; save its state_dict()')
    if len(set(names)) != len(names) or len(programs(names)) != 1:
        raise WeightsError(f'{name} is an archive, but not one that torch.save wrote; expected '
                           '.pth, .pt, .ckpt or .safetensors')
    return 'zip'


# --- safetensors ---

def _checked_safetensors(file: BinaryIO, name: str, size: int) -> None:
    header, start = read_header(file, name)
    check_header(header, start, size, name)


def safetensors_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Give the texts that a safetensors file carries beside its tensors."""
    if check_file(path) != 'safetensors':
        return {}
    with open(path, 'rb') as file:
        return read_header(file, printable(os.fsdecode(path)))[0].get('__metadata__', {})


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
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise WeightsError(f'{name} is damaged, or newer than the installed safetensors package '
                           f'({error}); {_AGAIN}') from error
