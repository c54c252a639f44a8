"""What every kind of picture begins with: a model, pictures, and the layers that are looked at."""
from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor, nn

from mmhybrid.datasets.loading.checks import check_classes, check_data
from mmhybrid.engine.config import load_config, redirect_data
from mmhybrid.errors import UserError, check_given
from mmhybrid.prediction.loading import find_checkpoint
from mmhybrid.prediction.predictor import Picture, Predictor, load
from mmhybrid.prediction.sources import find_items
from mmhybrid.spelling import did_you_mean, nearest_few

__all__ = ['Folder', 'Input', 'as_map', 'build_test_set', 'evenly', 'find_layers', 'image_files',
           'open_run', 'outputs_of', 'pictures_of', 'prepare', 'without_masks']


def open_run(args: argparse.Namespace, with_data: bool) -> Predictor:
    """The model that the arguments CONFIG CHECKPOINT, or a run or checkpoint alone, name.

    Args:
        args: of ``mmhybrid visualize``.
        with_data: whether its test set is needed, which then is checked first.

    Raises:
        UserError: if there is no such model, or its test set is not as it should be.
    """
    check_given(args, 'config', 'checkpoint', 'data_root', 'out_dir')
    if args.num < 1:
        raise UserError(f'--num is {args.num}; expected at least 1 picture.')
    if args.checkpoint.lower().endswith('.onnx'):
        raise UserError(f'{args.checkpoint} is an exported model, which has no layers to look into '
                        'and no test set; give the checkpoint that it was made from.')
    options = dict(args.cfg_options or {})
    if args.config:
        cfg, _ = load_config(args.config, options, args.data_root)
        _check(cfg, with_data)
        root = args.data_root or options.get('data_root')
    else:
        root = args.data_root or options.pop('data_root', None)
    predictor = load(args.checkpoint, args.config, options=options)
    if root is not None:
        redirect_data(predictor.cfg, root)
    if not args.config:
        _check(predictor.cfg, with_data)
    for note in predictor.notes:
        print(f'note: {note.rstrip(".")}.', file=sys.stderr)
    return predictor


def _check(cfg: Config, with_data: bool) -> None:
    if cfg.get('default_scope') not in ('mmdet', 'mmseg'):
        raise UserError('There is nothing to draw over the images of a classifier. tools/test.py '
                        '--out FILE.pkl writes its predictions.')
    if not with_data:
        return
    if not cfg.get('test_dataloader'):
        raise UserError('The config has no test_dataloader, so there is no set to look at. Set it, '
                        'or name pictures with --images where that is possible.')
    check_data(cfg, ['test'])
    for warning in check_classes(cfg, ['test']):
        print(f'WARNING: {warning}', file=sys.stderr)


def build_test_set(cfg: Config):
    """The data set of ``test_dataloader``."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return DATASETS.build(cfg.test_dataloader.dataset)


class Folder:
    """Where pictures go.

    Args:
        args: of ``mmhybrid visualize``.
        name: of the folder beside the checkpoint (here, if that has an address), unless
            ``--out-dir`` says where.
    """

    def __init__(self, args: argparse.Namespace, name: str):
        found, _ = find_checkpoint(args.checkpoint)
        beside = Path(name) if '://' in found else Path(found).expanduser().parent / name
        self.path = Path(args.out_dir).expanduser() if args.out_dir else beside
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'{self.path} cannot be made a folder: {error.strerror}. Name another '
                            'one with --out-dir.') from error
        self.written: set[Path] = set()

    def new(self, stem: str, other: str = '') -> Path:
        """Path of a PNG that this run has not written yet.

        Args:
            stem: its name.
            other: what is added if that is taken, as folders may hold files of the same name.
        """
        path = self.path / f'{stem}.png'
        number = 1
        while path in self.written:
            path = self.path / f'{stem}_{other or number}.png'
            other, number = '', number + 1
        self.written.add(path)
        return path


def evenly(count: int, wanted: int) -> list[int]:
    """Indices of ``wanted`` things, evenly spread over ``count``."""
    return np.unique(np.linspace(0, count - 1, wanted).astype(int)).tolist() if count else []


def pictures_of(args: argparse.Namespace, predictor: Predictor) -> list[str]:
    """Paths of the pictures to look at: of ``--images``, else of the test set.

    Raises:
        UserError: for what is not a picture, and if there are none.
    """
    if args.images:
        paths = image_files(args.images)
    else:
        dataset = build_test_set(predictor.cfg)
        paths = [dataset.get_data_info(index)['img_path'] for index in range(len(dataset))]
    if not paths:
        raise UserError('The test set holds no images, so there is nothing to look at.')
    return [paths[index] for index in evenly(len(paths), args.num)]


def image_files(sources: Sequence[str]) -> list[str]:
    """Paths of pictures that ``--images`` names: files, folders, patterns, lists.

    Raises:
        UserError: for a source that is none of these.
    """
    items, notes = find_items(sources)
    other = next((item for item in items if item.kind != 'image'), None)
    if other is not None:
        raise UserError('--images takes pictures, folders, patterns and lists of pictures; '
                        f'{other} is none of these but of the kind "{other.kind}".')
    for note in notes:
        print(f'note: {note}.', file=sys.stderr)
    return [item.path for item in items]


# --- what the model gets --------------------------------------------------------------------------

@dataclass
class Input:
    """A picture on its way into a model.

    Attributes:
        picture: as it was read.
        data: what the model's ``forward`` takes, for one image: 'inputs' and 'data_samples'.
        padded: height and width of the inputs.
        filled: height and width of that part of them that is the picture, at the upper left.
    """

    picture: Picture
    data: dict
    padded: tuple[int, int]
    filled: tuple[int, int]

    def over_picture(self, values: Tensor) -> np.ndarray:
        """A map (h, w) of the inputs, of any stride, as (H, W) float32 over the picture."""
        values = values.detach().float().cpu()[None, None]
        values = F.interpolate(values, self.padded, mode='bilinear', align_corners=False)
        values = values[..., :self.filled[0], :self.filled[1]]
        return F.interpolate(values, self.picture.size, mode='bilinear', align_corners=False
                             )[0, 0].numpy()

    def cut(self, values: Tensor) -> Tensor:
        """The part of a map (..., h, w) of the inputs that shows the picture."""
        height, width = (max(1, -(-cells * part // whole)) for cells, part, whole in zip(
            values.shape[-2:], self.filled, self.padded, strict=True))
        return values[..., :height, :width]


def prepare(predictor: Predictor, path: str) -> Input:
    """Read a picture and bring it into the form in which the model gets it.

    Raises:
        UserError: if it cannot be read.
    """
    picture = predictor.read(path)
    data = predictor.model.data_preprocessor(
        pseudo_collate([predictor.packed(picture.data)]), False)
    inputs, sample = data['inputs'], data['data_samples'][0]
    return Input(picture, data, tuple(inputs.shape[-2:]), tuple(sample.img_shape[:2]))


# --- layers ---------------------------------------------------------------------------------------

def find_layers(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Modules by their names.

    Raises:
        UserError: for a name that no module has, with those that are near.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            parts = ', '.join(key for key, _ in model.named_children())
            raise UserError(f'The model has no layer {name!r}.'
                            + (did_you_mean(*nearest_few(name, modules)) or
                               f' Its parts are {parts}; layers have names such as backbone or '
                               'backbone.patch_embed.'))
    return {name: modules[name] for name in names}


@contextmanager
def outputs_of(layers: dict[str, nn.Module], leaves: bool = False) -> Iterator[dict[str, Tensor]]:
    """Listen to layers while a model runs.

    Args:
        layers: by name.
        leaves: let the graph begin with these tensors, so that there are gradients for them; not
            with those that depend on others of them.

    Yields:
        The tensors, filled in while the model runs: by the name of the layer, with a number behind
        it where a layer returns several, or is called several times.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    tensors: dict[str, Tensor] = {}

    def listen(name):
        def hook(module, args, output):
            def each(value):
                if isinstance(value, Tensor) and value.is_floating_point():
                    if leaves and not value.requires_grad:
                        value = value.detach().requires_grad_()
                    found[name].append(value)
                    # what follows may write to it
                    return value.clone() if leaves else value
                if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
                    return type(value)(map(each, value))
                if type(value) is dict:
                    return {key: each(item) for key, item in value.items()}
                return value
            return each(output)
        return hook

    handles = [layer.register_forward_hook(listen(name)) for name, layer in layers.items()]
    try:
        yield tensors
    finally:
        for handle in handles:
            handle.remove()
        for name, values in found.items():
            for number, value in enumerate(values):
                tensors[name if len(values) == 1 else f'{name}[{number}]'] = value


def as_map(name: str, output: Tensor, padded: tuple[int, int]) -> Tensor:
    """What a layer returns for one image, as a map (C, h, w) of the inputs.

    Args:
        name: of the layer.
        output: (1, C, h, w), (1, h, w, C) or (1, h w, C).
        padded: height and width of the inputs.

    Raises:
        UserError: if it is none of these.
    """
    shape = tuple(output.shape)
    if shape[:1] == (1,) and output.numel():
        if output.dim() == 4 and _covers(shape[2:], padded):
            return output[0]
        if output.dim() == 4 and _covers(shape[1:3], padded):
            return output[0].permute(2, 0, 1)
        if output.dim() == 3:
            for stride in (4, 8, 16, 32, 64, 2, 1):
                height, width = (-(-side // stride) for side in padded)
                if height * width == shape[1]:
                    return output[0].mT.unflatten(1, (height, width))
    raise UserError(f'The layer {name} returns {shape} for an input of {padded[0]} x {padded[1]} '
                    'pixels, which is no map of the picture; expected (1, C, h, w), (1, h, w, C) '
                    'or (1, h w, C). Choose another one with --layer, such as backbone or neck.')


def _covers(cells: tuple[int, int], padded: tuple[int, int]) -> bool:
    """Whether a map of so many cells has one stride in both directions, or nearly."""
    strides = {max(1, round_(side / cell)) for side, cell in zip(padded, cells, strict=True)
               for round_ in (math.floor, math.ceil)}
    return any(all(cell in (side // stride, -(-side // stride))
                   for side, cell in zip(padded, cells, strict=True)) for stride in strides)


@contextmanager
def without_masks(model: nn.Module) -> Iterator[None]:
    """Masks of objects at the size of the picture cost most of the time, and explain nothing."""
    head = getattr(model, 'roi_head', None)
    if not isinstance(getattr(head, 'mask_head', None), nn.Module):
        yield
        return
    masks, head.mask_head = head.mask_head, None
    try:
        yield
    finally:
        head.mask_head = masks
