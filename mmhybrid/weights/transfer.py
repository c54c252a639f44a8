"""One answer of a web server, with limits to what a server may do to its client."""
from __future__ import annotations

import base64
import http.client
import io
import re
import string
import time
import urllib.error
import urllib.parse
import urllib.request

from .addresses import Address, parse_address, shown
from .errors import WeightsError

__all__ = ['Interrupted', 'ask', 'read_some']

_TIMEOUT = 60.  # seconds without a byte
_WINDOW = 60.  # seconds in which at least ...
_SLOWEST = 1000  # ... this many bytes per second must come
_HEAD = 1 << 20  # bytes that may come without any content: status, headers, trailers
_REDIRECTIONS = 10
_REASONS = (
    (http.client.RemoteDisconnected, 'the server closed the connection without an answer'),
    (http.client.IncompleteRead, 'the connection ended in the middle'),
    (http.client.LineTooLong, 'its answer has an endless line'),
    (http.client.BadStatusLine, 'what answers there does not speak HTTP'),
    (http.client.UnknownProtocol, 'what answers there does not speak HTTP 1'),
    (http.client.InvalidURL, 'its host, or that of the proxy, is not valid'),
)


class Interrupted(Exception):
    """What another try may mend; the message says what happened, as part of a sentence."""


def ask(address: Address, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, str | None]:
    """Ask for a file, and follow redirections.

    Args:
        address: where it is.
        headers: what to say in the request.

    Returns:
        The answer, whatever its status, to be closed; and the SHA-256 of the file if a server on
        the way told it, as Hugging Face does for large files.

    Raises:
        Interrupted: if no answer came.
        WeightsError: if the redirections lead nowhere or where we do not follow.
    """
    sha256, here, login = None, address, address.login
    for _ in range(_REDIRECTIONS + 1):
        answer = _open(here, headers, login if here.origin == address.origin else None)
        if answer.status not in (301, 302, 303, 307, 308):
            return answer, sha256
        with answer:
            tag = (answer.headers.get('X-Linked-ETag') or '').strip('"')
            sha256 = tag if re.fullmatch('[0-9a-f]{64}', tag) else sha256
            here = _next(address, here, answer.headers.get('Location'))
    raise WeightsError(f'{address} was not fetched: it redirects more than {_REDIRECTIONS} times; '
                       'check the address')


def _next(address: Address, here: Address, location: str | None) -> Address:
    if not location:
        raise WeightsError(f'{address} was not fetched: its server redirects without saying '
                           'where; check the address')
    location = urllib.parse.quote(location, safe=string.punctuation, encoding='latin1')
    try:
        target = parse_address(urllib.parse.urljoin(here.url, location))
    except ValueError as error:  # ours, or what urljoin says about brackets
        raise WeightsError(f'{address} was not fetched: it redirects to {shown(location)}, and '
                           'only valid addresses of http and https are followed; check the '
                           'address') from error
    if here.origin[0] == 'https' and target.origin[0] == 'http':
        raise WeightsError(f'{address} was not fetched: it redirects from https to {target}, '
                           'where anybody on the way could change it; check the address')
    return target


def _open(address: Address, headers: dict[str, str], login: str | None) -> http.client.HTTPResponse:
    request = urllib.request.Request(address.url, headers={'User-Agent': 'mmhybrid', **headers})
    if login:
        encoded = base64.b64encode(login.encode()).decode()
        request.add_unredirected_header('Authorization', f'Basic {encoded}')
    try:
        # Only these: no files, no ftp, no redirections of its own, and no errors for a status.
        opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler, _Http, _Https, urllib.request.UnknownHandler):
            opener.add_handler(handler())
        return opener.open(request, timeout=_TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        through = '' if request.host == address.origin[1] else f' (by the proxy {request.host!r})'
        raise Interrupted(_reason(error) + through) from error
    except ValueError as error:
        raise WeightsError(f'{address} was not fetched: the settings of the proxy (http_proxy, '
                           'https_proxy) are not valid; correct or unset them') from error


def read_some(answer: http.client.HTTPResponse, most: int) -> bytes:
    """Read what has come of an answer's content; nothing at its end.

    Raises:
        Interrupted: if the connection broke, or brings next to nothing.
    """
    try:
        return answer.read1(most)
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(_reason(error)) from error


def _reason(error: Exception) -> str:
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    if isinstance(error, http.client.HTTPException):
        return f'its answer is not valid HTTP ({_plain(error)})'
    return _plain(getattr(error, 'reason', None) or error)


def _plain(error: object) -> str:
    return ' '.join(str(error).split())[:200] or type(error).__name__


class _Paced(io.RawIOBase):
    """The bytes of a connection under a clock, which starts with the first of them."""

    def __init__(self, raw: io.RawIOBase):
        self.raw, self.left = raw, _HEAD
        self.since, self.came = None, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.raw.readinto(buffer)
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        self.came += count
        self.left -= count
        if self.left < 0:
            raise http.client.HTTPException(f'{_HEAD:,} bytes without content')
        if now - self.since >= _WINDOW:
            if self.came < _WINDOW * _SLOWEST:
                raise TimeoutError(f'only {self.came:,} bytes came in {now - self.since:.0f} s')
            self.since, self.came = now, 0
        return count

    def close(self):
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.paced = _Paced(self.fp.detach())
        self.fp = io.BufferedReader(self.paced)

    def read1(self, n=-1):
        self.paced.left = _HEAD + n
        return super().read1(n)


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_Connection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_SecureConnection, request)
