"""Parameters and multiply-accumulates of whole models."""
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmhybrid.analysis import CONVENTIONS, Cost, Record, count_macs, summarize
from mmhybrid.errors import UserError
from mmhybrid.layers import LocalSS2D
from mmhybrid.ops.cross_scan import cross_selective_scan, scan_plan

from .source import ModelSource, build_model, takes_samples

__all__ = ['measure']

# Heads of which it is known how often their parts run.
_ROI_HEADS = ('StandardRoIHead', 'CascadeRoIHead', 'OneMaskCascadeRoIHead')


def measure(source: ModelSource, shape: Sequence[int], convention: str = 'all',
            depth: int | None = 2) -> Cost:
    """Count one image of a model.

    Args:
        source: of :func:`mmhybrid.analysis.models.source.find_model`.
        shape: (height, width) of the image as the network sees it, padding included.
        convention: name in :data:`mmhybrid.analysis.CONVENTIONS`.
        depth: see :func:`mmhybrid.analysis.summarize`.

    Returns:
        Cost: of one forward pass in eval mode. A segmentor runs without its auxiliary head, whose
        parameters count; a detector runs up to its raw predictions.

    Raises:
        UserError: if the model cannot be built or run, or the convention does not fit it.
    """
    if convention not in CONVENTIONS:
        raise UserError(f'--convention got {convention!r}; expected one of '
                        f'{", ".join(CONVENTIONS)}.')
    try:
        counted = _count(source, shape, convention, 'meta')
    except _NeedsNumbers:
        counted = _count(source, shape, convention, 'cpu')
        counted[2].append('really computed on the CPU, because the model looks at numbers')
    model, records, notes = counted
    rows = summarize(model, records, convention, depth)
    if CONVENTIONS[convention].longest:  # nobody pays for that here
        records = _count(source, shape, 'mmdet2', 'meta')[1]
    return Cost(source.name, (_channels(source), *shape), convention, rows,
                sum(record.macs for record in records), notes)


class _NeedsNumbers(Exception):
    """The model does something that shapes alone cannot answer."""


def _count(source: ModelSource, shape: Sequence[int], convention: str, device: str
           ) -> tuple[nn.Module, list[Record], list[str]]:
    model = build_model(source, device)
    model.eval()  # not in one line: many backbones of mmdet return nothing
    rule = CONVENTIONS[convention]
    if rule.blocks and not {type(module).__name__ for module in model.modules()} & {*rule.blocks}:
        raise UserError(f'--convention {convention} counts as {rule.text.partition(":")[0]} do, '
                        f'and {source.name} has no block of theirs. Use --convention all.')
    for module in model.modules():
        # whatever a config or the environment wants to scan with: shapes need no device for it
        if type(module).__module__.startswith('mmhybrid.') and hasattr(module, 'backend'):
            module.backend = 'torch'
            if hasattr(module, 'fused'):
                module.fused = False
        if rule.longest and isinstance(module, LocalSS2D):
            module.scan_directions = functools.partial(_scan_longest, module)
    image = torch.zeros(1, _channels(source), *shape, device=device)
    notes: list[str] = []
    try:
        return model, count_macs(
            model, lambda: _forward(model, image, rule.rois, notes)), notes
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
        if device == 'meta' and ('meta tensor' in str(error) or 'Meta' in str(error)):
            raise _NeedsNumbers from error
        raise UserError(
            f'{source.name} cannot run on a {shape[0]} x {shape[1]} image without data: '
            f'{type(error).__name__}: {error}\nTry another --shape, or --backbone-only '
            '(--traceback shows where).') from error


def _scan_longest(mixer: LocalSS2D, x: Tensor, rates: Tensor, merge: bool, backend: str
                  ) -> list[Tensor]:
    """Stand for ``scan_directions``: the cost of padded sequences, and results of no meaning."""
    plan = scan_plan(mixer.directions, *x.shape[-2:], x.device)
    length, directions = max(order.length for order in plan.orders), len(plan.directions)
    y = cross_selective_scan(
        x.new_zeros(*x.shape[:2], length), mixer.x_proj_weight, mixer.dt_projs_weight,
        rates, mixer.Ds, mixer.dt_projs_bias.flatten(),
        scan_plan(['h'] * directions, 1, length, x.device), backend=backend)
    return [y[:, None, :, :plan.num_tokens].expand(-1, directions, -1, -1)]


def _channels(source: ModelSource) -> int:
    backbone = source.cfg.get('backbone') or source.cfg
    return backbone.get('in_channels', backbone.get('in_chans', 3))


def _forward(model: nn.Module, image: Tensor, rois: str, notes: list[str]) -> None:
    if getattr(model, 'roi_head', None) is not None:
        _two_stages(model, image, rois, notes)
    elif takes_samples(model):
        if getattr(model, 'with_auxiliary_head', False):
            notes.append('without the auxiliary head, which only training runs; its parameters '
                         'count')
        model(image, [_sample(image)], mode='tensor')
    else:
        model(image)


def _sample(image: Tensor) -> BaseDataElement:
    """What heads may ask about an image."""
    size = tuple(image.shape[2:])
    return BaseDataElement(metainfo=dict(
        img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
        scale_factor=(1.0, 1.0)))


def _two_stages(model: nn.Module, image: Tensor, rois: str, notes: list[str]) -> None:
    """The parts of a two-stage detector one after the other, as regions depend on real scores."""
    head = model.roi_head
    kind = next(cls.__name__ for cls in type(head).__mro__ if 'forward' in vars(cls))
    if kind not in _ROI_HEADS:
        raise UserError(f'There is no rule for how often the parts of {type(head).__name__} run '
                        f'(known: {", ".join(_ROI_HEADS)}). Use --backbone-only.')
    maps = model.extract_feat(image)
    if model.with_rpn:
        model.rpn_head(maps)
    boxes, masks = _regions(model, rois, kind != 'StandardRoIHead')
    counted = []
    for part, what, count in (('bbox', 'boxes', boxes), ('mask', 'masks', masks)):
        if not getattr(head, f'with_{part}'):
            continue
        parts = getattr(head, f'{part}_head')
        stages = len(parts) if isinstance(parts, nn.ModuleList) else 1
        counted.append(f'{count} {what}' + (f' in each of {stages} stages' if stages > 1 else ''))
        for stage in range(stages):
            extractor = _of_stage(getattr(head, f'{part}_roi_extractor'), stage)
            size = extractor.roi_layers[0].output_size
            regions = image.new_empty(count, extractor.out_channels, *size)
            if head.with_shared_head:
                regions = head.shared_head(regions)
            _of_stage(parts, stage)(regions)
    notes.append(f'heads on {" and ".join(counted)}')


def _of_stage(part: nn.Module, stage: int) -> nn.Module:
    return part[stage] if isinstance(part, nn.ModuleList) else part


def _regions(model: nn.Module, rois: str, cascade: bool) -> tuple[int, int]:
    """Boxes and masks per stage."""
    if rois == 'mmdet2':
        return 1000, 100
    boxes = model.test_cfg.rpn.max_per_img if model.with_rpn else 1000
    if rois == 'mmdet3':
        return boxes, boxes if cascade else min(boxes, 100)
    return boxes, min(boxes, model.test_cfg.rcnn.max_per_img)
