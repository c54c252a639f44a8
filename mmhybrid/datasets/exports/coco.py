"""COCO's form, as CVAT, Label Studio, Roboflow and others write it."""
from __future__ import annotations

import fnmatch
import os.path as osp
import re

from ..coco_file import AnnotationError, in_json, read_coco
from .common import (
    Export,
    ExportError,
    Files,
    Left,
    Picture,
    Questions,
    Thing,
    fitting_size,
    outline_box,
    split_in,
    split_of,
)

__all__ = ['coco_files', 'read']

HEAD = 65536  # bytes; enough to tell one kind of JSON from another
_KEYS = re.compile(rb'"(images|annotations|categories|info|licenses)"\s*:')
_SHAPES = re.compile(rb'"shapes"\s*:')


def coco_files(files: Files) -> list[str]:
    """JSON files that may be of COCO's form."""
    return [name for name in files.ending('.json') if _looks_like_coco(files.path(name))]


def _looks_like_coco(path: str) -> bool:
    with open(path, 'rb') as file:
        head = file.read(HEAD)
    return bool(_KEYS.search(head)) and not _SHAPES.search(head)


def read(files: Files, questions: Questions) -> Export:
    """Read all annotation files of COCO's form below a folder; several are put together."""
    contents = _contents(files, questions)
    classes, unused = _classes(contents)
    crowds = _crowds(contents, questions)
    left, pictures = Left(), {}
    for name, content in contents.items():
        _add(files, name, content, crowds, unused, pictures, left)
    notes = left.notes()
    if unused:
        notes.append(f'the category {", ".join(sorted(unused))} has no annotations and is the '
                     'parent of others, as Roboflow writes it: left out')
    return Export('coco', files.root, classes, [pictures[key] for key in sorted(pictures)],
                  notes=notes)


def _contents(files: Files, questions: Questions) -> dict[str, dict]:
    names, contents, refused = coco_files(files), {}, []
    wanted = questions.given.get('annotations')
    if wanted:
        chosen = [name for name in names if fnmatch.fnmatch(name, wanted)
                  or osp.basename(name) == wanted]
        if not chosen:
            raise ExportError(f'--annotations {wanted} names none of the annotation files in '
                              f'{files.root}: {", ".join(names)}.')
        names = chosen
    for name in names:
        try:
            contents[name] = read_coco(files.path(name))
        except AnnotationError as error:
            refused.append(str(error))
    if not contents:
        raise ExportError(refused[0] + '.')
    questions.told += [f'{text}: left out' for text in refused]
    return contents


def _classes(contents: dict[str, dict]) -> tuple[list[str], set[str]]:
    """Names of the classes by id, file after file; and those that are only a parent."""
    classes: dict[str, None] = {}
    used, parents, roots = set(), set(), set()
    for name, content in contents.items():
        names = {}
        for entry in content['categories']:
            if not isinstance(entry, dict) or not isinstance(entry.get('name'), str) \
                    or 'id' not in entry:
                raise ExportError(f'{name}: the category {in_json(entry)} has no "id" and "name".')
            names[in_json(entry['id'])] = entry['name'].strip()
            above = str(entry.get('supercategory'))
            if above not in ('none', entry['name']):
                parents.add(above)
            else:
                roots.add(entry['name'].strip())
        used |= {names.get(in_json(entry.get('category_id')))
                 for entry in content.get('annotations', []) if isinstance(entry, dict)}
        for key in sorted(names, key=lambda key: (len(key), key)):
            classes.setdefault(names[key])
    unused = {name for name in classes if name in parents & roots and name not in used}
    return [name for name in classes if name not in unused], unused


def _crowds(contents: dict[str, dict], questions: Questions) -> bool:
    """Whether iscrowd=1 means a crowd; CVAT marks every brush mask with it."""
    crowds = coded = cvat = total = 0
    for content in contents.values():
        for entry in content.get('annotations', []):
            total += 1
            if isinstance(entry, dict) and entry.get('iscrowd') == 1:
                crowds += 1
                extra = entry.get('attributes')
                cvat += isinstance(extra, dict) and 'occluded' in extra
            elif isinstance(entry, dict) and isinstance(entry.get('segmentation'), dict):
                coded += 1
    if not crowds:
        return True
    brush = cvat == crowds or (crowds * 2 > total and not coded)
    if not brush and 'crowd' not in questions.given and crowds * 10 < total:
        return True  # a few, as in COCO itself
    answer = questions.choose(
        'crowd', f'{crowds} of {total} annotations are marked iscrowd=1. COCO means crowds by it, '
        'which are neither learned nor scored; CVAT marks every mask of its brush so.',
        ('objects', 'crowds'), 'objects' if brush else 'crowds')
    return answer == 'crowds'


def _add(files: Files, name: str, content: dict, crowds: bool, unused: set[str],
         pictures: dict[str, Picture], left: Left) -> None:
    classes = {in_json(entry['id']): entry['name'].strip() for entry in content['categories']}
    by_id: dict[str, Picture] = {}
    split, before = split_in(name), set(pictures)
    for entry in content['images']:
        reference = entry.get('file_name') if isinstance(entry, dict) else None
        if not isinstance(reference, str) or 'id' not in entry:
            raise ExportError(f'{files.path(name)}: the image {in_json(entry)} has no "id" and '
                              '"file_name".')
        found = files.find(reference, name)
        said = entry.get('width'), entry.get('height')
        size = fitting_size(files, found, said, f'{reference} of {name}', left)
        if size is None:
            continue
        key = in_json(entry['id'])
        if found in before and pictures[found].things:
            raise ExportError(
                f'{found} is annotated in several files, {name} among them. Give --annotations '
                f'NAME (a file name, or a pattern such as "instances_*.json"); there are '
                f'{", ".join(coco_files(files))}.')
        by_id[key] = pictures.setdefault(found, Picture(found, size, split or split_of(found)))
    for entry in content.get('annotations', []):
        picture = by_id.get(in_json(entry.get('image_id'))) if isinstance(entry, dict) else None
        label = classes.get(in_json(entry.get('category_id'))) if picture else None
        where = f'id {in_json(entry.get("id") if isinstance(entry, dict) else entry)} of {name}'
        if picture is None or label is None or label in unused:
            left.add('annotation of an image or a category that is not there: left out', where)
            continue
        thing = _thing(entry, label, crowds)
        if thing is None:
            left.add('annotation without a box and without an outline: left out', where)
        elif isinstance(thing.outlines, dict) and thing.outlines['size'] != [*picture.size[::-1]]:
            left.add('annotation whose mask is not as large as its image: left out', where)
        else:
            picture.things.append(thing)


def _thing(entry: dict, label: str, crowds: bool) -> Thing | None:
    outlines = entry.get('segmentation') or None
    if isinstance(outlines, list):
        if isinstance(outlines[0], (int, float)):
            outlines = [outlines]  # one polygon without the list around it
        outlines = [part for part in outlines if isinstance(part, list) and len(part) >= 6
                    and len(part) % 2 == 0 and all(isinstance(value, (int, float))
                                                   for value in part)] or None
    elif not isinstance(outlines, dict) or not {'counts', 'size'} <= set(outlines):
        outlines = None
    box = entry.get('bbox')
    if not isinstance(box, list) or len(box) != 4 or not all(
            isinstance(side, (int, float)) for side in box):
        if not isinstance(outlines, list):
            return None
        box = outline_box(outlines)
    return Thing(label, box, outlines, bool(entry.get('iscrowd')) and crowds)
