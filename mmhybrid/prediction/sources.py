"""What a user points at - picture, folder, pattern, list, address, video, camera - as single items.
"""
from __future__ import annotations

import glob
import os
import os.path as osp
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmhybrid.errors import UserError

__all__ = ['PLACES', 'RESULTS', 'Frames', 'Item', 'fetched', 'find_items']

IMAGES = frozenset('.jpg .jpeg .jpe .jfif .png .bmp .dib .tif .tiff .webp .ppm .pgm .pbm .pnm .jp2 '
                   '.gif .avif .sr .ras .hdr .exr'.split())
VIDEOS = frozenset('.mp4 .avi .mov .mkv .webm .m4v .mpg .mpeg .wmv .flv .ts .mts .m2ts .3gp .ogv'
                   .split())
RESULTS = 'predictions.json'  # a folder with this file and one of the others holds results of ours
PLACES = ('pictures', 'masks', 'labels', 'labelme', 'videos')
_STREAMS = ('rtsp://', 'rtsps://', 'rtmp://', 'udp://')
_ADDRESSES = ('http://', 'https://')
_LARGEST = 2**31  # bytes of a picture or video from an address


@dataclass(frozen=True)
class Item:
    """One picture, video or camera.

    Attributes:
        path: what is opened: a path, an address, a stream, the number of a camera.
        name: how it is called in results: a relative path with its suffix.
        kind: 'image', 'video', 'camera', or 'address' for what has to be fetched first.
    """

    path: str
    name: str
    kind: str

    def __str__(self) -> str:
        return f'camera {self.path}' if self.path.isdigit() and self.kind == 'camera' else (
            _shown(self.path))


def _shown(path: str) -> str:
    if '://' not in path:
        return path
    from mmhybrid.weights.addresses import shown  # needs PyTorch, which predicting may do without

    return shown(path)


def find_items(sources: Sequence[str], results: str | os.PathLike | None = None
               ) -> tuple[list[Item], list[str]]:
    """Find what there is to look at.

    Args:
        sources: of the command line.
        results: folder that results go to, which is not looked into; None for a new one.

    Returns:
        The items in a natural order, and what was left out.

    Raises:
        UserError: if a source does not exist, or leads to nothing to look at.
    """
    items, files, notes = [], [], []
    for source in sources:
        if not source.strip():
            raise UserError('SOURCE is empty. Expected a picture, a folder, a pattern, a list, an '
                            'address, a video or the number of a camera. (Is a variable of the '
                            'shell not set?)')
        path = osp.expanduser(source)
        if osp.isdir(path):
            items += _in_folder(path, results, notes)
        elif osp.lexists(path):
            found = _listed(path) if path.lower().endswith(('.txt', '.lst')) else [path]
            files += found
        elif _special(source):
            items.append(_special(source))
        elif glob.has_magic(path):
            found = sorted((each for each in glob.glob(path, recursive=True) if osp.isfile(each)
                            and _kind(each)), key=_natural)
            if not found:
                raise UserError(f'The pattern {source} fits no picture and no video.')
            files += found
        else:
            raise UserError(f'There is no {source}: no file, no folder, no pattern with *, no '
                            'address and no number of a camera.')
    return items + _named(files), notes


def _special(source: str) -> Item | None:
    """A camera, a stream or an address."""
    if source.isdecimal():
        return Item(source, f'camera{source}', 'camera')
    if source.lower().startswith(_STREAMS):
        return Item(source, 'stream', 'camera')
    if source.lower().startswith(_ADDRESSES):
        from mmhybrid.weights import WeightsError
        from mmhybrid.weights.addresses import parse_address

        try:
            return Item(source, parse_address(source).name, 'address')
        except WeightsError as error:
            raise UserError(str(error)) from error
    return None


def _kind(path: str) -> str | None:
    suffix = osp.splitext(path)[1].lower()
    return 'image' if suffix in IMAGES else 'video' if suffix in VIDEOS else None


def _natural(path: str) -> list:
    """Sorts image2 before image10."""
    parts, digits = [''], False
    for sign in path:
        if sign.isdecimal() != digits:
            parts.append('')
            digits = not digits
        parts[-1] += sign
    return [(int(part), part) if place % 2 else (0, part) for place, part in enumerate(parts)]


def _in_folder(folder: str, results: str | os.PathLike | None, notes: list[str]) -> list[Item]:
    others, items, seen, failed = [], [], set(), []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=failed.append):
        real = osp.realpath(place)
        skip = real in seen or results is not None and real == osp.realpath(results)
        if not skip and RESULTS in names and set(PLACES) & set(folders):
            notes.append(f'{place} holds predictions and is left out')
            skip = True
        if skip:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted((each for each in folders if not each.startswith('.')), key=_natural)
        for name in sorted(names, key=_natural):
            path = osp.join(place, name)
            if name.startswith('.'):
                continue
            if _kind(name):
                items.append(Item(path, Path(osp.relpath(path, folder)).as_posix(), _kind(name)))
            else:
                others.append(osp.relpath(path, folder))
    for error in failed:
        notes.append(f'{error.filename} cannot be looked into: {error.strerror}')
    listed = f'{", ".join(others[:3])}{", ..." if len(others) > 3 else ""}'
    if not items:
        there = f' It holds other files: {listed}.' if others else ' It is empty.'
        more = ''.join(f' {each}.' for each in notes)
        raise UserError(f'The folder {folder} holds no picture and no video.{there}{more}')
    if others:
        notes.append(f'left out of {folder}, by their suffix no pictures or videos '
                     f'({len(others)}): {listed}')
    return items


def _listed(path: str) -> list[str]:
    """Lines of a list; a relative path starts where the list is, or where the command runs."""
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f'The list {path} is not a text file in UTF-8: byte {error.start} is '
                        f'0x{error.object[error.start]:02x}.') from error
    except OSError as error:
        raise UserError(f'The list {path} cannot be read: {error.strerror}.') from error
    found = []
    for line in filter(None, map(str.strip, lines)):
        beside = osp.join(osp.dirname(path), line)
        found.append(beside if osp.lexists(beside) and '://' not in line else line)
    if not found:
        raise UserError(f'The list {path} is empty; expected a path or an address in each line.')
    return found


def _named(files: Sequence[str]) -> list[Item]:
    """Files with names relative to the folder that holds them all."""
    local = [each for each in files if not (_special(each) and not osp.lexists(each))]
    try:
        root = osp.commonpath([osp.dirname(osp.abspath(each)) for each in local]) if local else ''
    except ValueError:  # drives of Windows
        root = ''
    items = []
    for each in files:
        if each not in local:
            items.append(_special(each))
            continue
        name = Path(osp.relpath(osp.abspath(each), root)).as_posix() if root else osp.basename(each)
        items.append(Item(each, name, _kind(each) or 'image'))
    return items


# --- addresses ------------------------------------------------------------------------------------

def fetched(item: Item, folder: str) -> Item:
    """Bring what an address holds into a folder.

    Raises:
        UserError: if that is not possible; the message names the address.
    """
    from mmhybrid.weights import WeightsError
    from mmhybrid.weights.addresses import parse_address
    from mmhybrid.weights.transfer import Interrupted, ask

    try:
        answer, _ = ask(parse_address(item.path), {'Accept-Encoding': 'identity'})
        with answer:
            if answer.status != 200:
                raise UserError(f'{item} could not be fetched: the server answered '
                                f'{answer.status} {answer.reason}. Check the address.')
            type_of = (answer.headers.get_content_type() or '').partition('/')[0]
            handle, path = tempfile.mkstemp(suffix=osp.splitext(item.name)[1], dir=folder)
            with open(handle, 'wb') as file:
                _receive(answer, file, item)
    except Interrupted as error:
        raise UserError(f'{item} could not be fetched: {error}. Try again.') from error
    except WeightsError as error:
        raise UserError(f'{error}.') from error
    kind = 'video' if type_of == 'video' else _kind(item.name) or 'image'
    return replace(item, path=path, kind=kind)


def _receive(answer, file, item: Item) -> None:
    from mmhybrid.weights.transfer import read_some

    have, length = 0, answer.headers.get('Content-Length', '')
    while block := read_some(answer, 1 << 18):
        have += file.write(block)
        if have > _LARGEST:
            raise UserError(f'{item} has more than {_LARGEST / 1e9:.1f} GB. Download it and give '
                            'its path.')
    if length.isdecimal() and have < int(length):
        raise UserError(f'{item} could not be fetched: the connection ended after {have:,} of '
                        f'{int(length):,} bytes. Try again.')


# --- videos and cameras ---------------------------------------------------------------------------

class Frames:
    """Pictures of a video, a stream or a camera, one after another.

    Args:
        item: of kind 'video' or 'camera'.

    Attributes:
        rate: pictures per second, 25 where nothing tells.
        count: how many there are, or None where nothing tells.
        read: how many have been read so far.

    Raises:
        UserError: if it cannot be opened.
    """

    def __init__(self, item: Item):
        import cv2
        self.item, self.read = item, 0
        self.video = cv2.VideoCapture(int(item.path) if item.path.isdecimal() else item.path)
        if not self.video.isOpened():
            what = ('Is it plugged in, and used by no other program?' if item.kind == 'camera' else
                    'The file is damaged, no video, or in a form that OpenCV does not know.')
            raise UserError(f'{item} cannot be opened. {what}')
        rate = self.video.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= 1000 else 25.
        count = self.video.get(cv2.CAP_PROP_FRAME_COUNT)
        self.count = int(count) if item.kind == 'video' and 0 < count < 2**31 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield arrays (H, W, 3) BGR."""
        while True:
            good, image = self.video.read()
            if not good:
                return
            self.read += 1
            yield image

    def problem(self) -> str | None:
        """What is wrong with the end that was reached; None if nothing is."""
        if not self.read:
            return f'{self.item} holds no picture that can be read'
        if self.count is not None and self.read < self.count - 1:  # the count of some is one off
            return (f'{self.item} ends after {self.read} of {self.count} pictures; it is cut off '
                    'or damaged')
        return None

    def close(self) -> None:
        """Let go of the file or the camera."""
        self.video.release()
