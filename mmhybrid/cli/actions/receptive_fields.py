"""What ``mmhybrid visualize --receptive-field`` does: pictures of effective receptive fields."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from mmhybrid.analysis.models.source import build_model, find_model
from mmhybrid.analysis.receptive_field import covering_sides, receptive_field
from mmhybrid.engine.checkpoint_check import check_checkpoint_file
from mmhybrid.errors import UserError
from mmhybrid.families import FAMILIES
from mmhybrid.models.checkpoints import load_backbone
from mmhybrid.prediction import load
from mmhybrid.visualization import draw_receptive_fields

from .looking.opening import evenly, image_files

__all__ = ['draw_fields', 'one_of_each']

SHARES = (0.2, 0.5, 0.99)
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours


def one_of_each() -> list[str]:
    """Name a network of each family."""
    return [f'{family.name}:{family.smallest}' for family in FAMILIES.values()]


def draw_fields(args: argparse.Namespace) -> None:
    """Draw the fields of the backbones that ``args`` of ``mmhybrid visualize`` name."""
    if args.num < 1:
        raise UserError(f'--num is {args.num}; expected at least 1 image.')
    if args.size < 32:
        raise UserError(f'--size is {args.size}; expected at least 32 pixels, the largest stride.')
    weights = args.weights or ['-'] * len(args.receptive_field)
    if len(weights) != len(args.receptive_field):
        raise UserError(f'--weights names {len(weights)} files for {len(args.receptive_field)} '
                        'networks of --receptive-field; give one each, and - for random weights.')
    for file in set(weights) - {'-'}:
        check_checkpoint_file(file)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    images = _images(args.images, args.num, args.size).to(device)
    fields = {}
    for spec, file in zip(args.receptive_field, weights, strict=True):
        backbone = _backbone(spec, file, args.size, args.cfg_options).to(device).eval()
        field = receptive_field(backbone, images)
        sides = covering_sides(field, SHARES)
        name = spec if file == '-' else f'{spec}, {Path(file).name}'
        while name in fields:
            name += "'"
        fields[name] = field.numpy()
        print(f'{name}: ' + ', '.join(f'{share:.0%} within {side} x {side}'
                                      for share, side in zip(SHARES, sides, strict=True)),
              flush=True)
    path = Path(args.out_dir or 'work_dirs/receptive_field') / 'receptive_fields.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = 'noise' if args.images is None else ' '.join(Path(each).name for each in args.images)
    draw_receptive_fields(fields, f'{len(images)} images of {args.size} x {args.size}: {kind}'
                          ).save(path)
    print(f'The picture is {path}')


def _backbone(spec: str, file: str, size: int, options: dict | None) -> nn.Module:
    """The network, with the weights of a file unless that is '-'; or that of a run."""
    if not spec.endswith('.py') and Path(spec).expanduser().exists():
        if file != '-':
            raise UserError(f'{spec} has weights of its own; give - instead of --weights {file}.')
        return load(spec, device='cpu', options=options).model.backbone
    source = find_model(spec, options, backbone_only=True)
    source.cfg.setdefault('drop_path_rate', 0.0)
    name = str(source.cfg.type).rpartition('.')[2]
    if name in FAMILIES and FAMILIES[name].is_plain:
        source.cfg.setdefault('img_size', size)
    if name == 'Vim':
        # the map of the last block itself, not what a pyramid pools from it
        source.cfg.setdefault('pyramid', False)
    network = build_model(source, seed=0)
    if file != '-':
        load_backbone(network, file)
    return network


def _images(sources: Sequence[str] | None, count: int, size: int) -> Tensor:
    """Images (count, 3, size, size) as networks see them; noise without sources."""
    if sources is None:
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    files = image_files(sources)
    return torch.stack([_image(files[i], size) for i in evenly(len(files), count)])


def _image(path: str, size: int) -> Tensor:
    try:
        with Image.open(path) as file:
            picture = ImageOps.fit(ImageOps.exif_transpose(file).convert('RGB'), (size, size))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f'{path} is not a picture that can be read: {error}') from error
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - _column(_MEAN)) / _column(_SPREAD)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)
