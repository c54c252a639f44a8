"""Low-rank adapters in files of weights: ``NAME_lora_A`` and ``NAME_lora_B`` beside ``NAME``.

``lora_scale`` of the network that holds them is the factor of their product, so a file needs no
config to be merged.  :mod:`mmhybrid.models.lora` puts adapters into networks.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import WeightsError

__all__ = ['DOWN', 'SCALE', 'UP', 'adapters_of', 'fit_adapters', 'merge_adapters']

#: What follows the name of a weight (..., out, in) in those of its adapters: A is (..., rank, in),
#: B (..., out, rank).
DOWN, UP = '_lora_A', '_lora_B'
SCALE = 'lora_scale'


def adapters_of(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Names of the weights that have adapters, and their ranks."""
    return {name.removesuffix(DOWN): tensor.shape[-2] if tensor.dim() > 1 else 0
            for name, tensor in state_dict.items() if name.endswith(DOWN)}


def merge_adapters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of the ordinary network, which computes the same.

    Raises:
        WeightsError: if a part of an adapter is missing or has another shape.
    """
    scales = {name.removesuffix(SCALE): tensor for name, tensor in state_dict.items()
              if name.rpartition('.')[2] == SCALE}
    merged = {name: tensor for name, tensor in state_dict.items()
              if not name.endswith((DOWN, UP)) and name.rpartition('.')[2] != SCALE}
    names = {name.removesuffix(end) for name in state_dict for end in (DOWN, UP)
             if name.endswith(end)}
    for name in sorted(names):
        scale = next((t for start, t in scales.items() if name.startswith(start)), None)
        merged[name] = _merged(name, {
            name: state_dict.get(name), name + DOWN: state_dict.get(name + DOWN),
            name + UP: state_dict.get(name + UP), SCALE: scale})
    return merged


def _merged(name: str, parts: Mapping[str, Tensor | None]) -> Tensor:
    present = {part: tensor for part, tensor in parts.items() if tensor is not None}
    absent = [part for part in parts if part not in present]
    if absent:
        raise WeightsError(f'{name} has an adapter, but the file has no {absent[0]}; expected '
                           f'{", ".join(parts)}; take the checkpoint that the training wrote')
    weight, down, up, scale = present.values()
    shapes = [tuple(tensor.shape) for tensor in (weight, down, up)]
    if scale.numel() != 1 or {len(shape) for shape in shapes} not in ({2}, {3}) or (
            shapes[2][:-1] + shapes[1][-1:] != shapes[0] or shapes[1][:-2] != shapes[0][:-2]
            or shapes[2][-1] != shapes[1][-2]):
        raise WeightsError(f'the adapter of {name} has the shapes {shapes[1]} and {shapes[2]}, '
                           f'which do not make {shapes[0]} with one factor {SCALE}; take the '
                           'checkpoint that the training wrote')
    change = float(scale) * torch.matmul(up.detach().float(), down.detach().float())
    return (weight.detach().float() + change).to(weight.dtype)


def fit_adapters(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]
                 ) -> dict[str, Tensor]:
    """Give a file the adapters that a network has, without a change of what it computes.

    Adapters of the network's own kind stay; others are merged into their weights, and those of the
    network that the file lacks start at nothing.

    Args:
        state_dict: tensors of the file, with the network's names.
        own: the network's.

    Raises:
        WeightsError: if the file's adapters are not whole.
    """
    state_dict = dict(state_dict)
    theirs, ours = ({name: tensor for name, tensor in each.items() if _belongs(name)}
                    for each in (state_dict, own))
    if not theirs and not ours or _alike(theirs, ours):
        return state_dict
    merged = merge_adapters(state_dict)
    for name, tensor in ours.items():
        weight = name.removesuffix(DOWN).removesuffix(UP)
        if weight in merged or merged and name.rpartition('.')[2] == SCALE:
            merged[name] = torch.zeros_like(tensor) if name.endswith(UP) else tensor.detach()
    return merged


def _belongs(name: str) -> bool:
    return name.endswith((DOWN, UP)) or name.rpartition('.')[2] == SCALE


def _alike(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> bool:
    """Whether adapters have the same names, shapes and factors."""
    return theirs.keys() == ours.keys() and all(
        theirs[name].shape == tensor.shape and (
            not name.endswith(SCALE) or tensor.is_meta or theirs[name].is_meta
            or float(theirs[name]) == float(tensor))
        for name, tensor in ours.items())
