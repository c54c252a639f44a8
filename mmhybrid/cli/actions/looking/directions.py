"""What each scan direction brings to a place of a picture."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mmhybrid.analysis.models.directions import MIXERS, Response, response
from mmhybrid.errors import UserError
from mmhybrid.layers import SS2D, MambaVisionMixer
from mmhybrid.visualization import draw_heat, mark, sheet

from .opening import Folder, Input, evenly, find_layers, open_run, pictures_of, prepare

__all__ = ['draw_responses']

_ROWS = 4


def draw_responses(args: argparse.Namespace) -> None:
    """Draw what ``args`` of ``mmhybrid visualize`` ask for."""
    predictor = open_run(args, with_data=not args.images)
    mixers = _mixers(predictor.model, args.layer)
    paths = pictures_of(args, predictor)
    folder = Folder(args, 'directions')
    for number, path in enumerate(paths, start=1):
        given = prepare(predictor, path)
        place = _place(args.at, given, path)
        seen = _inputs(predictor.model, mixers, given)
        rows = [_row(name, response(mixers[name], *seen[name], _token(place, given)), given, place)
                for name in (mixers if args.layer else _some(seen))]
        target = folder.new(Path(path).stem)
        sheet(rows, f'{Path(path).name}: what the ringed place takes from other places, by '
              'direction').save(target)
        print(f'[{number}/{len(paths)}] {target}', flush=True)
    print(f'What the directions bring, in {len(paths)} pictures, is in {folder.path}/')


def _mixers(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """Mixers by name; the last one inside each layer that is named.

    Raises:
        UserError: if there are none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, MIXERS)}
    backbone = type(getattr(model, 'backbone', model)).__name__
    if not found:
        mamba = any(isinstance(each, MambaVisionMixer) for each in model.modules())
        why = ('scans its tokens in one direction only' if mamba else 'has no scans')
        raise UserError(f'--directions compares the scan directions of a network, but {backbone} '
                        f'{why}. VMamba, LocalVMamba, Vim and LocalVim scan in several; --features '
                        'and --cam look at any network.')
    chosen = {}
    for name in find_layers(model, layers or []):
        inside = [each for each in found if each == name or each.startswith(f'{name}.')]
        if not inside:
            raise UserError(f'The layer {name} of {backbone} holds no scans; expected a mixer such '
                            f'as {list(found)[-1]}, or what is around one.')
        chosen[inside[-1]] = found[inside[-1]]
    return chosen or found


def _inputs(model: nn.Module, mixers: dict[str, nn.Module], given: Input
            ) -> dict[str, tuple[Tensor, tuple[int, int], int | None]]:
    """What each mixer reads for a picture, the grid of its tokens, and where a class token is."""
    seen: dict[str, tuple] = {}

    def listen(name):
        def hook(module, args):
            seen[name] = args
        return hook

    handles = [mixer.register_forward_pre_hook(listen(name)) for name, mixer in mixers.items()]
    try:
        with torch.no_grad():
            model.extract_feat(given.data['inputs'])
    finally:
        for handle in handles:
            handle.remove()
    trunk = next((each for each in model.modules() if hasattr(each, 'class_index')), None)
    return {name: _described(mixers[name], args, trunk) for name, args in seen.items()}


def _described(mixer: nn.Module, args: tuple, trunk: nn.Module | None
               ) -> tuple[Tensor, tuple[int, int], int | None]:
    x = args[0]
    if isinstance(mixer, SS2D):
        return x, tuple(x.shape[2:] if mixer.channel_first else x.shape[1:3]), None
    return x, tuple(args[1]), trunk.class_index(args[1])


def _some(seen: dict[str, tuple]) -> list[str]:
    """The last mixer of each stage, or four of a network without stages."""
    last = {grid: name for name, (_, grid, _) in seen.items()}
    names = list(last.values())
    return names if len(names) > 1 else [list(seen)[index] for index in evenly(len(seen), _ROWS)]


def _place(at: Sequence[int] | None, given: Input, path: str) -> tuple[int, int]:
    """The place that is asked about, x and y in pixels of the picture."""
    height, width = given.picture.size
    x, y = at or (width // 2, height // 2)
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f'--at {x} {y} lies outside of {path}, which is {width} x {height} pixels; '
                        'expected X from the left and Y from the top.')
    return x, y


def _token(place: tuple[int, int], given: Input) -> tuple[float, float]:
    """The place as parts of the inputs, from the left and from the top."""
    return tuple((pixel + 0.5) / side * filled / padded for pixel, side, filled, padded in zip(
        place, given.picture.size[::-1], given.filled[::-1], given.padded[::-1], strict=True))


def _row(name: str, found: Response, given: Input, place: tuple[int, int]
         ) -> list[tuple[str, Image.Image]]:
    image, maps = given.picture.rgb(), found.added.clone()
    own = maps[(slice(None), *found.at)].sum()
    maps[(slice(None), *found.at)] = 0  # it outshines all others
    others = maps.sum(dim=(1, 2)) + found.rest
    first = f'{name} ({own / (own + others.sum()):.1%} from itself)  ' if own else f'{name}  '
    panels = []
    for k, direction in enumerate(found.directions):
        picture = draw_heat(image, given.over_picture(maps[k]), float(maps.max()))
        scale = picture.width / image.shape[1]
        mark(picture, *(scale * (side + 0.5) for side in place))
        share = others[k] / (others.sum() or 1)
        panels.append((f'{"" if k else first}{direction}: {share:.0%}', picture))
    return panels
