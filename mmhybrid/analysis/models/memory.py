"""What a training step of a config will need of a GPU's memory, and settings that fit."""
from __future__ import annotations

import copy
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmhybrid.analysis.memory import Memory, Peak
from mmhybrid.analysis.pretended_gpu import backward, pretended_gpu
from mmhybrid.engine.sharding import units
from mmhybrid.errors import UserError
from mmhybrid.registry import MODELS, find_type

from .source import ModelSource, build_model

__all__ = ['Prediction', 'Proposal', 'Step', 'format_proposals', 'predict', 'proposals',
           'states_per_value', 'step_of', 'usable']

GIB = 1 << 30
#: What is left alone of a GPU: CUDA's context with the kernels of libraries, about half a GiB, and
#: memory that the allocator has reserved and cannot hand out in the pieces that are asked for.
CONTEXT, FRAGMENTS = GIB // 2, 0.06
# Values that an optimizer keeps for each parameter.
_STATES = {'AdamW': 2, 'Adam': 2, 'NAdam': 2, 'RAdam': 2, 'Adamax': 2, 'RMSprop': 1, 'Lion': 1,
           'SGD': 0, 'Adagrad': 1}
#: What bitsandbytes keeps in float32 all the same: smaller tensors.
LEAST_EIGHT_BIT = 4096


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        batch: images on the GPU.
        size: (height, width) of the padded batch.
        dtype: of autocast; float32 without it.
        options: changes of ``model.backbone``.
        ranks: processes that divide the model among themselves (``--fsdp``); 1 for none.
    """

    batch: int
    size: tuple[int, int]
    dtype: torch.dtype
    options: tuple[tuple[str, object], ...] = ()
    ranks: int = 1

    def with_batch(self, batch: int) -> Step:
        """The same with another number of images."""
        return replace(self, batch=batch)


@dataclass(frozen=True)
class Prediction:
    """Bytes of a step.

    Attributes:
        step: what was asked.
        peak: the moment of the largest use.
        persistent: parameters, buffers, optimizer states and averages, which stay between steps.
    """

    step: Step
    peak: Peak
    persistent: int


def step_of(source: ModelSource, batch: int | None = None, size: Sequence[int] | None = None,
            dtype: str | None = None) -> Step:
    """The step that a config trains with, where the command line does not say otherwise.

    Raises:
        UserError: the config does not say it either.
    """
    cfg = source.config or Config()
    batch = batch or cfg.get('train_dataloader', {}).get('batch_size')
    if not batch:
        raise UserError(f'{source.name} has no train_dataloader.batch_size; give --batch.')
    size = tuple(size) if size else _largest_size(source)
    return Step(batch, (size[0], size[-1]), _dtype(cfg, dtype))


def _dtype(cfg: ConfigDict, asked: str | None) -> torch.dtype:
    if asked:
        return getattr(torch, asked)
    wrapper = cfg.get('optim_wrapper', {})
    kind = str(wrapper.get('type'))
    off = kind.startswith('mmhybrid.') and wrapper.get('dtype', 'float16') is None  # ours: float32
    if 'Amp' not in kind or off:
        return torch.float32
    return getattr(torch, wrapper.get('dtype') or 'float16')


def _largest_size(source: ModelSource) -> tuple[int, int]:
    """Height and width of the largest batch that the training pipeline makes."""
    cfg = source.config or {}
    about = cfg.get('model', {}).get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if about.get('size'):
        return tuple(about.size)
    pipeline = _pipeline(cfg.get('train_dataloader', {}).get('dataset', {}))
    sizes = list(_sizes(pipeline))
    if not sizes:
        raise UserError(f'The training pipeline of {source.name} names no size of its images; '
                        'give --size HEIGHT WIDTH.')
    divisor = about.get('pad_size_divisor') or 1
    height, width = max(sizes, key=lambda pair: pair[0] * pair[1])
    return tuple(-(-side // divisor) * divisor for side in (height, width))


def _pipeline(dataset: dict) -> list:
    while dataset and not dataset.get('pipeline') and dataset.get('dataset'):
        dataset = dataset['dataset']
    return dataset.get('pipeline') or []


def _sizes(transforms) -> Iterator[tuple[int, int]]:
    """(Height, width) of what follows the last crop to a fixed size, else of all scales."""
    found: list[tuple[int, int]] = []
    for transform in transforms:
        if isinstance(transform, (list, tuple)):
            found += _sizes(transform)
        elif 'transforms' in transform:
            found += _sizes(transform['transforms'])
        elif transform['type'].endswith('TimmTransform'):
            found = [_pair(transform.get('input_size', 224))]
        elif transform['type'].endswith('ResizedCrop'):
            found = [_pair(transform['scale'])]
        elif transform['type'].endswith('Resize'):
            scales = transform.get('scales') or transform.get('scale') or ()
            scales = [scales] if scales and not isinstance(scales[0], (list, tuple)) else scales
            # (width, height), of which the longer side is the image's longer one
            found += [(min(scale), max(scale)) for scale in scales]
        elif transform['type'].endswith('RandomCrop') and transform.get(
                'crop_type', 'absolute') == 'absolute':
            found = [_pair(transform['crop_size'])]
    yield from found


def _pair(size) -> tuple[int, int]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def predict(source: ModelSource, step: Step, positive: float | None = None) -> Prediction:
    """Follow one step in shapes alone.

    A two-stage detector's heads see as many regions as ``train_cfg`` samples; a segmentor's losses
    are taken at the size of the labels. Targets and proposals of detectors are left out.

    Args:
        source: of :func:`mmhybrid.analysis.models.source.find_model`.
        step: of :func:`step_of`.
        positive: share of a detector's sampled regions that have a mask; None for the most that
            ``train_cfg`` allows, which a training on crowded images comes to.

    Raises:
        UserError: the model cannot be built, or cannot run on such images.
    """
    cfg = copy.deepcopy(source.cfg)
    backbone = cfg.get('backbone', cfg)
    backbone.update(dict(step.options))
    model = build_model(ModelSource(source.name, cfg, source.config), 'meta')
    model.train()
    config = source.config or Config()
    memory = Memory(config.get('env_cfg', {}).get('cudnn_benchmark', False))
    with pretended_gpu():
        model.to_empty(device='cuda')
        trained = [p for p in model.parameters() if p.requires_grad]
        kept = _held(memory, model, trained, config, step.ranks)
        images = torch.empty(step.batch, _channels(backbone), *step.size, device='cuda')
        persistent = memory.in_use
        kept += _divided(memory, model, step.ranks) if step.ranks > 1 else []
        memory.hold(images, 'images')
        try:
            with memory:
                with torch.autocast('cuda', step.dtype, enabled=step.dtype != torch.float32):
                    loss = _loss(model, images, positive)
                with memory.making('backward pass'):
                    backward(loss)
        except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
            raise UserError(
                f'{source.name} cannot run on {step.batch} images of {step.size[0]} x '
                f'{step.size[1]} without data: {type(error).__name__}: {error}\nTry another '
                '--size, or the class of the backbone in place of the config (--traceback shows '
                'where).') from error
    weights = sum(p.numel() * p.itemsize for p in trained) // step.ranks
    peaks = [
        memory.peak,
        _without_states(memory.tried),
        # Steps over many tensors at once keep one more value of each parameter for a moment.
        Peak(persistent + 2 * weights, 'optimizer step', weights, {'gradients': weights}),
    ]
    del kept
    return Prediction(step, max(peaks, key=lambda peak: peak.bytes), persistent)


def _held(memory: Memory, model: nn.Module, trained: list[Tensor], config: Config, ranks: int
          ) -> list[Tensor]:
    """What is there when a step begins."""
    made = [] if ranks == 1 else [_piece(p, ranks) for p in model.parameters()]
    memory.hold([made or [*model.parameters()], *model.buffers()], 'model')
    states = [_piece(p, ranks, _state_dtype(config, p))
              for p in trained for _ in range(states_per_value(config))]
    memory.hold(states, 'optimizer')
    averages = []
    if any('EMA' in str(hook.get('type')) for hook in config.get('custom_hooks') or ()):
        averages = [torch.empty_like(x) for x in model.state_dict().values()]
        memory.hold(averages, 'averaged model')
    if config.get('optim_wrapper', {}).get('accumulative_counts', 1) > 1:
        waiting = [_piece(p, ranks) for p in trained]
        if ranks == 1:
            for parameter, gradient in zip(trained, waiting, strict=True):
                parameter.grad = gradient
        memory.hold(waiting, 'gradients')
        made += waiting
    return made + states + averages


def _piece(parameter: Tensor, ranks: int, dtype: torch.dtype | None = None) -> Tensor:
    """As much as one of several processes holds of a parameter, or of a state as large."""
    if ranks == 1:
        return torch.empty_like(parameter, dtype=dtype)
    return parameter.new_empty(-(-parameter.numel() // ranks), dtype=dtype)


def _divided(memory: Memory, model: nn.Module, ranks: int) -> list[Tensor]:
    """What a step puts together: two units at a time, of which one computes; all else for good.

    Gradients of a unit are divided when they are complete.
    """
    sizes = {unit: sum(p.numel() for p in unit.parameters()) for unit in units(model)}
    in_units = {p for unit in sizes for p in unit.parameters()}
    rest = [p for p in model.parameters() if p not in in_units]
    made = [rest[0].new_empty(sum(sorted(sizes.values())[-2:]))]
    memory.hold([*rest, *made], 'parts put together')

    def divide(parameter: Tensor) -> None:
        with memory.making('gradients'):
            made.append(_piece(parameter, ranks))
        parameter.grad = None

    for p in in_units:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(divide)
    return made


def _without_states(peak: Peak) -> Peak:
    """In the first step, where cuDNN tries its ways, the optimizer keeps nothing yet."""
    parts = dict(peak.parts)
    size = peak.bytes - parts.pop('optimizer', 0)
    return replace(peak, bytes=size, operator='the first step (env_cfg.cudnn_benchmark)',
                   parts=parts)


def states_per_value(config: Config) -> int:
    """Float32 values that the optimizer of a config keeps for each one that it trains."""
    optimizer = config.get('optim_wrapper', {}).get('optimizer', {})
    states = _STATES.get(_optimizer(config).removeprefix('Paged').removesuffix('8bit'), 2)
    return states + bool(optimizer.get('momentum')) + bool(optimizer.get('amsgrad'))


def _state_dtype(config: Config, parameter: Tensor) -> torch.dtype:
    eight = _optimizer(config).endswith('8bit') and parameter.numel() >= LEAST_EIGHT_BIT
    return torch.uint8 if eight else parameter.dtype


def _optimizer(config: Config) -> str:
    optimizer = config.get('optim_wrapper', {}).get('optimizer', {})
    return str(optimizer.get('type', 'AdamW')).rpartition('.')[2]


def _channels(backbone: ConfigDict) -> int:
    return backbone.get('in_channels', backbone.get('in_chans', 3))


# --- losses ---------------------------------------------------------------------------------------


def _loss(model: nn.Module, images: Tensor, positive: float | None) -> Tensor:
    if getattr(model, 'roi_head', None) is not None:
        return _two_stages(model, images, positive)
    if hasattr(model, 'decode_head'):
        return _segmentor(model, images)
    if hasattr(model, 'bbox_head'):
        return _mean(model.bbox_head(model.extract_feat(images)))
    return _mean(model(images))


def _mean(results) -> Tensor:
    return sum(x.float().mean() for x in tree_leaves(results) if isinstance(x, Tensor))


def _segmentor(model: nn.Module, images: Tensor) -> Tensor:
    from mmengine.structures import PixelData
    from mmseg.models.decode_heads import decode_head
    from mmseg.structures import SegDataSample

    size = tuple(images.shape[2:])
    labels = torch.empty(1, *size, dtype=torch.long, device='cuda')
    samples = [SegDataSample(gt_sem_seg=PixelData(data=labels)) for _ in images]
    with mock.patch.object(decode_head, 'accuracy', lambda *_, **__: images.new_zeros(1)):
        maps = model.extract_feat(images)
        heads = [model.decode_head]
        if model.with_auxiliary_head:
            auxiliary = model.auxiliary_head
            heads += auxiliary if isinstance(auxiliary, nn.ModuleList) else [auxiliary]
        losses = [head.loss(maps, samples, model.train_cfg) for head in heads]
    return sum(value for one in losses for name, value in one.items() if 'loss' in name)


def _two_stages(model: nn.Module, images: Tensor, positive: float | None) -> Tensor:
    """The parts of a two-stage detector, on regions that are counted and not found."""
    head = model.roi_head
    maps = model.extract_feat(images)
    loss = _mean(model.rpn_head(maps)) if model.with_rpn else 0
    stages = getattr(head, 'num_stages', 1)
    train = model.train_cfg.rcnn
    for stage in range(stages):
        about = train[stage] if isinstance(train, (list, tuple)) else train
        if 'num' in about.sampler:  # others relabel what an earlier stage has sampled
            sampler = about.sampler
        boxes = sampler.num
        share = sampler.get('pos_fraction', 1) if positive is None else positive
        for part, count in (('bbox', boxes), ('mask', int(boxes * share))):
            if getattr(head, f'with_{part}'):
                loss = loss + _on_regions(head, part, stage, maps, count * len(images))
    return loss


def _on_regions(head: nn.Module, part: str, stage: int, maps, count: int) -> Tensor:
    extractor, module = (
        x[stage] if isinstance(x, nn.ModuleList) else x
        for x in (getattr(head, f'{part}_roi_extractor'), getattr(head, f'{part}_head'))
    )
    used = [*maps[:len(extractor.featmap_strides)]]
    regions = _Regions.apply(count, extractor.roi_layers[0].output_size, *used)
    if head.with_shared_head:
        regions = head.shared_head(regions)
    return _mean(module(regions))


class _Regions(torch.autograd.Function):
    """Regions of maps: RoIAlign's results and gradients in shapes, from no matter where."""

    @staticmethod
    def forward(ctx, count, size, *maps):
        ctx.maps = [(x.shape, x.dtype) for x in maps]
        return maps[0].new_empty(count, maps[0].shape[1], *size)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, *(gradient.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.maps)


# --- what fits ------------------------------------------------------------------------------------

# Settings of backbones that trade time for memory, cheapest first; what each needs to be tried.
_SAVING = ((('lean_mixer', True),), (('with_cp', True),))


@dataclass(frozen=True)
class Proposal:
    """A way to train, and how many images fit.

    Attributes:
        prediction: at the batch that was asked for.
        largest: most images; 0 when not even one fits.
        at_largest: peak bytes then, as far as memory grows with images evenly.
    """

    prediction: Prediction
    largest: int
    at_largest: int


def usable(gib: float) -> int:
    """Bytes of a GPU that tensors can take."""
    return int(gib * GIB * (1 - FRAGMENTS)) - CONTEXT


def proposals(source: ModelSource, step: Step, gib: float) -> list[Proposal]:
    """The config's own settings, and each that saves memory and that its backbone has.

    Memory is predicted for the batch asked for and one image more, and taken to grow evenly.
    """
    backbone = source.cfg.get('backbone', source.cfg)
    known = _arguments(source, backbone)
    found = []
    for options in ((), *_SAVING):
        if all(name in known and backbone.get(name) != value for name, value in options):
            found.append(_proposal(source, replace(step, options=options), usable(gib)))
    return found


def _arguments(source: ModelSource, backbone: ConfigDict) -> set[str]:
    cls = find_type(backbone, MODELS, source.scope)
    return set() if cls is None else {*inspect.signature(cls.__init__).parameters}


def _proposal(source: ModelSource, step: Step, limit: int) -> Proposal:
    asked = predict(source, step)
    each = predict(source, step.with_batch(step.batch + 1)).peak.bytes - asked.peak.bytes
    more = (limit - asked.peak.bytes) // max(each, 1)
    largest = max(0, step.batch + more)
    return Proposal(asked, largest, asked.peak.bytes + each * (largest - step.batch))


def format_proposals(name: str, found: Sequence[Proposal], gib: float) -> str:
    """A text for people."""
    own = found[0].prediction
    step, peak = own.step, own.peak
    height, width = step.size
    images = f"{step.batch} image{'s' * (step.batch > 1)}"
    dtype = str(step.dtype).removeprefix('torch.')
    among = f', the model divided among {step.ranks} processes' * (step.ranks > 1)
    parts = ', '.join(f'{key} {_gib(size)}' for key, size in peak.parts.items())
    lines = [
        f'{name}: a training step on {images} of {height} x {width} in {dtype}{among}',
        f'  predicted peak {_gib(peak.bytes)} GiB, during {peak.operator} ({parts}, '
        f'only then {_gib(peak.temporary)})',
        f'  {_gib(own.persistent)} GiB stay between steps',
        '',
        f'  of {gib:g} GiB, {_gib(usable(gib))} for tensors:',
        f"  {'settings':28} {images + ', GiB':>14}   most images",
    ]
    for one in found:
        settings = ' '.join(f'{key}={value}' for key, value in one.prediction.step.options)
        most = f'{one.largest} ({_gib(one.at_largest)} GiB)' if one.largest else 'none fits'
        lines.append(f"  {settings or 'as configured':28} "
                     f'{_gib(one.prediction.peak.bytes):>14}   {most}')
    lines += ['', *textwrap.wrap(
        'A prediction from shapes; nothing has run. Left out: the CUDA context and what the '
        f'allocator cannot use ({_gib(CONTEXT)} GiB and {FRAGMENTS:.0%} are set aside), targets '
        'and proposals of detectors, buffers of DDP (once the gradients), and cuDNN where it picks '
        'hungrier ways. Settings go under model.backbone.', 100)]
    return '\n'.join(lines)


def _gib(size: int) -> str:
    return f'{size / GIB:.2f}'
