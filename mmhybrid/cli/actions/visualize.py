"""What ``mmhybrid visualize`` does: predictions of a checkpoint next to ground truth."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from mmhybrid.datasets.loading.checks import check_classes, check_data
from mmhybrid.datasets.loading.pipeline_guard import guard_image_files
from mmhybrid.engine.checkpoint_check import check_checkpoint_file, check_whole
from mmhybrid.engine.config import load_config
from mmhybrid.errors import UserError
from mmhybrid.visualization import draw_instances, draw_regions, side_by_side

__all__ = ['draw_test_set']


def detection_panels(image, sample, meta, score_thr):
    """Ground truth and prediction of a detector, drawn."""
    def drawn(instances, with_scores):
        masks = instances.get('masks')
        if masks is not None:
            masks = (masks.to_ndarray() if hasattr(masks, 'to_ndarray')
                     else masks.cpu().numpy()).astype(bool)
        boxes = instances.bboxes
        boxes = (boxes.tensor if hasattr(boxes, 'tensor') else boxes).cpu().numpy()
        return draw_instances(
            image, boxes, [meta['classes'][label] for label in instances.labels.tolist()], masks,
            instances.scores.tolist() if with_scores else None)

    found = sample.pred_instances
    found = found[found.scores >= score_thr]
    return [('ground truth', drawn(sample.gt_instances, False)),
            (f'prediction (score >= {score_thr:g})', drawn(found, True))]


def segmentation_panels(image, sample, meta):
    """Ground truth and prediction of a segmentor, drawn."""
    return [(title, draw_regions(image, field.data.squeeze(0).cpu().numpy(), meta['classes'],
                                 meta['palette']))
            for title, field in (('ground truth', sample.gt_sem_seg),
                                 ('prediction', sample.pred_sem_seg))]


def draw_test_set(args: argparse.Namespace) -> None:
    """Draw pictures of the test set as ``args`` of ``mmhybrid visualize`` say."""
    if args.num < 1:
        raise UserError(f'--num is {args.num}; expected at least 1 picture.')
    cfg, _ = load_config(args.config, args.cfg_options, args.data_root)
    if cfg.get('default_scope') not in ('mmdet', 'mmseg'):
        raise UserError('There is nothing to draw over the images of a classifier. tools/test.py '
                        '--out FILE.pkl writes its predictions.')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    check_data(cfg, ['test'])
    for warning in check_classes(cfg, ['test']):
        print(f'WARNING: {warning}', file=sys.stderr)
    guard_image_files()
    check_checkpoint_file(args.checkpoint)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    model = MODELS.build(cfg.model)
    check_whole(model, load_checkpoint(model, args.checkpoint, map_location='cpu'))
    model = model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()
    out_dir = Path(args.out_dir or Path(args.checkpoint).parent / 'pictures')
    out_dir.mkdir(parents=True, exist_ok=True)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, args.num).astype(int)).tolist()
    written = set()
    for number, index in enumerate(chosen, start=1):
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([dataset[index]]))[0]
        # As the pipeline reads it: turned upright, with 8 bits.
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        panels = (detection_panels(image, sample, dataset.metainfo, args.score_thr)
                  if 'pred_instances' in sample
                  else segmentation_panels(image, sample, dataset.metainfo))
        stem = Path(sample.img_path).stem
        path = out_dir / f'{stem}.png'
        if path in written:  # folders may hold files of the same name
            path = out_dir / f'{stem}_{index}.png'
        written.add(path)
        side_by_side(panels).save(path)
        print(f'[{number}/{len(chosen)}] {path}', flush=True)
    print(f'{len(chosen)} pictures of ground truth and predictions are in {out_dir}/')
