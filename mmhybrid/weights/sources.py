"""From whatever names weights - path, address, repository, short name - to a file on this machine.
"""
from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import NamedTuple

from .download import download
from .errors import WeightsError
from .released import RELEASED, find_released

__all__ = ['HubAddress', 'fetch', 'is_known_source']

_SUFFIXES = ('.safetensors', '.pth', '.pth.tar', '.pt', '.ckpt', '.bin')


class HubAddress(NamedTuple):
    """Parts of ``hf://org/repo[/file][@revision]``."""

    repository: str
    file: str | None
    revision: str | None

    @classmethod
    def parse(cls, address: str) -> HubAddress:
        """Take an address apart.

        Raises:
            WeightsError: if it is none.
        """
        found = re.fullmatch(r'hf://([^/@]+/[^/@]+)(?:/([^@]+?))?/?(?:@([^@]+))?', address)
        if not found:
            raise WeightsError(f'got {address}, expected hf://organisation/repository[/file]'
                               '[@revision]')
        return cls(*found.groups())


def is_known_source(source: str) -> bool:
    """Whether this is something other than a path: a short name or an address we can fetch."""
    source = str(source)
    return (source.startswith(('http://', 'https://', 'hf://'))
            or not os.path.exists(os.path.expanduser(source)) and source.lower() in RELEASED)


def fetch(source: str | os.PathLike) -> Path:
    """Make a file of weights local.

    Args:
        source: path; ``http(s)://...``; ``hf://organisation/repository[/file][@revision]``; or a
            short name such as ``mambavision-t-1k``, see :data:`RELEASED`.  A file of that name in
            the current folder has precedence.

    Returns:
        Path of an existing file.

    Raises:
        FileNotFoundError: if a path does not exist.
        WeightsError: if it cannot be fetched.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if text.startswith(('http://', 'https://')):
        return download(text)
    if text.startswith('hf://'):
        return _from_hub(HubAddress.parse(text))
    if '://' in text:
        raise WeightsError(f'got {text}, expected a path, http(s)://, hf:// or a short name; '
                           'download it and give its path')
    row = find_released(text)
    if row is not None:
        return fetch(row.address)
    if os.sep not in text and '.' not in text:
        near = difflib.get_close_matches(text.lower(), RELEASED, n=3, cutoff=0.6)
        if near:
            raise FileNotFoundError(f'there is no file {text}, and no published weights of this '
                                    f'name; did you mean {" or ".join(near)}?')
    raise FileNotFoundError(f'there is no checkpoint file {path.absolute()}; check the path or '
                            'download the file first')


def _from_hub(address: HubAddress) -> Path:
    try:
        import huggingface_hub as hub
    except ImportError as error:
        if address.file is None:
            raise ImportError(
                f'finding the weights in hf://{address.repository} needs the huggingface_hub '
                'package: pip install huggingface_hub; or name the file') from error
        endpoint = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
        return download(f'{endpoint}/{address.repository}/resolve/'
                        f'{address.revision or "main"}/{address.file}')
    shown = 'hf://' + '/'.join(filter(None, (address.repository, address.file)))
    try:
        file = address.file or _choose(_hub_files(hub, address), shown)
        return Path(hub.hf_hub_download(address.repository, file, revision=address.revision))
    except WeightsError:
        raise
    except Exception as error:
        # The package has many errors of many versions; all mean that there is no file.
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise WeightsError(f'{shown} could not be fetched ({type(error).__name__}: {reason}); '
                           'check the name, the connection and HF_HUB_OFFLINE, or download the '
                           'file and give its path') from error


def _hub_files(hub, address: HubAddress) -> list[str]:
    offline = getattr(getattr(hub, 'constants', None), 'HF_HUB_OFFLINE', False)
    if not offline:
        return hub.HfApi().list_repo_files(address.repository, revision=address.revision)
    folder = Path(hub.snapshot_download(address.repository, revision=address.revision,
                                        local_files_only=True))
    return [str(each.relative_to(folder)) for each in folder.rglob('*') if each.is_file()]


def _choose(files: list[str], shown: str) -> str:
    """Take the one file of weights of a repository; safetensors before all others."""
    weights = [each for each in files if each.endswith(_SUFFIXES)]
    for suffix in _SUFFIXES:
        some = [each for each in weights if each.endswith(suffix)]
        if len(some) == 1:
            return some[0]
        if some:
            break
    listed = ', '.join(weights or files) or 'nothing'
    raise WeightsError(f'{shown} holds {listed}; name the file that you want, e.g. {shown}/'
                       f'{weights[0] if weights else "FILE"}')
