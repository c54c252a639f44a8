"""From whatever names weights - path, address, repository, short name - to a file on this machine.
"""
from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path
from typing import NamedTuple

from mmhybrid.spelling import did_you_mean, nearest_few

from .addresses import shown
from .download import download
from .errors import WeightsError
from .released import RELEASED, find_released

__all__ = ['HubAddress', 'fetch', 'is_known_source']

_SUFFIXES = ('.safetensors', '.pth', '.pth.tar', '.pt', '.ckpt', '.bin')
# What huggingface_hub raises, by the names of the classes, the special ones first; the package
# moved them from module to module, and its newer versions stand on another HTTP library.
_HUB_ERRORS = (
    ('GatedRepoError', 'its conditions are not accepted; accept them on its page and sign in with '
     'the command hf auth login'),
    ('RepositoryNotFoundError', 'there is no such repository, or it is private; check the name, '
     'or sign in with the command hf auth login'),
    ('RevisionNotFoundError', 'the repository has no such revision; check what follows @'),
    ('LocalEntryNotFoundError', 'it is not in the cache of the hub, and the hub cannot be asked; '
     'check the connection and HF_HUB_OFFLINE'),
    ('EntryNotFoundError', 'the repository has no such file; check the name'),
    ('OfflineModeIsEnabled', 'it is not in the cache of the hub, and HF_HUB_OFFLINE is set; unset '
     'it'),
    ('HFValidationError', 'the hub allows no such name; check it'),
    ('LocalTokenNotFoundError', 'it asks for a token; sign in with the command hf auth login'),
    ('Timeout', 'the hub did not answer in time; try again'),
    ('TimeoutException', 'the hub did not answer in time; try again'),
    ('ConnectionError', 'there is no connection to the hub; check it, or set HF_ENDPOINT'),
    ('TransportError', 'there is no connection to the hub; check it, or set HF_ENDPOINT'),
)


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
        parts = '/'.join(filter(None, found.groups()[:2] if found else ())).split('/')
        if not found or not address.isprintable() or {'', '.', '..'} & {*parts}:
            raise WeightsError(f'got {shown(address)}, expected hf://organisation/repository[/file]'
                               '[@revision]')
        return cls(*found.groups())


def is_known_source(source: str) -> bool:
    """Whether this is something other than a path: a short name or an address we can fetch."""
    source = str(source)
    return (source.lower().startswith(('http://', 'https://')) or source.startswith('hf://')
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
    if os.path.isfile(path := os.path.expanduser(text)):
        return Path(path)
    if text.lower().startswith(('http://', 'https://')):
        return download(text)
    if text.startswith('hf://'):
        return _from_hub(HubAddress.parse(text))
    if '://' in text:
        raise WeightsError(f'got {shown(text)}, expected a path, http(s)://, hf:// or a short '
                           'name; download it and give its path')
    row = find_released(text)
    if row is not None:
        return fetch(row.address)
    if os.sep not in text and '.' not in text:
        near = nearest_few(text.lower(), RELEASED)
        if near:
            raise FileNotFoundError(f'there is no file {text}, and no published weights have this '
                                    f'name.{did_you_mean(*near)}')
    raise FileNotFoundError(f'there is no checkpoint file {os.path.abspath(path)}; check the path '
                            'or download the file first')


def _from_hub(address: HubAddress) -> Path:
    try:
        import huggingface_hub as hub
    except ImportError as error:
        if address.file is None:
            raise ImportError(
                f'finding the weights in hf://{address.repository} needs the huggingface_hub '
                'package: pip install huggingface_hub; or name the file') from error
        endpoint = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
        quote = urllib.parse.quote
        return download(f'{endpoint}/{quote(address.repository)}/resolve/'
                        f'{quote(address.revision or "main", safe="")}/{quote(address.file)}')
    name = 'hf://' + '/'.join(filter(None, (address.repository, address.file)))
    try:
        file = address.file or _choose(_hub_files(hub, address), name)
        return Path(hub.hf_hub_download(address.repository, file, revision=address.revision))
    except WeightsError:
        raise
    except Exception as error:  # whatever it raises means that there is no file
        raise WeightsError(f'{name} could not be fetched: {_hub_reason(error)}; or download the '
                           'file and give its path') from error


def _hub_reason(error: Exception) -> str:
    classes = {each.__name__ for each in type(error).__mro__}
    for name, reason in _HUB_ERRORS:
        if name in classes:
            return reason
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status:
        return f'the hub answered {status}; try again'
    if isinstance(error, OSError) and error.strerror:
        return (f'{error.strerror} ({error.filename}); make room, or name another folder with '
                'HF_HOME')
    told = (str(error).strip() or 'no message').splitlines()[0][:200]
    return (f'huggingface_hub failed with {type(error).__name__} ({told}); check the name, the '
            'connection and HF_HUB_OFFLINE')


def _hub_files(hub, address: HubAddress) -> list[str]:
    offline = getattr(getattr(hub, 'constants', None), 'HF_HUB_OFFLINE', False)
    if not offline:
        return hub.HfApi().list_repo_files(address.repository, revision=address.revision)
    folder = Path(hub.snapshot_download(address.repository, revision=address.revision,
                                        local_files_only=True))
    return [str(each.relative_to(folder)) for each in folder.rglob('*') if each.is_file()]


def _choose(files: list[str], name: str) -> str:
    """Take the one file of weights of a repository; safetensors before all others."""
    weights = [each for each in files if each.endswith(_SUFFIXES)]
    for suffix in _SUFFIXES:
        some = [each for each in weights if each.endswith(suffix)]
        if len(some) == 1:
            return some[0]
        if some:
            break
    listed = ', '.join(weights or files) or 'nothing'
    raise WeightsError(f'{name} holds {listed}; name the file that you want, e.g. {name}/'
                       f'{weights[0] if weights else "FILE"}')
