"""Where in a picture the classes that a model finds come from: class activation maps.

Own, because the libraries for it (grad-cam, torchcam) explain rows of class scores: to them a
detector is a wrapper that somebody has to write, which is most of what is here.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhybrid.analysis.class_activation import activation_map
from mmhybrid.errors import UserError
from mmhybrid.prediction.predictor import Predictor, Wanted
from mmhybrid.visualization import class_colors, draw_heat, draw_instances, draw_regions, sheet

from .opening import (
    Folder,
    Input,
    as_map,
    find_layers,
    open_run,
    outputs_of,
    pictures_of,
    prepare,
    without_masks,
)

__all__ = ['Explained', 'draw_activation', 'explain_picture', 'gradients_of_features_alone']

_MOST_CLASSES = 3
_MOST_OBJECTS = 20
_CERTAIN = 1e-6


@dataclass
class Explained:
    """Where a class comes from.

    Attributes:
        label: of the class.
        heat: (H, W) float32 over the picture, no less than 0.
        boxes: (N, 4) of the objects that are explained, a detector's.
    """

    label: int
    heat: np.ndarray
    boxes: np.ndarray


def draw_activation(args: argparse.Namespace) -> None:
    """Draw class activation maps as ``args`` of ``mmhybrid visualize`` say."""
    predictor = open_run(args, with_data=not args.images)
    Wanted(None if predictor.finds_regions else args.score_thr, args.classes).check(predictor)
    wanted = args.classes and [predictor.names.index(name) for name in args.classes]
    layers = find_layers(predictor.model, args.layer or ['backbone'])
    paths = pictures_of(args, predictor)
    folder = Folder(args, 'activation')
    drawn = 0
    for number, path in enumerate(paths, start=1):
        given = prepare(predictor, path)
        found, panel = explain_picture(predictor, given, layers, wanted, args.score_thr,
                                       args.cam_method)
        if not found:
            print(f'[{number}/{len(paths)}] {path}: nothing found that could be explained')
            continue
        target = folder.new(Path(path).stem)
        image = given.picture.rgb()
        sheet([[('prediction', panel), *(
            (predictor.names[each.label], _drawn(image, each, predictor)) for each in found)]],
            f'{Path(path).name}: {args.cam_method} of {", ".join(layers)}').save(target)
        drawn += 1
        print(f'[{number}/{len(paths)}] {target}', flush=True)
    print(f'{drawn} pictures of what classes rest on are in {folder.path}/')
    if not drawn and not predictor.finds_regions:
        print(f'No object has a score of {args.score_thr:g} or more'
              f'{" and is of these classes" if wanted else ""}; --score-thr lowers that.')


def _drawn(image: np.ndarray, each: Explained, predictor: Predictor):
    heated = draw_heat(image, each.heat, enlarge=False)
    color = class_colors(len(predictor.names))[each.label]
    return draw_instances(np.asarray(heated), each.boxes,
                          [predictor.names[each.label]] * len(each.boxes),
                          colors=[color] * len(each.boxes))


def explain_picture(predictor: Predictor, given: Input, layers: dict[str, nn.Module],
                    labels: list[int] | None, score: float, method: str
                    ) -> tuple[list[Explained], object]:
    """Explain the classes that are found in a picture.

    The score that is explained is, of a detector, the sum over the objects of a class of the
    logits of their scores; of a segmentor the sum over the pixels of a class of their logits.
    Where layers return several maps, their heat is added up, each cell's spread over its pixels.

    Args:
        predictor: has the model.
        given: the picture.
        layers: whose outputs are looked at.
        labels: of the classes; None for those that are surest, or largest, at most three.
        score: lowest score of an object.
        method: see :func:`mmhybrid.analysis.class_activation.activation_map`.

    Returns:
        The classes that are found, and a picture of the prediction.

    Raises:
        UserError: if the scores do not depend on the layers in a way that has a gradient.
    """
    with gradients_of_features_alone(predictor.model), outputs_of(layers, True) as outputs:
        targets = (_region_targets if predictor.finds_regions else _object_targets)(
            predictor, given, labels, score)
    found = [_explained(target, outputs, given, method, predictor.name)
             for target in targets.classes]
    return found, targets.panel


@dataclass
class _Targets:
    """Scores with gradients: (label, score, boxes) of each class, and the prediction drawn."""

    classes: list[tuple[int, Tensor, np.ndarray]]
    panel: object


def _object_targets(predictor: Predictor, given: Input, labels: list[int] | None, score: float
                    ) -> _Targets:
    with without_masks(predictor.model):
        objects = predictor.model(**given.data, mode='predict')[0].pred_instances
    objects = objects[objects.scores >= score]
    boxes = getattr(objects.bboxes, 'tensor', objects.bboxes).detach().cpu().float().numpy()
    found = objects.labels.tolist()
    surest = list(dict.fromkeys(found[place] for place in objects.scores.argsort(descending=True)))
    chosen = surest[:_MOST_CLASSES] if labels is None else [
        label for label in labels if label in surest]
    classes = []
    for label in chosen:
        which = torch.tensor([each == label for each in found]).nonzero()[:, 0]
        order = objects.scores[which.to(objects.scores.device)].argsort(descending=True).cpu()
        which = which[order[:_MOST_OBJECTS]]
        sure = objects.scores[which.to(objects.scores.device)].double().clamp(
            _CERTAIN, 1 - _CERTAIN)
        classes.append((label, (sure / (1 - sure)).log().sum(), boxes[which.numpy()]))
    colors = class_colors(len(predictor.names))
    panel = draw_instances(given.picture.rgb(), boxes, [predictor.names[each] for each in found],
                           scores=objects.scores.tolist(), colors=[colors[each] for each in found])
    return _Targets(classes, panel)


def _region_targets(predictor: Predictor, given: Input, labels: list[int] | None, score: float
                    ) -> _Targets:
    model = predictor.model
    metas = [each.metainfo for each in given.data['data_samples']]
    logits = model.encode_decode(given.data['inputs'], metas)[0]
    if len(logits) == 1:  # one number for two classes
        logits = torch.cat([-logits, logits])
    logits = logits[:, :given.filled[0], :given.filled[1]]
    regions = logits.argmax(dim=0)
    sizes = torch.bincount(regions.flatten(), minlength=len(logits))
    largest = sizes.argsort(descending=True, stable=True).tolist()[:_MOST_CLASSES]
    chosen = largest if labels is None else labels
    classes = [(label, logits[label][regions == label].double().sum(), np.zeros((0, 4)))
               for label in chosen if sizes[label]]
    shown = F.interpolate(regions.float()[None, None], given.picture.size)[0, 0]
    return _Targets(classes, draw_regions(given.picture.rgb(), shown.long().cpu().numpy(),
                                          predictor.names, predictor.palette, ignore=-1))


def _explained(target: tuple[int, Tensor, np.ndarray], outputs: dict[str, Tensor], given: Input,
               method: str, name: str) -> Explained:
    label, score, boxes = target
    gradients = [None] * len(outputs)
    if score.requires_grad:
        gradients = torch.autograd.grad(score, list(outputs.values()), retain_graph=True,
                                        allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise UserError(f'The scores of {name} have no gradient with respect to '
                        f'{", ".join(outputs) or "that layer"}: the layer is not used on the way '
                        'to them, or something between cuts it off. Choose another one with '
                        '--layer, such as backbone.')
    heat = np.zeros(given.picture.size, dtype=np.float32)
    for (layer, value), gradient in zip(outputs.items(), gradients, strict=True):
        if gradient is not None:
            own = activation_map(as_map(layer, value, given.padded).detach(),
                                 as_map(layer, gradient, given.padded), method)
            heat += given.over_picture(own) * own.numel()
    return Explained(label, heat, boxes)


@contextmanager
def gradients_of_features_alone(model: nn.Module) -> Iterator[None]:
    """Weights need none, which saves their graph; scores keep theirs."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in wanted:
            weight.requires_grad_(False)
        with torch.enable_grad(), _dense_heads_keep_the_graph():
            yield
    finally:
        for weight in wanted:
            weight.requires_grad_()


@contextmanager
def _dense_heads_keep_the_graph() -> Iterator[None]:
    """Heads such as RetinaNet's detach what they predict from, by a function of mmdet."""
    def selected(tensors, batch_id, detach=True):
        return [tensor[batch_id] for tensor in tensors]

    name = 'select_single_mlvl'
    with ExitStack() as stack:
        for place, module in list(sys.modules.items()):
            if place.startswith('mmdet.models.') and name in vars(module):
                stack.enter_context(mock.patch.object(module, name, selected))
        yield
