"""Pascal VOC: one XML file of boxes per image."""
from __future__ import annotations

import math
import os.path as osp
import re
from xml.etree import ElementTree

from .common import (
    Export,
    ExportError,
    Files,
    Left,
    Picture,
    Questions,
    Thing,
    fitting_size,
    listed_splits,
    split_of,
)

__all__ = ['read', 'xml_files']


def xml_files(files: Files) -> list[str]:
    """XML files that begin as those of VOC do."""
    found = []
    for name in files.ending('.xml'):
        with open(files.path(name), 'rb') as file:
            if re.search(rb'<annotation[\s>]', file.read(4096)):
                found.append(name)
    return found


def read(files: Files, questions: Questions) -> Export:
    """Read all XML files below a folder.

    Whole numbers count pixels from 1, both ends included, as in VOC itself; others are taken as
    they are, as CVAT writes them.
    """
    splits, left = listed_splits(files), Left()
    pictures, labels = {}, {}
    for name in xml_files(files):
        root = _root(files.path(name))
        stem = osp.splitext(osp.basename(name))[0]
        reference = (root.findtext('filename') or '').strip()
        image = next(filter(None, (files.find(each, name) for each in _references(
            files, reference, stem))), None)
        said = tuple(root.findtext(f'size/{key}') for key in ('width', 'height'))
        size = fitting_size(files, image, said, f'{reference or stem} of {name}', left)
        if size is None:
            continue
        picture = pictures[image] = Picture(image, size, splits.get(stem) or split_of(image))
        for entry in root.iter('object'):
            thing = _thing(entry)
            if thing is None:
                left.add('object without a name or a box: left out', name)
                continue
            picture.things.append(thing)
            labels.setdefault(thing.label)
    difficult = sum(thing.crowd for one in pictures.values() for thing in one.things)
    notes = left.notes()
    if difficult:
        notes.append(f'{difficult} objects are marked difficult: neither learned nor scored, as in '
                     'VOC')
    return Export('voc', files.root, sorted(labels), [pictures[key] for key in sorted(pictures)],
                  notes=notes)


def _references(files: Files, reference: str, stem: str):
    if reference:
        yield f'JPEGImages/{osp.basename(reference)}'  # found elsewhere too, if it is not there
    for name in files.images:
        if osp.splitext(osp.basename(name))[0] == stem:
            yield name


def _root(path: str) -> ElementTree.Element:
    with open(path, 'rb') as file:
        data = file.read()
    if b'<!ENTITY' in data or b'<!DOCTYPE' in data:
        raise ExportError(f'{path} declares a document type, which no file of VOC needs and which '
                          'can make a small file huge. Remove the declaration.')
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ExportError(f'{path} is not valid XML: {error}. Correct it, or export it again.'
                          ) from error


def _thing(entry: ElementTree.Element) -> Thing | None:
    label = (entry.findtext('name') or '').strip()
    try:
        sides = [float(entry.findtext(f'bndbox/{key}')) for key in ('xmin', 'ymin', 'xmax', 'ymax')]
    except (TypeError, ValueError):
        return None
    if not label or not all(map(math.isfinite, sides)):
        return None
    x0, y0, x1, y1 = sides
    if all(side == int(side) for side in sides):
        x0, y0 = x0 - 1, y0 - 1
    return Thing(label, [x0, y0, x1 - x0, y1 - y0],
                 crowd=(entry.findtext('difficult') or '0').strip() == '1')
