"""Addresses of web servers: taken apart, written as servers expect them, and shown to people."""
from __future__ import annotations

import os
import re
import urllib.parse
from typing import NamedTuple

from .errors import WeightsError

__all__ = ['Address', 'is_remote', 'parse_address', 'shown']

# What RFC 3986 allows in a path, and with "?" in a query; "%" is looked at separately.
_IN_PATH = "/:@!$&'()*+,;=~%"
_LONGEST_NAME = 100  # of a file: something is put before and after it


class Address(NamedTuple):
    """An address of http or https.

    Attributes:
        url: as it is sent, without login and fragment.
        login: 'user:password' that stood before the host, or None.
        fragment: what followed '#'.
        name: its last part, as a file may be called on any system.
    """

    url: str
    login: str | None
    fragment: str
    name: str

    @property
    def origin(self) -> tuple[str, str]:
        """Protocol and host: where a login may be sent."""
        return urllib.parse.urlsplit(self.url)[:2]

    def __str__(self) -> str:
        return shown(self.url)


def parse_address(text: str) -> Address:
    """Take an address apart.

    Spaces and letters outside ASCII are percent-encoded; what is encoded already stays as it is.

    Raises:
        WeightsError: if it is none of http or https, or has no usable host and port.
    """
    try:
        parts = urllib.parse.urlsplit(text)
        host, port = _host(parts.hostname or ''), parts.port
    except ValueError as error:
        # Behind an odd host or port there may be a password with reserved characters.
        hidden = shown(re.sub('(?<=//).*@', '***@', text))
        raise WeightsError(f'got the address {hidden}, which is not valid ({error}); expected '
                           'https://host/path, with reserved characters of a user name or '
                           'password percent-encoded') from error
    if parts.scheme not in ('http', 'https'):
        raise WeightsError(f'got the address {shown(text)}, expected http:// or https://; '
                           'download it and give its path')
    netloc = host if port is None else f'{host}:{port}'
    path, query = _encoded(parts.path, _IN_PATH), _encoded(parts.query, _IN_PATH + '?')
    user, _, _ = parts.netloc.rpartition('@')
    return Address(urllib.parse.urlunsplit((parts.scheme, netloc, path, query, '')),
                   urllib.parse.unquote(user) or None, parts.fragment, _file_name(path))


def is_remote(path: str) -> bool:
    """Whether a checkpoint or data path names a server or a scheme instead of a file."""
    return '://' in str(path)


def shown(address: str) -> str:
    """Give an address for people: without login, values of the query, and odd characters.

    What is not an address, as the path of a file, stays as it is.
    """
    if '://' not in address:
        return address
    text = re.sub('(?<=//)[^/?#]*@', '***@', address)
    text = re.sub(r'\?.+', '?...', text.partition('#')[0], flags=re.DOTALL)
    text = ''.join(x if x.isprintable() else '\N{REPLACEMENT CHARACTER}' for x in text)
    return text if len(text) <= 200 else f'{text[:140]}...{text[-50:]}'


def _host(name: str) -> str:
    if ':' in name:
        return f'[{name}]'
    try:
        name = name.encode('idna').decode()
    except UnicodeError:
        name = ''
    if not re.fullmatch(r'[A-Za-z0-9_.-]*[A-Za-z0-9_][A-Za-z0-9_.-]*', name):
        raise ValueError('it has no usable host name')
    return name


def _encoded(text: str, allowed: str) -> str:
    text = re.sub('%(?![0-9A-Fa-f]{2})', '%25', text)  # a percent sign that encodes nothing
    return urllib.parse.quote(text, safe=allowed)


def _file_name(path: str) -> str:
    last = urllib.parse.unquote(os.path.basename(path))
    name = re.sub(r'[^A-Za-z0-9_.+=@-]', '_', last).lstrip('.')
    return name[-_LONGEST_NAME:].rstrip('.') or 'weights'  # its end has checksum and suffix
