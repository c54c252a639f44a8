"""Small data sets in the forms in which annotation tools export them.

All show the same scenes: those of mini COCO, or of mini ADE20K with few classes.
"""
import base64
import io
import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from mmhybrid.datasets import mini_coco
from mmhybrid.datasets.categories import COCO_CATEGORIES
from mmhybrid.datasets.masks import mask_to_rle
from mmhybrid.datasets.photographs import load_photographs

NAMES = [kind.name for kind in mini_coco.KINDS]
_IDS = {entry['id']: entry['name'] for entry in COCO_CATEGORIES}


def scenes(count):
    """Name, image and objects (label, box, polygons); no crowds."""
    return [_scene(index) for index in range(count)]


@cache
def _scene(index):
    pixels, found, _ = mini_coco.make_scene(index, 'train', _photographs())
    things = [(_IDS[entry['category_id']], entry['bbox'], entry['segmentation'])
              for entry in found if not entry['iscrowd']]
    return f'scene_{index:03d}', pixels, things


@cache
def _photographs():
    return load_photographs('train')


def save(pixels, path):
    """Write a picture, in the form that its suffix says."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def mask_of(outlines, shape):
    """(H, W) bool of polygons along the edges of pixels."""
    from pycocotools import mask as coder
    height, width = shape[:2]
    return coder.decode(coder.merge(coder.frPyObjects(outlines, height, width))).astype(bool)


def yolo(folder, count=6, outlines=False, split=False, suffix='.jpg'):
    """images/ and labels/ with a data.yaml; with ``split`` divided as Roboflow does."""
    lines = ['names:', *(f'  {number}: {name}' for number, name in enumerate(NAMES))]
    for place, (name, pixels, things) in enumerate(scenes(count)):
        part = ('valid/' if place % 3 == 2 else 'train/') if split else ''
        save(pixels, folder / f'{part}images/{name}{suffix}')
        height, width = pixels.shape[:2]
        rows = []
        for label, (x, y, w, h), parts in things:
            if outlines:
                numbers = [value / (height if i % 2 else width)
                           for i, value in enumerate(max(parts, key=len))]
            else:
                numbers = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
            rows.append(' '.join(map(str, [NAMES.index(label), *numbers])))
        path = folder / f'{part}labels/{name}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(rows) + '\n')
    # Roboflow's paths lead one folder too far up.
    lines += ['train: ../train/images', 'val: ../valid/images'] if split else ['train: images']
    (folder / 'data.yaml').write_text('\n'.join(lines) + '\n')
    return folder


def coco(folder, count=6, kind='plain'):
    """COCO's form.

    Args:
        kind: 'plain', 'boxes', 'cvat' (brush masks marked as crowds), 'studio' (paths of Label
            Studio, old and new, names with a prefix), 'roboflow' (two folders, a parent category).
    """
    parts = {}
    for place, (name, pixels, things) in enumerate(scenes(count)):
        part = ('valid' if place % 3 == 2 else 'train') if kind == 'roboflow' else 'images'
        file = f'{place:08x}-{name}.jpg' if kind == 'studio' else f'{name}.jpg'
        save(pixels, folder / part / file)
        reference = file if kind == 'roboflow' else f'images/{file}'
        if kind == 'studio':
            reference = (f'..\\label-studio\\data\\media/upload/1/{file}' if place % 2
                         else f'/data/local-files/?d=upload%2F{file}')
        images, annotations = parts.setdefault(part, ([], []))
        images.append(dict(id=place, file_name=reference, width=pixels.shape[1],
                           height=pixels.shape[0]))
        for label, box, outlines in things:
            entry = dict(id=len(annotations) + 1, image_id=place, bbox=box, iscrowd=0,
                         area=box[2] * box[3], category_id=NAMES.index(label) + 1)
            if kind == 'cvat':
                entry.update(segmentation=mask_to_rle(mask_of(outlines, pixels.shape)), iscrowd=1,
                             attributes=dict(occluded=False))
            elif kind != 'boxes':
                entry['segmentation'] = outlines
            annotations.append(entry)
    categories = [dict(id=number, name=name, supercategory='shapes' if kind == 'roboflow' else '')
                  for number, name in enumerate(NAMES, 1)]
    if kind == 'roboflow':
        categories.insert(0, dict(id=0, name='shapes', supercategory='none'))
    for part, (images, annotations) in parts.items():
        path = folder / (f'{part}/_annotations.coco.json' if kind == 'roboflow'
                         else 'annotations/instances_default.json')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(images=images, annotations=annotations,
                                        categories=categories)))
    return folder


def voc(folder, count=6):
    """JPEGImages/, Annotations/ and lists of the parts."""
    parts = {'train': [], 'val': []}
    for place, (name, pixels, things) in enumerate(scenes(count)):
        save(pixels, folder / f'JPEGImages/{name}.jpg')
        objects = ''.join(
            f'<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x + 1:.0f}</xmin>'
            f'<ymin>{y + 1:.0f}</ymin><xmax>{x + w:.0f}</xmax><ymax>{y + h:.0f}</ymax></bndbox>'
            '</object>' for label, (x, y, w, h), _ in things)
        path = folder / f'Annotations/{name}.xml'
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'<annotation><filename>{name}.jpg</filename><size><width>'
                        f'{pixels.shape[1]}</width><height>{pixels.shape[0]}</height></size>'
                        f'{objects}</annotation>')
        parts['val' if place % 3 == 2 else 'train'].append(name)
    for part, names in parts.items():
        path = folder / f'ImageSets/Main/{part}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(names) + '\n')
    return folder


def labelme(folder, count=6):
    """A JSON file beside each image, in two folders and with two suffixes."""
    for place, (name, pixels, things) in enumerate(scenes(count)):
        part, suffix = ('day', '.jpg') if place % 2 else ('night', '.png')
        save(pixels, folder / part / f'{name}{suffix}')
        shapes = []
        for number, (label, (x, y, w, h), outlines) in enumerate(things):
            if number == 0:  # the mask itself, cut out
                mask = mask_of(outlines, pixels.shape)[int(y):int(y + h), int(x):int(x + w)]
                buffer = io.BytesIO()
                Image.fromarray(mask).save(buffer, 'PNG')
                shapes.append(dict(label=label, shape_type='mask', group_id=None,
                                   points=[[x, y], [x + w - 1, y + h - 1]],
                                   mask=base64.b64encode(buffer.getvalue()).decode()))
                continue
            for outline in outlines:
                shapes.append(dict(label=label, shape_type='polygon', group_id=number,
                                   points=np.reshape(outline, (-1, 2)).tolist()))
        shapes.append(dict(label='note', shape_type='point', points=[[1, 1]], group_id=None))
        (folder / part / f'{name}.json').write_text(json.dumps(dict(
            version='5.5.0', flags={}, shapes=shapes, imagePath=f'{name}{suffix}', imageData=None,
            imageHeight=pixels.shape[0], imageWidth=pixels.shape[1])))
    return folder


COLOURS = [(0, 0, 0), *((60 * number, 255 - 50 * number, 30) for number in range(len(NAMES)))]


def masks(folder, count=6, kind='index'):
    """images/ and masks/.

    Args:
        kind: 'index', 'palette', 'colours' (RGB, nothing names them), 'labelmap' (RGB and a
            labelmap.txt, in the folders of CVAT), 'binary' (0 and 255).
    """
    cvat = kind == 'labelmap'
    for place, (name, pixels, things) in enumerate(scenes(count)):
        labels = np.zeros(pixels.shape[:2], np.uint8)
        for label, _, outlines in things:
            labels[mask_of(outlines, pixels.shape)] = 1 + NAMES.index(label)
        folders = ('JPEGImages', 'SegmentationClass') if cvat else ('images', 'masks')
        part = '' if cvat else f'camera_{place % 2}/'
        save(pixels, folder / folders[0] / f'{part}{name}{".png" if place == 1 else ".jpg"}')
        if kind in ('colours', 'labelmap'):
            labels = np.array(COLOURS, np.uint8)[labels]
        elif kind == 'binary':
            labels = np.where(labels > 0, 255, 0).astype(np.uint8)
        path = save(labels, folder / folders[1] / f'{part}{name}.png')
        if kind == 'palette':
            image = Image.fromarray(labels).convert('P')
            image.putdata(labels.ravel().tolist())
            image.putpalette([part for colour in COLOURS for part in colour])
            image.save(path)
    if cvat:
        rows = [f'{name}:{",".join(map(str, colour))}::' for name, colour in zip(
            ['background', *NAMES], COLOURS, strict=True)]
        (folder / 'labelmap.txt').write_text('\n'.join(
            ['# label:color_rgb:parts:actions', *rows]) + '\n')
    return folder
