"""The text of a config for one's own data."""
from __future__ import annotations

import colorsys
import os.path as osp

from mmhybrid.datasets.exports.preparing import Prepared

from .heads import Head, base_of
from .models import MINI, Backbone
from .plan import Plan, workers

__all__ = ['config_text', 'counted', 'palette_of']


def config_text(prepared: Prepared, backbone: Backbone, head: Head, plan: Plan, name: str,
                data: str, annotations: str, weights: str | None) -> str:
    """A config that trains as it is.

    Args:
        prepared: the data.
        backbone, head, plan: what was chosen.
        name: of the data set, for the work directory.
        data: folder of the images, with '/' at its end.
        annotations: folder of the annotations: absolute, or relative to ``data``; with '/' at its
            end.
        weights: short name, address or file of the backbone's weights; None for random ones.
    """
    semantic = prepared.task == 'semantic'
    base, whole = base_of(head, backbone, prepared.task)
    runtime = f"mmhybrid::_base_/runtime_{'seg' if semantic else 'det'}.py"
    delete = '_delete_=True,' if whole else ''
    bases = f"'{base}'" if whole else f"['{base}', '{runtime}']"
    title = f'# {head.title} with {backbone.name} for {name}: {counted(prepared)}, ' \
            f'{len(prepared.classes)} classes.'
    lines = [title, '# Written by mmhybrid init; change what you like.', f'_base_ = {bases}',
             '', f'work_dir = {f"work_dirs/{name}"!r}', f'data_root = {data!r}',
             f'classes = {_wrapped(tuple(prepared.classes))}']
    if weights:
        lines.append(f'pretrained = {weights!r}')
    lines += ['', *_model(prepared, backbone, head, plan)]
    lines += [''] + (_semantic_data(prepared, plan, annotations, delete) if semantic
                     else _detection_data(prepared, plan, annotations, delete))
    lines += [''] + _schedule(prepared, backbone, head, plan, delete)
    return '\n'.join(lines) + '\n'


def counted(prepared: Prepared) -> str:
    """Pictures in each part, in words."""
    return ' + '.join(f'{len(found)} {split}' for split, found in prepared.splits.items())


def _wrapped(value, indent: str = '    ') -> str:
    """Python's spelling of a tuple or list, in lines of at most 100 columns."""
    text = repr(value)
    if len(text) < 80:
        return text
    rows, row = [], ''
    for item in value:
        if len(row) + len(repr(item)) > 90:
            rows.append(row.rstrip())
            row = ''
        row += f'{item!r}, '
    rows.append(row.rstrip())
    brackets = text[0] + text[-1]
    return brackets[0] + '\n' + ''.join(f'{indent}{row}\n' for row in rows) + brackets[1]


def _backbone(prepared: Prepared, backbone: Backbone, head: Head, plan: Plan) -> str:
    base, _ = base_of(head, backbone, prepared.task)
    long = plan.scale[0]
    if backbone.name == MINI:
        # One window for the whole map, as in the base config.
        windows = f'window_size=(8, 8, {-(-long // 16)}, {-(-long // 32)})'
        if base.startswith('mmhybrid::upernet') or base.startswith('mmhybrid::cascade'):
            return f'backbone=dict({windows}),'
    else:
        windows = "window_size=(8, 8, 112, 56), windows='tight'"
    key = 'name' if backbone.family == 'TimmFeatures' else 'arch'
    parts = [f"type='mmhybrid.{backbone.family}'", f'{key}={_as_dict(backbone.arch)}']
    if backbone.family == 'MambaVision':
        parts.append(windows)
    if backbone.plain:
        parts.append(f'img_size={plan.scale[-1]}')
    if head.maps != (0, 1, 2, 3) and not backbone.plain:
        parts.append(f'out_indices={head.maps}')
    if plan.frozen_norms:
        parts.append('norm_eval=True')
    parts.append(f'drop_path_rate={0.0 if backbone.name == MINI else 0.1}')
    replaced = '' if base.startswith('mmhybrid::') else '_delete_=True, '
    return f'backbone=dict({replaced}{", ".join(parts)}),'


def _as_dict(arch: str | dict) -> str:
    if isinstance(arch, str):
        return repr(arch)
    return f'dict({", ".join(f"{key}={value!r}" for key, value in arch.items())})'


def _model(prepared, backbone, head, plan) -> list[str]:
    lines = [_backbone(prepared, backbone, head, plan)]
    if prepared.task == 'semantic':
        side = plan.scale[1]
        lines.append(f'data_preprocessor=dict(size=({side}, {side})),')
    lines += head.model(backbone, len(prepared.classes), prepared.task, plan.tokens)
    lines[-1] += ')'
    return ['model = dict(', *(f'    {line}' for line in _folded(lines))]


def _folded(lines: list[str]) -> list[str]:
    """Break a long line at its commas."""
    found = []
    for line in lines:
        while len(line) > 94:
            place = line.rfind(', ', 0, 94) + 1
            found.append(line[:place])
            line = ' ' * 8 + line[place:].strip()
        found.append(line)
    return found


def _detection_data(prepared: Prepared, plan: Plan, annotations: str, delete: str) -> list[str]:
    masks = prepared.task == 'instance'
    loading = f"dict(type='LoadAnnotations', with_bbox=True, with_mask={masks}),"
    resize = f"dict(type='Resize', scale={plan.scale}, keep_ratio=True),"
    held = prepared.splits
    lines = ['train_pipeline = [', "    dict(type='LoadImageFromFile'),", f'    {loading}',
             f'    {resize}',
             "    dict(type='RandomFlip', prob=0.5),  # remove it if left and right matter",
             "    dict(type='PackDetInputs')]",
             'test_pipeline = [', "    dict(type='LoadImageFromFile'),", f'    {resize}',
             f'    {loading}', "    dict(type='PackDetInputs', meta_keys=(",
             "        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]"]

    def data(split: str, test: bool) -> list[str]:
        extra = 'test_mode=True, ' if test else 'filter_cfg=dict(filter_empty_gt=False), '
        return [
            "    dataset=dict(type='CocoDataset', data_root=data_root, "
            'metainfo=dict(classes=classes),',
            f"                 ann_file={f'{annotations}{split}.json'!r},",
            "                 data_prefix=dict(img=''),",
            f'                 {extra}pipeline={"test" if test else "train"}_pipeline))']

    lines += [f'train_dataloader = dict({delete}', *_loader(plan.batch, True),
              "    batch_sampler=dict(type='AspectRatioBatchSampler'),", *data('train', False),
              f'val_dataloader = dict({delete}', *_loader(1, False), *data('val', True)]
    lines += ['test_dataloader = val_dataloader'] if 'test' not in held else [
        f'test_dataloader = dict({delete}', *_loader(1, False), *data('test', True)]
    metric = ['bbox', 'segm'] if masks else ['bbox']

    def score(split: str) -> str:
        path = repr(f'{annotations}{split}.json')
        path = path if osp.isabs(annotations) else f'data_root + {path}'
        return (f"dict({_spaced(delete)}type='CocoMetric', metric={metric!r},\n"
                f'    ann_file={path}, classwise=True)')

    return [*lines, f'val_evaluator = {score("val")}', 'test_evaluator = '
            + ('val_evaluator' if 'test' not in held else score('test'))]


def _spaced(delete: str) -> str:
    return delete and f'{delete} '


def _loader(batch: int, train: bool) -> list[str]:
    return [f'    batch_size={batch}, num_workers={workers()}, persistent_workers=True,',
            f"    sampler=dict(type='DefaultSampler', shuffle={train}),"]


def _semantic_data(prepared: Prepared, plan: Plan, annotations: str, delete: str) -> list[str]:
    (long, side), held = plan.scale, prepared.splits
    classes = len(prepared.classes)
    lines = [f'palette = {_wrapped(palette_of(classes))}',
             'train_pipeline = [', "    dict(type='LoadImageFromFile'),",
             "    dict(type='LoadAnnotations'),",
             f"    dict(type='RandomResize', scale=({long}, {side}), ratio_range=(0.5, 2.0), "
             'keep_ratio=True),',
             f"    dict(type='RandomCrop', crop_size=({side}, {side}), cat_max_ratio=0.75),",
             "    dict(type='RandomFlip', prob=0.5),  # remove it if left and right matter",
             "    dict(type='PhotoMetricDistortion'),", "    dict(type='PackSegInputs')]",
             'test_pipeline = [', "    dict(type='LoadImageFromFile'),",
             f"    dict(type='Resize', scale=({long}, {side}), keep_ratio=True),",
             "    dict(type='LoadAnnotations'),", "    dict(type='PackSegInputs')]",
             'data = dict(', "    type='BaseSegDataset', data_root=data_root, "
             'metainfo=dict(classes=classes, palette=palette),',
             '    # Lists have whole names of images, so that their suffixes may differ.',
             "    img_suffix='', seg_map_suffix='.png',",
             f"    data_prefix=dict(img_path='.', seg_map_path={f'{annotations}labels'!r}))"]

    def loader(split: str, train: bool) -> list[str]:
        kind = 'InfiniteSampler' if train else 'DefaultSampler'
        return [f'{"train" if train else split}_dataloader = dict({delete}',
                f'    batch_size={plan.batch if train else 1}, num_workers={workers()}, '
                'persistent_workers=True,',
                f"    sampler=dict(type='{kind}', shuffle={train}),",
                f"    dataset=dict(data, ann_file={f'{annotations}{split}.txt'!r}, "
                f'pipeline={"train" if train else "test"}_pipeline))']

    lines += loader('train', True) + loader('val', False)
    lines += loader('test', False) if 'test' in held else ['test_dataloader = val_dataloader']
    score = f"dict({_spaced(delete)}type='IoUMetric', iou_metrics=['mIoU'])"
    return [*lines, f'val_evaluator = {score}',
            'test_evaluator = val_evaluator']


def palette_of(count: int) -> list[list[int]]:
    """Colours far apart in hue, one per class."""
    return [[round(255 * part) for part in colorsys.hsv_to_rgb(
        (number * 0.618034) % 1, 0.55 + 0.45 * (number % 2), 0.95 - 0.3 * (number % 3 == 2))]
        for number in range(count)]


def _schedule(prepared: Prepared, backbone: Backbone, head: Head, plan: Plan, delete: str
              ) -> list[str]:
    semantic, length = prepared.task == 'semantic', plan.length
    warm = min(500, max(20, length // 20 if semantic else
                        len(prepared.splits['train']) // plan.batch))
    every = max(1, length // 10)
    unit = dict(semantic=('IterBasedTrainLoop', 'max_iters')).get(
        prepared.task, ('EpochBasedTrainLoop', 'max_epochs'))
    cosine = (f'by_epoch=False, begin={warm}, end={length}, T_max={length - warm}' if semantic else
              f'by_epoch=True, begin=0, end={length}, T_max={length},\n'
              '         convert_to_iter_based=True')
    best = dict(semantic='mIoU', instance='coco/segm_mAP', detect='coco/bbox_mAP')[prepared.task]
    return [
        f"train_cfg = dict({_spaced(delete)}type='{unit[0]}',",
        f'    {unit[1]}={length}, val_interval={every})',
        "val_cfg = dict(type='ValLoop')", "test_cfg = dict(type='TestLoop')",
        'param_scheduler = [',
        f"    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end={warm}),",
        f"    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, {cosine})]",
        f'optim_wrapper = dict({delete}',
        "    type='mmhybrid.AmpOptimWrapper', dtype=None, loss_scale='dynamic',",
        "    constructor='mmhybrid.HybridOptimWrapperConstructor', paramwise_cfg=dict("
        "no_decay='ssm'),",
        f"    optimizer=dict(type='AdamW', lr={plan.rate:.3g}, weight_decay=0.05),",
        f'    clip_grad=dict(max_norm={head.clip}))',
        f'auto_scale_lr = dict(enable=False, base_batch_size={plan.batch})',
        f"default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval={every}, "
        f'by_epoch={not semantic},',
        f"    max_keep_ckpts=2, save_best={best!r}, rule='greater'))",
        "custom_hooks = [dict(type='mmhybrid.RandomStateHook')]",
        "custom_imports = dict(imports=['mmhybrid'], allow_failed_imports=False)"]
