"""What a detector or a segmentor gets wrong on its test set."""
from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from PIL import Image

from mmhybrid.analysis.detection_errors import (
    KINDS,
    DetectionErrors,
    Found,
    Mistake,
    Objects,
    detection_errors,
)
from mmhybrid.errors import UserError
from mmhybrid.prediction.predictor import Predictor
from mmhybrid.visualization import draw_bars, draw_confusion, draw_instances, draw_regions, sheet

from .opening import Folder, build_test_set, open_run, without_masks

__all__ = ['draw_mistakes']

_COLUMNS = 4
_SIDE = 320  # pixels of a panel
_AROUND = 0.6  # of the sides of what is shown, on each side of it
_LEAST = 48  # pixels of the picture in a panel
_FOUND, _THERE = (230, 60, 60), (60, 190, 75)
_MOST_CONFUSIONS = 10


def draw_mistakes(args: argparse.Namespace) -> None:
    """Look for what ``args`` of ``mmhybrid visualize`` ask for, and draw it."""
    predictor = open_run(args, with_data=True)
    dataset = build_test_set(predictor.cfg)
    if not len(dataset):
        raise UserError('The test set holds no images, so there are no mistakes to look for.')
    folder = Folder(args, 'errors')
    draw = _regions if predictor.finds_regions else _objects
    draw(predictor, dataset, folder, args.num)


def _counted(dataset) -> Iterator[int]:
    """All indices of a data set; says now and then how far it is."""
    for index in range(len(dataset)):
        yield index
        if (index + 1) % 100 == 0:
            print(f'{index + 1} of {len(dataset)} images', file=sys.stderr, flush=True)


# --- detectors ------------------------------------------------------------------------------------

def _objects(predictor: Predictor, dataset, folder: Folder, examples: int) -> None:
    names, images = dataset.metainfo['classes'], []
    with without_masks(predictor.model):
        for index in _counted(dataset):
            info = dataset.get_data_info(index)
            (found,) = predictor.predict(info['img_path'], score=0)
            images.append((info['img_path'], _ground_truth(info, predictor.name),
                           Found(found.boxes, found.labels, found.scores)))
    count = sum(int((~there.crowd).sum()) for _, there, _ in images)
    if not count:
        raise UserError(f'None of the {len(images)} images of the test set has an annotated object '
                        '(test_dataloader.dataset.ann_file), so there is no telling what is wrong. '
                        'mmhybrid predict draws what is found.')
    errors = detection_errors([(there, found) for _, there, found in images])
    lines = _table(errors, len(images), count)
    print('\n'.join(lines))
    draw_bars({kind: 100 * errors.cost[kind] for kind in KINDS},
              {kind: f'  ({len(errors.of_kind(kind))} mistakes)' for kind in KINDS}, lines[0],
              'points by which AP50 grows if these mistakes are put right').save(
                  folder.new('errors'))
    for kind in KINDS:
        shown = _spread(errors.of_kind(kind), examples)
        if shown:
            panels = [_example(each, *images[each.image], names) for each in shown]
            rows = [panels[start:start + _COLUMNS] for start in range(0, len(panels), _COLUMNS)]
            sheet(rows, f'{kind}: {KINDS[kind]} (red: found, green: is there)').save(
                folder.new(f'errors_{kind}'))
    _write(folder, dict(
        ap50=errors.ap, images=len(images), objects=count, cost=errors.cost,
        counts={kind: len(errors.of_kind(kind)) for kind in KINDS},
        mistakes=[_entry(each, *images[each.image], names) for each in errors.mistakes]))


def _ground_truth(info: dict, name: str) -> Objects:
    """Objects of an entry of a data set of mmdet."""
    things = info.get('instances')
    if things is None:
        raise UserError(f'The entries of the test set of {name} have no "instances", so there are '
                        'no objects to compare with; expected a data set of mmdet with boxes, such '
                        'as CocoDataset.')
    return Objects(np.array([each['bbox'] for each in things], dtype=np.float64).reshape(-1, 4),
                   np.array([each['bbox_label'] for each in things], dtype=np.int64),
                   np.array([each.get('ignore_flag', 0) for each in things], dtype=bool))


def _table(errors: DetectionErrors, images: int, objects: int) -> list[str]:
    lines = [f'AP50 {100 * errors.ap:.1f} on {images} images with {objects} objects',
             f'{"kind of mistake":<16} {"mistakes":>8} {"AP50":>6}']
    for kind, meaning in KINDS.items():
        lines.append(f'{kind:<16} {len(errors.of_kind(kind)):>8} {100 * errors.cost[kind]:>+6.1f}  '
                     f'{meaning}')
    return lines + [f'all {kind:<21} {100 * errors.cost[kind]:>+6.1f}'
                    for kind in ('false positives', 'false negatives')]


def _spread(mistakes: list[Mistake], count: int) -> list[Mistake]:
    """The surest, of as many images as possible."""
    times: dict[int, int] = {}
    ranked = []
    for place, each in enumerate(mistakes):
        times[each.image] = times.get(each.image, 0) + 1
        ranked.append((times[each.image], place))
    return [mistakes[place] for _, place in sorted(ranked)[:count]]


def _example(mistake: Mistake, path: str, there: Objects, found: Found, names
             ) -> tuple[str, Image.Image]:
    boxes, labels, colors = [], [], []
    if mistake.object is not None:
        boxes.append(there.boxes[mistake.object])
        labels.append(names[there.labels[mistake.object]])
        colors.append(_THERE)
    if mistake.found is not None:
        boxes.append(found.boxes[mistake.found])
        labels.append(f'{names[found.labels[mistake.found]]} {mistake.score:.2f}')
        colors.append(_FOUND)
    image = mmcv.imread(path, channel_order='rgb')
    left, top, right, bottom = _window(np.array(boxes), image.shape[:2])
    part = Image.fromarray(image[top:bottom, left:right])
    scale = _SIDE / max(part.size)
    part = part.resize([max(1, round(scale * side)) for side in part.size], Image.BICUBIC)
    moved = scale * (np.array(boxes) - [left, top, left, top])
    stem = Path(path).stem
    title = stem if len(stem) < 26 else f'{stem[:22]}...'
    pair = mistake.found is not None and mistake.object is not None
    return (f'{title}{f", overlap {mistake.overlap:.2f}" if pair else ""}',
            draw_instances(np.asarray(part), moved, labels, colors=colors, enlarge=False))


def _window(boxes: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the part of a picture that shows boxes, with some room around."""
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    half = np.maximum((0.5 + _AROUND) * (high - low).max(), _LEAST / 2)
    middle, limits = (low + high) / 2, np.array(size[::-1])
    start = np.clip(np.floor(middle - half), 0, limits - 1).astype(int)
    end = np.clip(np.ceil(middle + half), start + 1, limits).astype(int)
    return *start.tolist(), *end.tolist()


def _entry(mistake: Mistake, path: str, there: Objects, found: Found, names) -> dict:
    entry = dict(kind=mistake.kind, image=path)
    if mistake.found is not None:
        entry.update(found=names[found.labels[mistake.found]], score=mistake.score,
                     box=found.boxes[mistake.found].tolist())
    if mistake.object is not None:
        entry.update(object=names[there.labels[mistake.object]],
                     object_box=there.boxes[mistake.object].tolist(), overlap=mistake.overlap)
    return entry


# --- segmentors -----------------------------------------------------------------------------------

def _regions(predictor: Predictor, dataset, folder: Folder, examples: int) -> None:
    names = dataset.metainfo['classes']
    matrix = np.zeros((len(names), len(names)), dtype=np.int64)
    wrong: dict[int, float] = {}
    paths = []
    for index in _counted(dataset):
        path, truth, found = _labels(predictor, dataset, index)
        paths.append(path)
        counted = _known(truth, len(names), dataset)
        own = np.bincount(truth[counted] * len(names) + found[counted], minlength=len(names)**2)
        matrix += own.reshape(matrix.shape)
        if counted.any():
            wrong[index] = float((truth != found)[counted].mean())
    total = matrix.sum()
    if not total:
        raise UserError(f'None of the {len(dataset)} images of the test set has a labelled pixel, '
                        'so there is no telling what is wrong. mmhybrid predict draws what is '
                        'found.')
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - matrix.diagonal()
    iou = np.divide(matrix.diagonal(), union, out=np.full(len(names), np.nan), where=union > 0)
    title = (f'{100 * matrix.trace() / total:.1f} % of the pixels of {len(wrong)} images are '
             f'right, mean IoU {100 * np.nanmean(iou):.1f}')
    pairs = _confusions(matrix, names)
    print(title)
    for pair in pairs[:_MOST_CONFUSIONS]:
        print(f'{100 * pair["share"]:>6.1f} % of the wrong pixels: {pair["there"]} taken for '
              f'{pair["found"]}')
    shown = [name.strip() for name in names]
    draw_confusion(matrix, shown, shown, title).save(folder.new('confusion'))
    worst = heapq.nlargest(examples, (index for index in wrong if wrong[index]), key=wrong.get)
    for place, index in enumerate(worst, start=1):
        path, truth, found = _labels(predictor, dataset, index)
        sheet([_worst(path, truth, found, dataset)],
              f'{Path(path).name}: {wrong[index]:.1%} of its pixels are wrong').save(
                  folder.new(f'worst_{place}_{Path(path).stem}'))
    _write(folder, dict(
        right=matrix.trace() / total, mean_iou=float(np.nanmean(iou)),
        iou={name: None if np.isnan(each) else each for name, each in zip(names, iou, strict=True)},
        confusions=pairs, wrong={paths[index]: share for index, share in wrong.items()}))


@torch.no_grad()
def _labels(predictor: Predictor, dataset, index: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Path, what is there and what is found, both (H, W), of an image."""
    sample = predictor.model.test_step(pseudo_collate([dataset[index]]))[0]
    if 'gt_sem_seg' not in sample:
        raise UserError(f'The pipeline of the test set loads no labels for {sample.img_path}; '
                        'expected LoadAnnotations in test_dataloader.dataset.pipeline.')
    truth, found = (field.data.squeeze(0).cpu().numpy().astype(np.int64)
                    for field in (sample.gt_sem_seg, sample.pred_sem_seg))
    if truth.shape != found.shape:
        raise UserError(f'The labels of {sample.img_path} have {truth.shape} pixels, what is found '
                        f'{found.shape}; in test_dataloader.dataset.pipeline LoadAnnotations has '
                        'to come after the steps that change the size of the image.')
    return sample.img_path, truth, found


def _known(truth: np.ndarray, classes: int, dataset) -> np.ndarray:
    return (truth < classes) & (truth != getattr(dataset, 'ignore_index', 255))


def _confusions(matrix: np.ndarray, names) -> list[dict]:
    """Pairs of classes, the one that makes most wrong pixels first."""
    off = matrix - np.diag(matrix.diagonal())
    pairs = np.argwhere(off)
    pairs = pairs[np.argsort(-off[tuple(pairs.T)], kind='stable')]
    return [dict(there=names[there].strip(), found=names[found].strip(),
                 pixels=int(off[there, found]), share=off[there, found] / off.sum())
            for there, found in pairs.tolist()]


def _worst(path: str, truth: np.ndarray, found: np.ndarray, dataset
           ) -> list[tuple[str, Image.Image]]:
    image = mmcv.imread(path, channel_order='rgb')
    names, palette = dataset.metainfo['classes'], dataset.metainfo['palette']
    known = _known(truth, len(names), dataset)
    wrong = np.where(known & (truth != found), 0, 255)
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2).astype(np.uint8)
    return [('ground truth', draw_regions(image, np.where(known, truth, -1), names, palette, -1)),
            ('prediction', draw_regions(image, found, names, palette, -1)),
            ('wrong', draw_regions(grey, wrong, ['wrong'], [_FOUND]))]


def _write(folder: Folder, report: dict) -> None:
    path = folder.path / 'errors.json'
    path.write_text(json.dumps(report, indent=1, default=float))
    print(f'Pictures and errors.json are in {folder.path}/')
