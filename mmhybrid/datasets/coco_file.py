"""Reading annotation files of COCO's form. What cannot be read as one says what it is instead."""
from __future__ import annotations

import gc
import json
import os
import os.path as osp
import re
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np

__all__ = ['AnnotationError', 'in_json', 'read_coco']

LARGE = 64 * 2**20  # bytes; a file above it takes seconds
LISTS = ('images', 'annotations', 'categories')
EXPECTED = 'Expected a JSON file of COCO\'s form: {"images": [...], "annotations": [...], ' \
    '"categories": [...]}. Export the annotations in this format, or convert them'
STARTS = (
    (b'version https://git-lfs', 'a Git LFS pointer, not the file itself. Run git lfs pull'),
    (b'PK\x03\x04', 'a zip archive. Unpack it, and name the JSON file in it'),
    (b'\x1f\x8b', 'a gzip archive. Unpack it with gunzip'),
    (b'BZh', 'a bzip2 archive. Unpack it with bunzip2'),
    (b'\xfd7zXZ', 'an xz archive. Unpack it with unxz'),
    (b'\x89PNG', f'a PNG picture. {EXPECTED}'),
    (b'\xff\xd8\xff', f'a JPEG picture. {EXPECTED}'),
    (b'\x80\x04', f'a pickle of Python. {EXPECTED}'),
)
# What files begin with that are text, but no JSON.
TEXTS = (
    (r'<!doctype html|<html', 'a web page, perhaps an error or a login in place of the download'),
    (r'(<\?xml[^>]*>\s*)?<annotation\b', 'an XML file of Pascal VOC (one image)'),
    (r'<', 'an XML file'),
    (r'(#.*\s+|---\s+)*(path|train|val|test|nc|names|roboflow)\s*:',
     "a YAML file, as YOLO's data.yaml"),
    (r'\d+([ \t]+-?\d*\.?\d+(e-?\d+)?){4,}\s*(\n|$)', 'a label file of YOLO (one image)'),
    (r'[^\[{\n,;\t]*([,;\t][^\[{\n,;\t]*){2,}(\n|$)', 'a table (CSV)'),
)


class AnnotationError(ValueError):
    """An annotation file cannot be read; the text names the file and finishes the sentence."""


def read_coco(path: str | os.PathLike, tell: Callable[[str], None] | None = None) -> dict:
    """Read an annotation file of COCO's form, in UTF-8 with or without a byte order mark.

    Args:
        path: the file.
        tell: called with one line before a large file is read.

    Returns:
        The file's object. ``images`` and ``categories`` are lists, and ``annotations`` is one if
        it is there. What these lists hold is not looked at.

    Raises:
        AnnotationError: if it is no such file.
    """
    path = os.fspath(path)
    text = _decode(path, _bytes(path, tell))
    content = _parse(path, text)
    _check_kind(path, content)
    # A key that is there twice, as in files put together by hand: the first list would be lost.
    if any(text.count(f'"{key}"') > 1 for key in LISTS):
        json.loads(text, object_pairs_hook=lambda pairs: _once(path, pairs))
    return content


def in_json(value, most: int = 40) -> str:
    """A value as the file spells it, cut to ``most`` characters."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**most:
        return f'a whole number of more than {most} digits'
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # a number within is too long to be written
        text = f'a {type(value).__name__}'
    except RecursionError:
        text = 'deeply nested'
    text = text.encode('utf-8', 'backslashreplace').decode()
    return text if len(text) <= most else text[:most - 3] + '...'


def _bytes(path: str, tell) -> bytes:
    try:
        if not osp.isfile(path):
            raise AnnotationError(f'{path} is not a file' if osp.exists(path)
                                  else f'{path} does not exist')
        size = osp.getsize(path)
        if tell is not None and size > LARGE:
            tell(f'reading {path} ({size / 2**20:.0f} MB) ...')
        with open(path, 'rb') as file:
            data = file.read()
    except OSError as error:
        raise AnnotationError(f'{path} cannot be read: {error.strerror}') from error
    if not data.strip(b'\0 \t\r\n'):
        what = f'holds nothing but blanks or zero bytes ({size} bytes)' if data else 'is empty'
        raise AnnotationError(f'{path} {what}: writing or fetching it was not finished. {EXPECTED}')
    for start, what in STARTS:
        if data.startswith(start):
            raise AnnotationError(f'{path} is {what}')
    return data


def _decode(path: str, data: bytes) -> str:
    encoding = json.detect_encoding(data[:4])
    if not encoding.startswith('utf-8'):
        name = encoding[:6].upper()  # without the order of its bytes
        raise AnnotationError(f'{path} is encoded in {name}; expected UTF-8. Convert it: iconv -f '
                              f'{name} -t UTF-8 OLD > NEW')
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise AnnotationError(
            f'{path} is not UTF-8: byte {data[error.start]:#04x} at position {error.start}, after '
            f'{data[max(0, error.start - 20):error.start].decode("utf-8", "replace")!r}. If it was '
            'written in another encoding (Windows-1252 or Latin-1 are usual), convert it: iconv -f '
            'WINDOWS-1252 -t UTF-8 OLD > NEW. Otherwise it is damaged') from error


@contextmanager
def _uncollected():
    """Python's search for cycles visits a growing tree again and again, and finds none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(path: str, text: str):
    try:
        with _uncollected():
            return json.loads(text)
    except json.JSONDecodeError as error:
        raise AnnotationError(_not_json(path, text, error)) from None
    except RecursionError:
        raise AnnotationError(f'{path} nests lists or objects too deeply, in {_deepest(text)}; '
                              "COCO's form has about five levels. Correct it") from None
    except ValueError:
        long = max(re.finditer(r'\d+', text), key=lambda digits: len(digits[0]))
        raise AnnotationError(f'{path} has a number of {len(long[0])} digits, in '
                              f'{_place(text, long.start())}. Correct it') from None


def _not_json(path: str, text: str, error: json.JSONDecodeError) -> str:
    for form, what in TEXTS:
        if re.match(r'\s*' + form, text[:4096], re.IGNORECASE):
            return f'{path} is {what}, not JSON. {EXPECTED}'
    place = _place(text, error.pos)
    if error.msg == 'Extra data':
        return (f'{path} is not valid JSON: it goes on after its end, in {place}, as JSON Lines or '
                f'files written one after the other do. {EXPECTED}')
    if not text[error.pos:].strip() or text.rstrip()[-1:] not in ('}', ']'):
        return (f'{path} is not valid JSON: it ends early, in {_place(text, len(text))} '
                f'({error.msg}). Writing or fetching it was cut short; do it again')
    near = text[max(0, error.pos - 20):error.pos + 20]
    return f'{path} is not valid JSON: {error.msg} in {place}, near {near!r}. Correct it'


def _place(text: str, position: int) -> str:
    start = text.rfind('\n', 0, position)
    return f'line {text.count(chr(10), 0, position) + 1}, column {position - start}'


def _deepest(text: str) -> str:
    letters = np.frombuffer(text.encode('utf-32-le', 'replace'), np.uint32)
    depth = np.cumsum(np.isin(letters, (0x5B, 0x7B)).astype(int) - np.isin(letters, (0x5D, 0x7D)))
    return _place(text, int(depth.argmax()))


def _once(path: str, pairs: list) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        raise AnnotationError(f'{path} has the key {in_json(key)} {keys.count(key)} times in one '
                              'object, and only the last would count. Put them together')
    return content


def _check_kind(path: str, content) -> None:
    kind = _other_kind(content)
    if kind is not None:
        raise AnnotationError(f'{path} is {kind}. {EXPECTED}')
    for key in LISTS:
        if not isinstance(content.get(key), list) and (key != 'annotations' or key in content):
            found = f'is {in_json(content[key])}' if key in content else 'is missing'
            keys = ', '.join(map(str, list(content)[:8])) or 'nothing'
            raise AnnotationError(f'{path}: "{key}" {found}; expected a list (the file has {keys}'
                                  f'{", ..." if len(content) > 8 else ""}). {EXPECTED}')


def _other_kind(content) -> str | None:
    """What a JSON file is that has not COCO's lists; None if it has, or is nothing known."""
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        if {'image_id', 'category_id', 'score'} <= set(first):
            return 'a list of results (detections with scores), not the annotations they belong to'
        if 'annotations' in first and ('data' in first or 'file_upload' in first):
            return "Label Studio's own JSON"
        return f'a list of {len(content)} items'
    if not isinstance(content, dict):
        return f'just {in_json(content)}'
    if any(key in content for key in LISTS[::2]):
        parts = content.get('annotations')
        first = parts[0] if isinstance(parts, list) and parts else None
        if isinstance(first, dict) and 'segments_info' in first:
            return 'a panoptic annotation file, for CocoPanopticDataset'
        if isinstance(first, dict) and 'caption' in first and 'category_id' not in first:
            return 'a file of captions'
        return None
    if isinstance(content.get('shapes'), list):
        return "LabelMe's JSON of one image"
    if 'data_list' in content:
        return "a file of OpenMMLab's own form (metainfo and data_list), for BaseDetDataset"
    if content.get('type') == 'FeatureCollection':
        return 'a GeoJSON file'
    records = content.get('_via_img_metadata', content)
    if '_via_settings' in content or isinstance(records, dict) and any(
            isinstance(record, dict) and 'regions' in record for record in records.values()):
        return "VIA's own JSON (VGG Image Annotator; it also exports COCO)"
    return None
