"""What is wrong with images and label images of one's own: the files of semantic segmentation.

mmseg fails on these deep in a worker process, hours later, or not at all: it leaves out files with
another suffix, keeps the lowest 8 bits of a label, and counts a label without a class as nothing.

Functions return sentences for the user, problems apart from mere notes.
"""
from __future__ import annotations

import os
import os.path as osp
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

__all__ = ['Pairs', 'check_label_images', 'label_problem', 'list_files', 'pair_files',
           'read_labels']

LABELS = 24  # label images opened before training; the others are looked at as they are loaded
IGNORED = 255
IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.pgm', '.tif', '.tiff', '.gif', '.jp2')
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass
class Listing:
    """What a folder and those below it hold; names are relative and sorted."""

    names: list[str] = field(default_factory=list)  # files, as mmengine lists them
    hidden: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)  # pipes, sockets, devices, broken links
    loops: list[str] = field(default_factory=list)  # links to a folder above them


def list_files(root: str) -> Listing:
    """List a folder as mmengine does, hidden files apart, without going round in circles."""
    found, start = Listing(), len(osp.join(root, ''))

    def walk(folder, above):
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            found.loops.append(folder[start:])
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.path[start:]
                if not entry.name.startswith('.') and entry.is_file():
                    found.names.append(name)
                elif osp.isdir(entry.path):
                    walk(entry.path, above | {here})
                else:
                    (found.hidden if osp.isfile(entry.path) else found.special).append(name)

    walk(osp.join(root, ''), frozenset())
    for names in vars(found).values():
        names.sort()
    return found


@dataclass
class Pairs:
    """How mmseg's BaseSegDataset pairs images and label images.

    Attributes:
        stems: names of the images it uses, without their suffix.
        problems: sentences; with one of these the others are of no use.
        notes: sentences on images that are left out though they have a label image.
        summary: one sentence that counts the files given, used and left out, and why.
    """

    stems: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    summary: str = ''


def pair_files(images: str, labels: str | None, image_suffix: str, label_suffix: str,
               listed: str | None = None) -> Pairs:
    """Pair the files of two folders as BaseSegDataset does.

    Args:
        images: folder of images, with folders below it or not.
        labels: folder of label images with the same names; None for a test without them.
        image_suffix: end of an image's name, ".jpg".
        label_suffix: what stands in its place in the label image's name, ".png".
        listed: file with one name in a line, without suffix; None takes all in the folder.
    """
    try:
        given = list_files(images)
        have = list_files(labels) if labels is not None else Listing()
    except OSError as error:
        return Pairs(problems=[f'{error.filename} cannot be listed: {error.strerror}'])
    for folder, listing in ((images, given), (labels, have)):
        if listing.loops:
            return Pairs(problems=[
                f'{osp.join(folder, listing.loops[0])} is a link to a folder that it lies in, so '
                'the files would be listed again and again. Remove the link'])
    if not image_suffix and listed is None:
        return Pairs(problems=[f'img_suffix of the data in {images} is empty; expected the end of '
                               'the names, such as ".jpg"'])
    if listed is None:
        stems = [name[:-len(image_suffix)] for name in given.names if name.endswith(image_suffix)]
        problem = None if stems else _no_images(images, image_suffix, given)
    else:
        stems = _read_list(listed)
        problem = (f'{listed} is not text in UTF-8' if stems is None else _not_there(
            stems, images, image_suffix, given, listed, 'img_suffix'))
    if not problem and labels is not None:
        problem = (_not_there(stems, labels, label_suffix, have, listed, 'seg_map_suffix') if listed
                   else _without_label(stems, images, labels, image_suffix, label_suffix, have))
    if problem:
        return Pairs(stems or [], [problem])
    lost = [] if listed else _lost(stems, image_suffix, label_suffix, given, have)
    notes = [_lost_note(lost, images, image_suffix, given)] if lost else []
    return Pairs(stems, [], notes, _summary(
        stems, images, labels, image_suffix, label_suffix, given, have, listed))


def _read_list(path: str) -> list[str] | None:
    try:
        with open(path, encoding='utf-8') as file:
            return [line.strip() for line in file]
    except UnicodeDecodeError:
        return None


def _no_images(images, suffix, given) -> str:
    return (f'{images} has no images that end with {suffix!r}; it holds '
            f'{_kinds(given.names) or "no files"}. Set img_suffix of the data set')


def _kinds(names: list[str]) -> str:
    ends = Counter(osp.splitext(name)[1] for name in names).most_common(4)
    return ', '.join(f'{count} x {end or "no suffix"}' for end, count in ends)


def _not_there(stems, folder, suffix, there, listed, key) -> str | None:
    """Names of a list without a file."""
    if not stems:
        return f'{listed} is empty; expected one name in a line, without suffix'
    known = set(there.names)
    absent = [(number, stem) for number, stem in enumerate(stems, 1)
              if stem + suffix not in known and not osp.isfile(osp.join(folder, stem + suffix))]
    if not absent:
        return None
    number, stem = absent[0]
    if not stem:
        return f'Line {number} of {listed} is empty; expected one name in a line. Remove it'
    path = osp.join(folder, stem + suffix)
    what = 'is not a file' if osp.exists(path) else 'does not exist'
    if suffix and stem.endswith(suffix):
        hint = f'names stand without suffix there, since {key}={suffix!r} is added'
    else:
        hint = f'remove the names, add the files, or set {key} and data_prefix'
    return (f'{len(absent)} of {len(stems)} names in {listed} have no file in {folder}; for '
            f'example (line {number}) {path} {what}: {hint}')


def _without_label(stems, images, labels, image_suffix, label_suffix, have) -> str | None:
    known = set(have.names)
    alone = [stem for stem in stems if stem + label_suffix not in known]
    if not alone:
        return None
    wanted = alone[0] + label_suffix
    near = next((name for name in have.names if name.lower() == wanted.lower()), None) or next(
        (name for name in have.names if name.startswith(alone[0])), None)
    hint = f' ({osp.join(labels, near)} does: names and suffix must agree, in case too)' if (
        near and osp.join(images, near) != osp.join(images, alone[0] + image_suffix)) else ''
    return (f'{len(alone)} of {len(stems)} images in {images} have no label image, for example '
            f'{osp.join(labels, wanted)} does not exist{hint}. Add them, remove the images, or set '
            'seg_map_suffix')


def _lost(stems, image_suffix, label_suffix, given, have) -> list[str]:
    """Images that would have a label image, if only their names ended as the others do."""
    tail = image_suffix.rpartition('.')[0].lower()
    used, known = {stem + image_suffix for stem in stems}, set(have.names)

    def stem_of(name):
        root = osp.splitext(name)[0]
        return root[:len(root) - len(tail)] if root.lower().endswith(tail) else root

    return [name for name in given.names
            if name not in used and name.lower().endswith(IMAGES)
            and stem_of(name) + label_suffix in known and name != stem_of(name) + label_suffix]


def _lost_note(lost, images, suffix, given) -> str:
    return (f'{len(lost)} of {len(given.names)} files in {images} are left out though they have a '
            f'label image, since their names do not end with {suffix!r} (img_suffix): '
            f'{_kinds(lost)}, for example {lost[0]}. Rename them, or add a data set of the same '
            'folders with the other img_suffix (type="ConcatDataset")')


def _summary(stems, images, labels, image_suffix, label_suffix, given, have, listed) -> str:
    used = {osp.normpath(stem + image_suffix) for stem in stems}
    paired = {name[:-len(image_suffix)] + label_suffix for name in given.names
              if name.endswith(image_suffix)}
    if images == labels:  # one folder for both
        used |= paired
    other = [name for name in given.names if name not in used]
    reasons = [f'{_kinds(other)} ' + (f'({listed} does not list them)' if listed else
                                      f'(img_suffix is {image_suffix!r})')] if other else []
    reasons += [f'{len(names)} {what} (for example {names[0]})'
                for names, what in ((given.hidden, 'hidden'), (given.special, 'no regular files'))
                if names]
    extra = [name for name in have.names if name.endswith(label_suffix) and name not in paired]
    text = f'{len(stems)} images of {images} are used'
    text += f' with their label images in {labels}' if labels is not None else ''
    text += f', as {listed} lists them' if listed else ''
    text += '; left out: ' + ', '.join(reasons) if reasons else '; none is left out'
    if extra:
        text += f'; {len(extra)} label images have no image of this suffix (for example {extra[0]})'
    return text


def check_label_images(pairs: list[tuple[str, str]], labels: str, classes: int,
                       ignored: int = IGNORED, zero: bool = False,
                       train: bool = False) -> tuple[list[str], list[str]]:
    """Look at some label images, and at all of them where those hold one class and "ignore".

    Args:
        pairs: paths of images and their label images.
        labels: folder of the label images.
        classes: how many.
        ignored: the label that means "ignore".
        zero: reduce_zero_label.
        train: whether to train on them, which needs more than one class.

    Returns:
        Problems, and notes.
    """
    seen, forms = set(), {}
    for image_path, path in pairs[::-(-len(pairs) // LABELS)]:
        try:
            values, form = read_labels(path)
            problem = label_problem(values, _size(image_path), path, classes, ignored, zero)
        except UNREADABLE:
            continue  # reading the data names the file
        if problem:
            return [problem], []
        seen.update(_labels_of(values))
        forms.setdefault(form, path)
    notes = [note.format(path=forms[form]) for form, note in FORMS.items() if form in forms]
    nothing = {ignored} | ({0} if zero else set())
    if ignored not in seen or classes < 2 or len(seen - nothing) > 1:
        return [], notes
    if not seen - nothing - {0}:
        others = _more_labels(pairs, seen) if train else seen
        if others > seen:
            return [], notes
        if train:
            return [_only_background(len(pairs), labels, seen, ignored, zero)], notes
    return [], [*notes, f'In {min(len(pairs), LABELS)} label images of {labels} there is only '
                f'{", ".join(map(str, sorted(seen - nothing))) or "nothing"} beside {ignored}, '
                'which means "ignore". If it is a class there, give it its number (0 to '
                f'{classes - 1}) in the files']


FORMS = {
    'JPEG': '{path} is a JPEG: that form changes values a little, so that some pixels have the '
            'class of another. Write label images as PNG',
    'GIF': '{path} is a GIF, which holds indices of a palette; programs number it anew when they '
           'write, so that a class may have another index in each file. Write label images as PNG',
    'animated': '{path} is animated; its first picture is taken',
}
# More of it when a label is wrong there.
LOSSY = {
    '.jpg': ' JPEG changes values: write label images as PNG.',
    '.gif': ' A GIF has indices of a palette that programs number anew: name its colours there '
            '(0,0,0=0 255,255,255=1), and the result is PNG.',
}
LOSSY['.jpeg'] = LOSSY['.jpg']


def _more_labels(pairs, seen: set) -> set:
    """The labels of all files, or those found when there is one that is not in ``seen``."""
    for _, path in pairs:
        try:
            found = _labels_of(read_labels(path)[0])
        except UNREADABLE:
            continue
        if not found <= seen:
            return seen | found
    return seen


def _labels_of(values: np.ndarray) -> set:
    if values.dtype == np.uint8:  # ten times as fast
        return set(np.flatnonzero(np.bincount(values.ravel())).tolist())
    return set(np.unique(values).tolist())


def _only_background(count, labels, seen, ignored, zero) -> str:
    also = ' (and 0 too, with reduce_zero_label=True; set that to False)' if zero else ''
    numbers = ' '.join(f'{value}={index}' for index, value in enumerate(sorted(seen | {0})))
    return (f'{"All" if count > 1 else "The"} {count} label images of {labels} hold only '
            f'{" and ".join(map(str, sorted(seen)))}, but {ignored} means "ignore"{also}, so '
            'nothing but class 0 could be learned. If they are classes, give them numbers with\n'
            f'  python tools/map_labels.py {labels.rstrip("/")} {labels.rstrip("/")}_numbered '
            f'{numbers}\nand name the new folder in data_prefix.seg_map_path')


def _size(path: str) -> tuple[int, int]:
    """(height, width) of an image as it is loaded: upright."""
    with _open(path) as image:
        return image.size if image.getexif().get(0x112, 1) > 4 else image.size[::-1]


def read_labels(path: str) -> tuple[np.ndarray, str]:
    """Labels as they are in the file, and its form: "JPEG", "animated" or whatever it is."""
    with _open(path) as image:
        form = 'animated' if getattr(image, 'n_frames', 1) > 1 else str(image.format)
        return np.asarray(image), form


def _open(path: str) -> Image.Image:
    if not osp.isfile(path):  # opening a pipe would wait for ever
        raise FileNotFoundError(path)
    return Image.open(path)


def label_problem(labels: np.ndarray, shape: tuple, path: str, classes: int | None = None,
                  ignored: int = IGNORED, zero: bool = False) -> str | None:
    """Sentence on a label image that does not fit, or None.

    Args:
        labels: as in the file.
        shape: (height, width) of the image.
        path: the file.
        classes: how many; None does not look at the values.
        ignored: the label that means "ignore".
        zero: reduce_zero_label.
    """
    if labels.ndim == 3 and labels.shape[2] == 1:
        labels = labels[..., 0]
    if labels.ndim != 2:
        kind = {2: 'has an alpha channel', 4: 'is a colour picture with an alpha channel or CMYK'}
        return (f'{path} {kind.get(labels.shape[-1], "is a colour picture")} (shape '
                f'{labels.shape}); expected one channel that holds class numbers, as a grey or a '
                'palette PNG does. Convert the label images: ' + MAP_COLOURS)
    if tuple(labels.shape) != tuple(shape):
        return (f'{path} is {labels.shape[1]} x {labels.shape[0]}, its image {shape[1]} x '
                f'{shape[0]}; both must have the same size. Resize the label images with nearest '
                'neighbour, or correct the pair')
    if classes is None or not labels.size:
        return None
    wrong = _wrong(labels, classes - 1 + zero, ignored)
    if wrong is None:
        return None
    values = labels[wrong]
    worst = values.max() if not np.isnan(values.max()) else values[np.isnan(values)][0]
    return (f'{path} has label {worst.item()}, but with {classes} classes and '
            f'reduce_zero_label={zero} labels are {int(zero)} to {classes - 1 + zero}, and '
            f'{ignored} for "ignore" ({values.size} of {labels.size} pixels are none of these). '
            'Correct metainfo.classes and num_classes, or the files: ' + MAP_GREYS + '.'
            + LOSSY.get(osp.splitext(path)[1].lower(), '')).rstrip('.')


MAP_COLOURS = ('python tools/map_labels.py FROM TO 0,0,0=0 255,0,0=1 for example makes black '
               'class 0 and red class 1')
MAP_GREYS = ('python tools/map_labels.py FROM TO 0=0 255=1 for example makes grey value 255 '
             'class 1')


def _wrong(labels: np.ndarray, largest: int, ignored: int) -> np.ndarray | None:
    """Where labels are neither a class nor "ignore"; None if nowhere. Fast for 8 bits."""
    if labels.dtype == bool:
        labels = labels.view(np.uint8)
    if labels.dtype == np.uint8 and ignored == 255 and (labels + np.uint8(1)).max() <= largest + 1:
        return None
    wrong = ~((labels >= 0) & (labels <= largest))  # this way round for nan
    if labels.dtype.kind == 'f':
        wrong |= labels != np.floor(labels)
    wrong &= labels != ignored
    if ignored == 255:
        wrong &= labels != -1  # mmseg keeps 8 bits, so that -1 is 255
    return wrong if wrong.any() else None
