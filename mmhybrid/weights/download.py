"""Files from web servers: complete and checked under their name, or not there at all."""
from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import stat
import sys
import time
import urllib.parse
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from ..private_files import alone, open_new, open_own
from .addresses import Address, parse_address
from .errors import WeightsError
from .reading import check_file
from .transfer import Interrupted, ask, read_some

__all__ = ['LARGEST_VARIABLE', 'cache_folder', 'download', 'sha256_of']

#: Environment variable: a file of more gigabytes is not fetched.
LARGEST_VARIABLE = 'MMHYBRID_LARGEST_DOWNLOAD_GB'
_LARGEST_GB = 32.
_CHUNK = 1 << 18
_ATTEMPTS = 4
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Give the folder of downloads: that of ``torch.hub``, which mmengine uses too."""
    return Path(torch.hub.get_dir()) / 'checkpoints'


def sha256_of(path: str | os.PathLike) -> str:
    """Compute the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, sha256: str | None = None, folder: str | os.PathLike | None = None) -> Path:
    """Fetch a file once and keep it.

    What arrives is written beside the final name and moved there when it is complete, is not a web
    page, and has the checksum that is known: from the argument, from a fragment ``#sha256=...``
    of the address, from a file name such as ``resnet50-0676ba61.pth``, or from the server.  An
    interrupted download continues where it stopped, if the server still has the same file.
    Processes on one machine wait for each other.

    Args:
        url: address beginning with http:// or https://.
        sha256: expected checksum, or its first digits (eight at least).
        folder: where files are kept; see :func:`cache_folder`.

    Returns:
        Path of the complete file.

    Raises:
        WeightsError: if it cannot be fetched, or is not what was expected.
    """
    address = parse_address(url)
    asked = _checked_digits(address, sha256)
    in_name = _digits_in(address.name)
    folder = Path(folder or cache_folder())
    # Many models are called model.safetensors, so the address is part of the name.
    final = folder / f'{hashlib.sha256(address.url.encode()).hexdigest()[:8]}-{address.name}'
    shared = folder / address.name
    try:
        if not os.path.isfile(final):
            if in_name and os.path.isfile(shared) and sha256_of(shared).startswith(in_name):
                final = shared  # fetched earlier by torch.hub or by hand
            else:
                _fetch_alone(address, final, asked or in_name)
        _check_kept(final, asked)
    except TimeoutError as error:
        raise WeightsError(f'{address} was not fetched: {error.strerror}') from error
    except OSError as error:
        raise WeightsError(f'{address} cannot be kept: {_of_disk(error)}{_kept_bytes(final)}; make '
                           'room or remove what is in the way, or name another folder with the '
                           'environment variable TORCH_HOME') from error
    return final


def _checked_digits(address: Address, sha256: str | None) -> str | None:
    wanted = (sha256 or dict(urllib.parse.parse_qsl(address.fragment)).get('sha256') or '').lower()
    if wanted and not re.fullmatch('[0-9a-f]{8,64}', wanted):
        raise WeightsError(f'{address} was not fetched: got the SHA-256 {wanted[:80]!r} for it, '
                           'expected 64 hexadecimal digits, or the first eight or more; correct it '
                           'or leave it out')
    return wanted or None


def _digits_in(name: str) -> str | None:
    found = re.search(r'-([0-9a-f]{8,64})(?:\.\w+|\.pth\.tar)$', name)
    is_date = found and re.fullmatch('(?:19|20)[0-9]{2}[01][0-9][0-3][0-9]', found[1])
    return found[1] if found and not is_date else None


def _check_kept(file: Path, asked: str | None) -> None:
    if asked and not sha256_of(file).startswith(asked):
        raise WeightsError(f'{file}, fetched earlier, has the SHA-256 {sha256_of(file)}, expected '
                           f'{asked}; remove it to fetch it again, or correct the checksum')
    if os.name == 'posix' and os.stat(file.parent).st_mode & stat.S_IWOTH:
        _log.warning('%s is taken from a folder that everybody may write to; run: chmod o-w %s',
                     file.name, file.parent)


def _fetch_alone(address: Address, final: Path, sha256: str | None) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(final, '.part')

    def progress():
        with contextlib.suppress(OSError):
            return part.lstat().st_size

    with alone(_beside(final, '.lock'), progress):
        if not os.path.isfile(final):
            _fetch(address, final, sha256)


def _beside(final: Path, suffix: str) -> Path:
    return final.with_name(final.name + suffix)


def _fetch(address: Address, final: Path, sha256: str | None) -> None:
    part, notes = _beside(final, '.part'), _beside(final, '.part.json')
    for attempt in range(_ATTEMPTS):
        try:
            expected = _receive(address, part, notes)
            break
        except Interrupted as error:
            if attempt == _ATTEMPTS - 1:
                raise WeightsError(f'{address} could not be fetched: {error}{_kept_bytes(final)}; '
                                   'try again, or download it elsewhere and give its path'
                                   ) from error
            time.sleep(0.2 * 4 ** attempt)
    digest = sha256_of(part)
    for wanted in filter(None, (sha256, expected)):
        if not digest.startswith(wanted):
            _forget(part, notes)
            raise WeightsError(f'{address} has the SHA-256 {digest}, expected {wanted}: it was '
                               'changed on the server or on its way, and is not kept; check the '
                               'address')
    try:
        check_file(part)
    except WeightsError as error:
        _forget(part, notes)
        raise WeightsError(str(error).replace(str(part), str(address))) from error
    os.replace(part, final)
    _forget(notes)


def _forget(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _kept_bytes(final: Path) -> str:
    with contextlib.suppress(OSError):
        size = _beside(final, '.part').lstat().st_size
        return f' ({size:,} bytes are kept, the next try continues there)' if size else ''
    return ''


def _of_disk(error: OSError) -> str:
    names = ' and '.join(str(x) for x in (error.filename, error.filename2) if x is not None)
    return f'{names}: {error.strerror or error}' if names else str(error.strerror or error)


# Receiving ----------------------------------------------------------------------------------------


class _Earlier(NamedTuple):
    """What an earlier try left, to be continued if the server still has the same file."""

    have: int = 0  # bytes
    tag: str | None = None
    size: int | None = None  # of the whole file
    sha256: str | None = None

    @classmethod
    def find(cls, part: Path, notes: Path) -> _Earlier:
        """Look; whatever is damaged, or not this user's, counts as nothing."""
        try:
            with open(open_own(notes, os.O_RDONLY), 'rb') as file:
                noted = json.loads(file.read(1 << 16))
            with open(open_own(part, os.O_RDONLY), 'rb') as file:
                have = os.fstat(file.fileno()).st_size
        except (OSError, ValueError, RecursionError):
            return cls()
        if not isinstance(noted, dict):
            return cls()
        tag, size, sha256 = (noted.get(name) for name in ('tag', 'size', 'sha256'))
        right = (_is_tag(tag) and (size is None or type(size) is int and size >= have) and
                 (sha256 is None or isinstance(sha256, str)
                  and re.fullmatch('[0-9a-f]{64}', sha256)))
        return cls(have, tag, size, sha256) if have and right else cls()

    def note(self, notes: Path) -> None:
        """Write down what the next try must know."""
        with open(open_new(notes), 'w') as file:
            json.dump(dict(tag=self.tag, size=self.size, sha256=self.sha256), file)


def _is_tag(tag: object) -> bool:
    """Whether it tells versions of a file apart, byte by byte, and may stand in a request."""
    return (isinstance(tag, str) and re.fullmatch('[ -~]{1,1000}', tag) is not None
            and not tag.startswith('W/'))


def _tag_of(answer: http.client.HTTPResponse) -> str | None:
    tag = answer.headers.get('ETag') or answer.headers.get('Last-Modified')
    return tag if _is_tag(tag) else None


def _receive(address: Address, part: Path, notes: Path) -> str | None:
    """Bring ``part`` to its end; returns the checksum if the server tells it."""
    earlier = _Earlier.find(part, notes)
    if earlier.have and earlier.have == earlier.size:
        return earlier.sha256  # stopped between the last byte and the checks
    headers = {'Accept-Encoding': 'identity'}
    if earlier.tag:  # and so a part of the file
        headers.update({'Range': f'bytes={earlier.have}-', 'If-Range': earlier.tag})
    answer, sha256 = ask(address, headers)
    with answer:
        try:
            have, end, size = _place(address, answer, earlier)
        except Interrupted:
            _forget(part, notes)
            raise
        _check_room(address, part, have, size)
        if not have:
            with open(open_new(part), 'wb'):  # empty first: old notes say nothing about that
                _Earlier(0, _tag_of(answer), size, sha256).note(notes)
        with open(open_own(part, os.O_WRONLY | os.O_APPEND), 'ab') as file:
            have = _copy(address, answer, file, have, end, size)
    if have > _largest():
        _forget(part, notes)
        raise _too_large(address, 'it does not end', _largest())
    if size is not None and have < size:
        raise Interrupted(f'the connection ended after {have:,} of {size:,} bytes')
    return sha256


def _place(address: Address, answer: http.client.HTTPResponse, earlier: _Earlier
           ) -> tuple[int, int | None, int | None]:
    """Say where the content of an answer begins and ends, and how large the file is.

    Raises:
        Interrupted: if it answers another question than ours.
        WeightsError: if asking again would not help.
    """
    status = answer.status
    if status == 206:
        return _place_of_part(answer, earlier)
    if status == 416:
        raise Interrupted('its server refuses to continue (416)')
    if status != 200:
        raise _refused(address, status)
    encoding = answer.headers.get('Content-Encoding', 'identity').strip().lower()
    if encoding not in ('', 'identity'):
        raise WeightsError(f'{address} was not fetched: its server sends it compressed '
                           f'(Content-Encoding {encoding[:40]!r}) although it was asked not to; '
                           'download it with a browser and give its path')
    length = _length(address, answer)
    return 0, length, length


def _place_of_part(answer: http.client.HTTPResponse, earlier: _Earlier) -> tuple[int, int, int]:
    text = answer.headers.get('Content-Range') or ''
    found = re.fullmatch(r'bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})', text.strip())
    first, last, size = map(int, found.groups()) if found else (-1, -1, -1)
    fits = (earlier.have and first == earlier.have <= last < size
            and earlier.size in (None, size) and _tag_of(answer) in (None, earlier.tag)
            and answer.headers.get('Content-Encoding', 'identity').lower() in ('', 'identity'))
    if not fits:
        wanted = f'{earlier.have}-/{earlier.size or "*"}' if earlier.have else 'the whole file'
        raise Interrupted(f'its server sent another part (Content-Range {text[:80]!r}) than was '
                          f'asked for ({wanted})')
    return first, last + 1, size


def _length(address: Address, answer: http.client.HTTPResponse) -> int | None:
    if answer.chunked:
        return None
    given = sorted({x.strip() for text in answer.headers.get_all('Content-Length') or ()
                    for x in text.split(',')})
    if not given:
        return None
    if not re.fullmatch('[0-9]{1,18}', ', '.join(given)):
        raise WeightsError(f'{address} was not fetched: its server gives the length '
                           f'{", ".join(given)[:80]!r}, expected one number of bytes; download it '
                           'elsewhere and give its path')
    return int(given[0])


def _refused(address: Address, status: int) -> Exception:
    said = f'the server answered {status} {http.client.responses.get(status, "")}'.rstrip()
    if status in (408, 429) or status >= 500:
        return Interrupted(said)
    hint = ('sign in or accept the conditions there, download it and give its path'
            if status in (401, 403) else 'check the address' if status in (404, 410) else
            'download it elsewhere and give its path')
    return WeightsError(f'{address} could not be fetched: {said}; {hint}')


def _check_room(address: Address, part: Path, have: int, size: int | None) -> None:
    largest = _largest()
    if size is not None and size > largest:
        raise _too_large(address, f'it has {size:,} bytes', largest)
    free = shutil.disk_usage(part.parent).free
    if size is not None and size - have > free:
        raise WeightsError(f'{address} was not fetched: {size - have:,} bytes are to come and '
                           f'{part.parent} has room for {free:,}; make room, or name another '
                           'folder with the environment variable TORCH_HOME')


def _largest() -> float:
    text = os.environ.get(LARGEST_VARIABLE) or _LARGEST_GB
    try:
        largest = float(text)
    except ValueError:
        largest = 0
    if not largest > 0:
        raise WeightsError(f'{LARGEST_VARIABLE} is {text!r}, expected a number of gigabytes above '
                           '0; correct or unset it')
    return largest * 1e9


def _too_large(address: Address, what: str, largest: float) -> WeightsError:
    return WeightsError(f'{address} was not fetched: {what}, and {largest / 1e9:g} GB are allowed; '
                        f'if that is right, set {LARGEST_VARIABLE} to more')


def _copy(address: Address, answer: http.client.HTTPResponse, file: BinaryIO, have: int,
          end: int | None, size: int | None) -> int:
    """Append the content to the file, up to ``end``; returns how many bytes it has then."""
    largest = _largest()
    progress = _Progress(address.name, size)
    while have <= largest and (end is None or have < end):
        block = read_some(answer, _CHUNK if end is None else min(_CHUNK, end - have))
        if not block:
            break
        file.write(block)
        have += len(block)
        progress(have)
    progress(have, last=True)
    return have


class _Progress:
    """Tells how far a download is: one changing line on a screen, few lines in a log."""

    def __init__(self, name: str, size: int | None):
        self.name, self.size = name, size
        self.screen = sys.stderr.isatty()
        self.period = 0.2 if self.screen else 15.
        self.told = time.monotonic()

    def __call__(self, have: int, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.told < self.period:
            return
        self.told = now
        total = f' of {self.size / 1e6:.1f} MB ({have / self.size:.0%})' if self.size else ' MB'
        end = '\n' if last or not self.screen else ''
        start = '\r' if self.screen else ''
        print(f'{start}{self.name}: {have / 1e6:.1f}{total}', end=end, file=sys.stderr, flush=True)
