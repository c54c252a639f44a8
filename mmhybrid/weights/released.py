"""The published files of weights: one row each, under a short name.

Rows are copied from the repositories' own lists.  A file that is announced but cannot be fetched
has no address and says why, so that its name still leads to an answer.
"""
from __future__ import annotations

import os
import re

from mmhybrid.families import FAMILIES, Released

from .errors import WeightsError

__all__ = ['RELEASED', 'Released', 'find_released', 'released_as']

#: All published files by short name.
RELEASED: dict[str, Released] = {
    row.name: row for family in FAMILIES.values() for row in family.released}


def find_released(name: str) -> Released | None:
    """Give the row of a short name, None if it is none.

    Raises:
        WeightsError: if the file cannot be fetched.
    """
    row = RELEASED.get(name.lower())
    if row is not None and not row.address:
        raise WeightsError(f'{row.name} has no address: {row.remark}; if you have the file'
                           f'{" " + row.file if row.file else ""}, give its path')
    return row


def released_as(source: str | os.PathLike) -> Released | None:
    """Give the row of the published file that a source names, None if it names none.

    That is its short name, its address, its repository if that has one file of weights, or a path
    or an address whose last part is the published file name, also with another suffix or behind
    '-', as downloads are kept.
    """
    text = os.fspath(source).lower()
    if text in RELEASED:
        return RELEASED[text]
    address = '://' in text
    if address:
        text = re.split('[?#]', text)[0]
    if text.startswith('hf://'):
        text = text.partition('@')[0]  # a revision
    for row in RELEASED.values():
        if row.file and re.search(rf'(\A|-){re.escape(_stem(row.file.lower()))}\Z', _stem(text)):
            return row
    if not address and 'models--' not in text:
        return None  # one's own folders may have any name; those of the hub's cache are its own
    parts = re.split('/|--', text)
    rows = [row for row in RELEASED.values() if _repository(row.address) in parts]
    return rows[0] if len(rows) == 1 else None


def _stem(path: str) -> str:
    return re.sub(r'\.(pth\.tar|pth|pt|ckpt|bin|safetensors)\Z', '', path.rpartition('/')[2])


def _repository(address: str) -> str | None:
    found = re.match(r'(?:hf://|https://huggingface\.co/)[^/]+/([^/]+)', address)
    return found[1].lower() if found else None
