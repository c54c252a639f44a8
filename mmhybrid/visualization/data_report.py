"""A page about a data set: counts, sizes, what looks wrong, and pictures with annotations."""
from __future__ import annotations

import base64
import html
import io
import os.path as osp
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from mmhybrid.datasets.exports.common import Picture
from mmhybrid.datasets.exports.preparing import Prepared, label_image, thing_mask
from mmhybrid.datasets.label_images import UNREADABLE

from .pictures import draw_instances, draw_regions

__all__ = ['report_html']

SHOWN = 12
_SIDE = 360  # pixels of a picture on the page
_STYLE = """body{font:15px/1.4 sans-serif;max-width:1180px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{padding:2px 12px;text-align:right}
th:first-child,td:first-child{text-align:left}tr:nth-child(even){background:#f3f3f3}
figure{display:inline-block;margin:4px;vertical-align:top;width:360px}
figcaption{font-size:12px;overflow-wrap:anywhere}img{max-width:100%}"""


def report_html(prepared: Prepared, name: str, decided: Sequence[str], facts: Sequence[str],
                seed: int) -> str:
    """The page, complete in one file.

    Args:
        prepared: the data.
        name: of the data set.
        decided: answers to questions and what else was decided.
        facts: about the config.
        seed: chooses the pictures.
    """
    parts = [f'<h1>{html.escape(name)}</h1>',
             f'<p>{prepared.export.form}, task {prepared.task}, in '
             f'{html.escape(prepared.export.root)}</p>',
             _list('Decided', decided),
             _list('Left out, or taken otherwise', prepared.export.notes),
             _list('Worth a look', prepared.suspicious), _list('Config', facts),
             '<h2>Classes</h2>', _classes(prepared), '<h2>Sizes</h2>', _sizes(prepared),
             '<h2>Pictures</h2>', *_pictures(prepared, seed)]
    return (f'<!doctype html><meta charset="utf-8"><title>{html.escape(name)}</title>'
            f'<style>{_STYLE}</style>\n' + '\n'.join(parts) + '\n')


def _list(title: str, texts: Sequence[str]) -> str:
    rows = ''.join(f'<li>{html.escape(text)}</li>' for text in texts) or '<li>nothing</li>'
    return f'<h2>{title}</h2><ul>{rows}</ul>'


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, *rows]
    cells = [''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in line)
             for line, tag in zip(lines, ['th'] + ['td'] * len(rows), strict=True)]
    return '<table>' + ''.join(f'<tr>{line}</tr>' for line in cells) + '</table>'


def _classes(prepared: Prepared) -> str:
    splits = prepared.splits
    if prepared.export.form == 'masks':
        pixels = {split: _pixels(prepared, found) for split, found in splits.items()}
        return _table(('class', *(f'{split}, % of pixels' for split in splits)), [
            (name, *(f'{100 * pixels[split][place]:.2f}' for split in splits))
            for place, name in enumerate(prepared.classes)])
    counts = {split: Counter(thing.label for one in found for thing in one.things)
              for split, found in splits.items()}
    held = {split: Counter(label for one in found for label in {t.label for t in one.things})
            for split, found in splits.items()}
    return _table(('class', *(f'{split}: {what}' for split in splits
                              for what in ('objects', 'pictures'))), [
        (name, *(number[name] for split in splits for number in (counts[split], held[split])))
        for name in prepared.export.classes])


def _pixels(prepared: Prepared, pictures: Sequence[Picture]) -> np.ndarray:
    counts = np.zeros(256, np.int64)
    for one in pictures:
        for value, pixels in one.pixels.items():
            counts[prepared.export.numbers[value]] += pixels
    return counts / max(counts.sum(), 1)


def _sizes(prepared: Prepared) -> str:
    pictures = [one for found in prepared.splits.values() for one in found]
    sizes = np.array([one.size for one in pictures])
    rows = [('width of pictures', *_spread(sizes[:, 0])),
            ('height of pictures', *_spread(sizes[:, 1]))]
    boxes = np.array([thing.box for one in pictures for thing in one.things])
    if len(boxes):
        rows += [('width of boxes', *_spread(boxes[:, 2])),
                 ('height of boxes', *_spread(boxes[:, 3])),
                 ('objects in a picture', *_spread(np.array([len(p.things) for p in pictures])))]
    return _table(('', 'least', '5 %', 'half', '95 %', 'most'), rows)


def _spread(values: np.ndarray) -> list[str]:
    return [f'{value:.0f}' for value in np.percentile(values, (0, 5, 50, 95, 100))]


def _pictures(prepared: Prepared, seed: int) -> list[str]:
    pictures = [(split, one) for split, found in prepared.splits.items() for one in found]
    order = np.random.RandomState(seed).permutation(len(pictures))[:SHOWN]
    return [_figure(prepared, *pictures[place]) for place in sorted(order)]


def _figure(prepared: Prepared, split: str, one: Picture) -> str:
    caption = html.escape(f'{split}: {one.name}, {one.size[0]}x{one.size[1]}')
    try:
        with Image.open(osp.join(prepared.export.root, one.name)) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    except UNREADABLE as error:
        return f'<figure><figcaption>{caption} cannot be read: {html.escape(str(error))}'\
            '</figcaption></figure>'
    picture = _drawn(prepared, one, pixels)
    picture.thumbnail((2 * _SIDE, 2 * _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, 'JPEG', quality=80)
    code = base64.b64encode(buffer.getvalue()).decode()
    return (f'<figure><img src="data:image/jpeg;base64,{code}"><figcaption>{caption}</figcaption>'
            '</figure>')


def _drawn(prepared: Prepared, one: Picture, pixels: np.ndarray) -> Image.Image:
    if prepared.task == 'semantic':
        colours = np.random.RandomState(3).randint(40, 255, (256, 3)).tolist()
        return draw_regions(pixels, label_image(prepared, one), prepared.classes, colours)
    boxes = np.array([thing.box for thing in one.things], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = None
    if prepared.task == 'instance' and one.things:
        masks = np.stack([thing_mask(thing, one.size) for thing in one.things])
    labels = [thing.label + ' (crowd)' * thing.crowd for thing in one.things]
    return draw_instances(pixels, boxes, labels, masks)
