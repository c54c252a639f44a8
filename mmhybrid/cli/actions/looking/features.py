"""What layers of a model make of pictures."""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmhybrid.visualization import as_colors, draw_map, sheet

from .opening import Folder, Input, as_map, find_layers, open_run, outputs_of, pictures_of, prepare

__all__ = ['draw_features']

_SIDE = 240  # pixels of a panel
_CHANNELS = 4


def draw_features(args: argparse.Namespace) -> None:
    """Draw maps of the layers that ``args`` of ``mmhybrid visualize`` name."""
    predictor = open_run(args, with_data=not args.images)
    layers = find_layers(predictor.model, args.layer or ['backbone'])
    paths = pictures_of(args, predictor)
    folder = Folder(args, 'features')
    for number, path in enumerate(paths, start=1):
        given = prepare(predictor, path)
        with torch.no_grad(), outputs_of(layers) as outputs:
            predictor.model(**given.data, mode='predict')
        maps = {name: as_map(name, output, given.padded) for name, output in outputs.items()}
        rows = [_row(name, given.cut(features).float().cpu().numpy())
                for name, features in maps.items()]
        target = folder.new(Path(path).stem)
        sheet([[('the picture', _small(given))], *rows],
              f'{Path(path).name}: strength, three principal components as colours, and the '
              f'{_CHANNELS} channels that vary most').save(target)
        print(f'[{number}/{len(paths)}] {target}', flush=True)
    print(f'Maps of {", ".join(layers)} for {len(paths)} pictures are in {folder.path}/')


def _small(given: Input) -> Image.Image:
    picture = Image.fromarray(given.picture.rgb())
    scale = _SIDE / max(picture.size)
    return picture.resize([max(1, round(scale * side)) for side in picture.size], Image.BICUBIC)


def _row(name: str, features: np.ndarray) -> list[tuple[str, Image.Image]]:
    count, height, width = features.shape
    varied = np.argsort(-features.reshape(count, -1).var(axis=1), kind='stable')[:_CHANNELS]
    strength = np.sqrt((features.astype(np.float64) ** 2).mean(axis=0))
    return [(f'{name}: {count} x {height} x {width}', draw_map(strength, _SIDE)),
            ('components', draw_map(as_colors(features), _SIDE)),
            *((f'channel {channel}', draw_map(features[channel], _SIDE)) for channel in varied)]
