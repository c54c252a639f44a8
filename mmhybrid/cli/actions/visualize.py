"""What ``mmhybrid visualize`` does: predictions of a checkpoint next to ground truth."""
from __future__ import annotations

import argparse
from pathlib import Path

import mmcv
import torch
from mmengine.dataset import pseudo_collate

from mmhybrid.visualization import draw_instances, draw_regions, side_by_side

from .looking.opening import Folder, build_test_set, evenly, open_run

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
    predictor = open_run(args, with_data=True)
    dataset = build_test_set(predictor.cfg)
    folder = Folder(args, 'pictures')
    chosen = evenly(len(dataset), args.num)
    for number, index in enumerate(chosen, start=1):
        with torch.no_grad():
            sample = predictor.model.test_step(pseudo_collate([dataset[index]]))[0]
        # As the pipeline reads it: turned upright, with 8 bits.
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        panels = (segmentation_panels(image, sample, dataset.metainfo) if predictor.finds_regions
                  else detection_panels(image, sample, dataset.metainfo, args.score_thr))
        path = folder.new(Path(sample.img_path).stem, str(index))
        side_by_side(panels).save(path)
        print(f'[{number}/{len(chosen)}] {path}', flush=True)
    print(f'{len(chosen)} pictures of ground truth and predictions are in {folder.path}/')
