"""What all readers share: the one form, files found by the names that exports give, questions."""
from __future__ import annotations

import os.path as osp
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from ..label_images import IMAGES, UNREADABLE, list_files

__all__ = ['MARKER', 'Export', 'ExportError', 'Files', 'Left', 'Picture', 'Questions', 'Thing',
           'fitting_size', 'image_size', 'lines_of', 'listed_splits', 'outline_box', 'split_in',
           'split_of']

MARKER = 'mmhybrid_init.json'  # in every folder that `mmhybrid init` wrote
_SPLITS = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
           'dev': 'val', 'test': 'test', 'testing': 'test'}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 274
# Label Studio puts eight hexadecimal digits before the name of what was uploaded.
_PREFIX = re.compile(r'^[0-9a-f]{8}-')


class ExportError(ValueError):
    """An export cannot be read, or not without an answer; the text says what to do."""


@dataclass
class Thing:
    """One annotated object.

    Attributes:
        label: name of its class.
        box: x, y, width, height in pixels.
        outlines: polygons x0, y0, x1, y1, ... in pixels, or run lengths as COCO stores them; None
            where there is only a box.
        crowd: neither learned nor scored, as COCO's crowds and VOC's difficult objects.
    """

    label: str
    box: Sequence[float]
    outlines: list[list[float]] | dict | None = None
    crowd: bool = False


@dataclass
class Picture:
    """One image and its annotations.

    Attributes:
        name: path below the data folder, with '/'.
        size: width and height as it is shown, turned as EXIF says.
        split: 'train', 'val', 'test' as the export says; None if it does not.
        things: its objects.
        labels: name of its label image, None if there is none.
        pixels: value of the label image -> number of pixels.
    """

    name: str
    size: tuple[int, int]
    split: str | None = None
    things: list[Thing] = field(default_factory=list)
    labels: str | None = None
    pixels: dict = field(default_factory=dict)


@dataclass
class Export:
    """A whole export.

    Attributes:
        form: 'coco', 'yolo', 'voc', 'labelme' or 'masks'.
        root: the data folder.
        classes: names in the order of the export.
        pictures: sorted by name.
        numbers: value of a label image (grey, or red, green, blue) -> class number.
        notes: sentences on what was left out or taken for something else.
    """

    form: str
    root: str
    classes: list[str]
    pictures: list[Picture]
    numbers: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Questions:
    """What an export leaves open: an option answers, or a person, or --yes, or nobody.

    Attributes:
        given: answers by name of the option, without '--'.
        yes: take the suggestion.
        ask: shows a text and returns what a person types; None where nobody can be asked.
        told: what was decided and not said by an option.
    """

    given: dict[str, str | None] = field(default_factory=dict)
    yes: bool = False
    ask: Callable[[str], str] | None = None
    told: list[str] = field(default_factory=list)

    def choose(self, option: str, text: str, choices: Sequence[str] | None,
               suggestion: str | None = None) -> str:
        """Give the answer.

        Args:
            option: that answers the question.
            text: sentences that end before the choices.
            choices: what can be answered; None takes any text.
            suggestion: what --yes takes; None where there is none.

        Raises:
            ExportError: if nobody answers, or with something else.
        """
        answer = self.given.get(option)
        listed = '' if choices is None else f' ({", ".join(choices)})'
        if answer is None and self.yes and suggestion is not None:
            self.told.append(f'{text} Taken, as --yes says: --{option} {suggestion}')
            return suggestion
        if answer is None and self.ask is not None:
            default = '' if suggestion is None else f' [{suggestion}]'
            answer = self.ask(f'{text}\n--{option}{listed}{default}: ').strip() or suggestion
            self.told.append(f'{text} Answered: --{option} {answer}')
        if answer is None:
            hint = (f'--{option} with one of {", ".join(choices)}' if choices else f'--{option}')
            yes = '' if suggestion is None else f', or --yes for {suggestion}'
            raise ExportError(f'{text} Give {hint}{yes}.')
        if choices is not None and answer not in choices:
            raise ExportError(f'{text} --{option} is {answer!r}; expected one of '
                              f'{", ".join(choices)}.')
        return answer


class Left:
    """Counts what is left out, with the reason and an example for each."""

    def __init__(self):
        self.reasons: dict[str, list] = {}

    def add(self, reason: str, where: str) -> None:
        """One more of a kind."""
        entry = self.reasons.setdefault(reason, [0, where])
        entry[0] += 1

    def notes(self) -> list[str]:
        """One sentence for each reason."""
        return [f'{count} x {reason}, for example {where}'
                for reason, (count, where) in self.reasons.items()]


class Files:
    """The files below a folder, apart from hidden ones and from what `mmhybrid init` wrote.

    Attributes:
        root: the folder.
        names: all files, relative and with '/'.
        images: those that are pictures by their suffix.
    """

    def __init__(self, root: str):
        listing = list_files(root)
        if listing.loops:
            raise ExportError(f'{osp.join(root, listing.loops[0])} is a link to a folder that it '
                              'lies in. Remove the link.')
        names = [name.replace('\\', '/') if osp.sep == '\\' else name for name in listing.names]
        ours = tuple(name[:-len(MARKER)] for name in names if osp.basename(name) == MARKER)
        if '' in ours:
            raise ExportError(f'{root} was written by mmhybrid init. Give the folder of the data.')
        odd = next((name for name in names if not _is_plain(name)), None)
        if odd is not None:
            raise ExportError(f'{root} has a file whose name holds a line break or is not UTF-8: '
                              f'{odd!r}. Rename it.')
        self.root = root
        self.names = [name for name in names if not name.startswith(ours)
                      and '__MACOSX/' not in name and not re.search(r'(^|/)\.', name)]
        self.images = [name for name in self.names if name.lower().endswith(IMAGES)]
        self._by_base: dict[str, list[str]] = {}
        self._bare: dict[str, list[str]] = {}
        for name in self.images:
            base = _key(osp.basename(name))
            self._by_base.setdefault(base, []).append(name)
            if _PREFIX.match(base):
                self._bare.setdefault(_PREFIX.sub('', base), []).append(name)

    def path(self, name: str) -> str:
        """Where a file is."""
        return osp.join(self.root, name)

    def ending(self, *suffixes: str) -> list[str]:
        """Files with one of these suffixes, in lower case."""
        return [name for name in self.names if name.lower().endswith(suffixes)]

    def find(self, reference: str, beside: str) -> str | None:
        """The picture that an annotation means, by however much of its path exists here.

        Args:
            reference: as the export has it: a path of another machine, quoted, with a prefix that
                the tool put before the name.
            beside: name of the annotation file; of equals the one nearest to it counts.

        Returns:
            Its name; None if there is none.

        Raises:
            ExportError: if several fit equally well.
        """
        text = urllib.parse.unquote(reference.replace('\\', '/'))
        text = re.split(r'[?&]d=', text)[-1]  # Label Studio: /data/local-files/?d=path
        base = _key(osp.basename(text))
        found = (self._by_base.get(base) or self._by_base.get(_PREFIX.sub('', base))
                 or self._bare.get(base))
        if not found:
            return None
        wanted = [part for part in _key(text).split('/') if part not in ('', '.', '..')]
        folder = osp.dirname(beside)
        ranked = sorted(((_common_end(wanted, name), _common_start(folder, name), name)
                         for name in found), reverse=True)
        if len(ranked) > 1 and ranked[0][:2] == ranked[1][:2]:
            raise ExportError(
                f'{self.path(beside)} names the picture {reference!r}, which could be '
                f'{ranked[0][2]} or {ranked[1][2]}. Rename one of them, or give a folder that '
                'holds one of them.')
        return ranked[0][2]


def _is_plain(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return '\n' not in name and '\r' not in name


def _key(text: str) -> str:
    """For comparing names: systems differ in case, and in how they spell accents."""
    return unicodedata.normalize('NFC', text).lower()


def _common_end(wanted: list[str], name: str) -> int:
    count = 0
    for left, right in zip(reversed(wanted), reversed(_key(name).split('/')), strict=False):
        if left != right:
            break
        count += 1
    return count


def _common_start(folder: str, name: str) -> int:
    return len(osp.commonprefix([folder.split('/') if folder else [], name.split('/')[:-1]]))


def split_of(name: str) -> str | None:
    """The part of a data set that the folders of a path tell: 'train', 'val', 'test' or None."""
    for folder in reversed(name.lower().split('/')[:-1]):
        found = re.fullmatch(rf'(?:images|labels|img|data)?[_-]?({"|".join(_SPLITS)})[_-]?'
                             r'(?:\d{4}|images|imgs|set|data)?', folder)
        if found:
            return _SPLITS[found[1]]
    return None


def split_in(name: str) -> str | None:
    """The same from the words in the name of an annotation file, such as instances_val2017.json."""
    for word in reversed(re.split(r'[^a-z]+', osp.splitext(osp.basename(name))[0].lower())):
        if word in _SPLITS:
            return _SPLITS[word]
    return split_of(name)


def listed_splits(files: Files) -> dict[str, str]:
    """Stem of an image -> split, as ImageSets/Main/train.txt and the like have it (VOC, CVAT)."""
    found = {}
    for name in files.ending('.txt'):
        stem = osp.splitext(osp.basename(name))[0].lower()
        if re.search(r'(^|/)ImageSets/(Main/|Segmentation/)?[^/]+$', name) and stem in _SPLITS:
            for line in lines_of(files.path(name)):
                found[osp.basename(line.split()[0])] = _SPLITS[stem]
    return found


def lines_of(path: str) -> list[str]:
    """Lines of a text file that are not blank, without the blanks around them.

    Raises:
        ExportError: if it is not text in UTF-8.
    """
    try:
        with open(path, encoding='utf-8-sig') as file:
            return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise ExportError(f'{path} is not text in UTF-8: byte {error.start} is '
                          f'{error.object[error.start]:#04x}. Convert it, for example: iconv -f '
                          'WINDOWS-1252 -t UTF-8 OLD > NEW.') from error


def image_size(path: str) -> tuple[int, int] | None:
    """Width and height as the picture is shown; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
    except UNREADABLE:
        return None
    return (height, width) if turned else (width, height)


def fitting_size(files: Files, image: str | None, said: tuple, where: str, left: Left
                 ) -> tuple[int, int] | None:
    """Size of a picture that annotations can belong to.

    Args:
        files: the folder.
        image: name of the picture, None if there is none.
        said: width and height as the annotations have them; None or 0 where they do not.
        where: what names the picture, for the note.
        left: told why there is none.

    Returns:
        Width and height; None if the picture is absent, broken, or of another size.
    """
    size = None if image is None else image_size(files.path(image))
    if size is None:
        left.add('image that is not there or cannot be read: left out', where)
        return None
    said = [_whole(side) for side in said]
    if all(said) and tuple(said) != size:
        left.add('image whose size is another in its annotations, so that they do not fit it: left '
                 'out', f'{image} has {size[0]}x{size[1]}, {where} says {said[0]}x{said[1]}')
        return None
    return size


def _whole(side) -> int | None:
    try:
        return int(float(side))
    except (TypeError, ValueError, OverflowError):
        return None


def outline_box(outlines: Sequence[Sequence[float]]) -> list[float]:
    """Box around polygons."""
    xs = [x for outline in outlines for x in outline[0::2]]
    ys = [y for outline in outlines for y in outline[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
