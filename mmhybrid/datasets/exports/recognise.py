"""Which form a folder has."""
from __future__ import annotations

import os.path as osp

from . import coco, label_pictures, labelme, voc, yolo
from .common import Export, ExportError, Files, Questions

__all__ = ['FORMS', 'read_export']

FORMS = {'coco': (coco.coco_files, coco.read), 'yolo': (yolo.label_files, yolo.read),
         'voc': (voc.xml_files, voc.read), 'labelme': (labelme.shape_files, labelme.read),
         'masks': (label_pictures.pairs, label_pictures.read)}


def read_export(folder: str, questions: Questions, task: str | None = None) -> Export:
    """Read an export of whatever form.

    Args:
        folder: the data.
        questions: what it leaves open, such as its form.
        task: 'detect', 'instance' or 'semantic', which may tell the form.

    Raises:
        ExportError: if it is none, cannot be read, or a question is left.
    """
    if not osp.isdir(folder):
        raise ExportError(f'{folder} ' + (
            'is a file; give the folder that holds images and annotations' if osp.exists(folder)
            else 'does not exist') + '.')
    files = Files(folder)
    if not files.images:
        raise ExportError(f'{folder} holds no images ({len(files.names)} other files). Give a '
                          'folder that holds images and annotations.')
    found = {form: list(look(files)) for form, (look, _) in FORMS.items()}
    form = _form(folder, {form: names for form, names in found.items() if names}, questions, task)
    export = FORMS[form][1](files, questions)
    if not export.pictures:
        raise ExportError(f'{folder}: nothing can be used. ' + '; '.join(export.notes) + '.')
    return export


def _form(folder: str, found: dict[str, list], questions: Questions, task: str | None) -> str:
    if 'format' in questions.given:
        form = questions.given['format']
        if form not in found:
            raise ExportError(f'--format {form}: {folder} holds no such annotations; there are '
                              f'{_listed(found) or "none of a known form"}.')
        return form
    if not found:
        raise ExportError(
            f'{folder} holds images, but no annotations of a known form: COCO (json), YOLO (txt), '
            'Pascal VOC (xml), LabelMe (json), or label images (png) in folders such as images/ '
            'and masks/. Export them in one of these.')
    if task == 'semantic' and 'masks' in found:
        return 'masks'
    if task in ('detect', 'instance') and len(found) > 1:
        found.pop('masks', None)
    if len(found) == 1:
        return next(iter(found))
    return questions.choose('format', f'{folder} holds annotations of several forms: '
                            f'{_listed(found)}.', [*found], max(found, key=lambda f: len(found[f])))


def _listed(found: dict[str, list]) -> str:
    return ', '.join(f'{form} ({len(names)} files, such as {names[0]})'
                     for form, names in found.items())
