"""Files from web servers: complete and checked under their name, or not there at all."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from .errors import WeightsError
from .reading import check_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['cache_folder', 'download', 'sha256_of']

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_ATTEMPTS = 4


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

    What arrives is written beside the final name and moved there when it is complete, is no web
    page, and has the checksum that is known: from the argument, from a fragment ``#sha256=...``
    of the address, from a file name such as ``resnet50-0676ba61.pth``, or from the server.  An
    interrupted download continues where it stopped, if the server still has the same file.
    Processes on one machine wait for each other.

    Args:
        url: address beginning with http:// or https://.
        sha256: expected checksum, or its first digits.
        folder: where files are kept; see :func:`cache_folder`.

    Returns:
        Path of the complete file.

    Raises:
        WeightsError: if it cannot be fetched, or is not what was expected.
    """
    url, _, fragment = url.partition('#')
    name = urllib.parse.unquote(os.path.basename(urllib.parse.urlsplit(url).path)) or 'weights'
    in_name = re.search(r'-([0-9a-f]{8,64})\.\w+$', name)
    sha256 = (sha256 or dict(urllib.parse.parse_qsl(fragment)).get('sha256')
              or (in_name[1] if in_name else None))
    folder = Path(folder or cache_folder())
    # Many models are called model.safetensors, so the address is part of the name.
    final = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}'
    if final.is_file():
        return final
    shared = folder / name
    if in_name and shared.is_file() and sha256_of(shared).startswith(in_name[1]):
        return shared  # fetched earlier by torch.hub or by hand
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(final.with_name(final.name + '.lock')):
        if not final.is_file():
            _fetch(url, final, sha256)
    return final


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the system releases the lock of one that dies."""
    with open(path, 'w') as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # the empty file stays: a process may wait for it


def _fetch(url: str, final: Path, sha256: str | None) -> None:
    part = final.with_name(final.name + '.part')
    known = final.with_name(final.name + '.part.json')
    for attempt in range(_ATTEMPTS):
        try:
            expected = _receive(url, part, known)
            break
        except (urllib.error.HTTPError, urllib.error.URLError, OSError, EOFError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or attempt == _ATTEMPTS - 1:
                raise _unreachable(url, error, part) from error
            time.sleep(0.2 * 4 ** attempt)
    digest = sha256_of(part)
    for wanted in filter(None, (sha256, expected)):
        if not digest.startswith(wanted.lower()):
            _forget(part, known)
            raise WeightsError(f'{url} has the SHA-256 {digest}, expected {wanted}: it was changed '
                               'on the server or on its way, and is not kept; check the address')
    try:
        check_file(part)
    except WeightsError as error:
        _forget(part, known)
        raise WeightsError(str(error).replace(str(part), url)) from error
    os.replace(part, final)
    _forget(known)


def _forget(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _unreachable(url: str, error: Exception, part: Path) -> WeightsError:
    code = getattr(error, 'code', None)
    reason = f'the server answered {code} {error.reason}' if code else (
        getattr(error, 'reason', None) or error)
    hint = 'check the address' if code in (404, 410) else (
        'sign in or accept the conditions there, download it and give its path'
        if code in (401, 403) else
        'try again, or download it elsewhere and give its path')
    if part.is_file() and part.stat().st_size:
        hint += f' ({part.stat().st_size:,} bytes are kept, the next try continues there)'
    return WeightsError(f'{url} could not be fetched: {reason}; {hint}')


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections and remembers what they say about the file."""

    def __init__(self):
        self.sha256 = None

    def redirect_request(self, request, file, code, message, headers, newurl):
        # Hugging Face names the checksum of large files on the way to them.
        tag = (headers.get('X-Linked-ETag') or '').strip('"')
        self.sha256 = tag if re.fullmatch('[0-9a-f]{64}', tag) else self.sha256
        return super().redirect_request(request, file, code, message, headers, newurl)


def _receive(url: str, part: Path, known: Path) -> str | None:
    """Bring ``part`` to its end; returns the checksum if the server tells it."""
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    request = urllib.request.Request(url, headers={'User-Agent': 'mmhybrid'})
    have = part.stat().st_size if part.is_file() else 0
    before = json.loads(known.read_text()) if have and known.is_file() else {}
    if have and before.get('tag'):
        request.add_header('Range', f'bytes={have}-')
        request.add_header('If-Range', before['tag'])
    else:
        have = 0
    try:
        answer = opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have == before.get('size'):
            return before.get('sha256')
        if error.code == 416:
            _forget(part, known)
        raise
    with answer:
        resumed = answer.status == 206
        if not resumed:
            have = 0
        length = answer.headers.get('Content-Length')
        size = have + int(length) if length else None
        tag = answer.headers.get('ETag') or answer.headers.get('Last-Modified')
        if tag and tag.startswith('W/'):
            tag = None  # says nothing about single bytes
        known.write_text(json.dumps(dict(tag=tag, size=size, sha256=redirects.sha256)))
        with open(part, 'ab' if resumed else 'wb') as file:
            progress = _Progress(os.path.basename(urllib.parse.urlsplit(url).path), size)
            while block := answer.read(_CHUNK):
                file.write(block)
                have += len(block)
                progress(have)
            progress(have, last=True)
    if size is not None and have < size:
        raise EOFError(f'the connection ended after {have:,} of {size:,} bytes')
    return redirects.sha256


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
