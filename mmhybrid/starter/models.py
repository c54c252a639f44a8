"""Backbones by short name: what a config says of them, and the maps that they give."""
from __future__ import annotations

from dataclasses import dataclass

from mmhybrid.errors import UserError
from mmhybrid.families import FAMILIES
from mmhybrid.spelling import did_you_mean, nearest_few
from mmhybrid.weights import RELEASED

from ..models.backbones.timm_features import TimmFeatures

__all__ = ['MINI', 'Backbone', 'backbone_names', 'find_backbone', 'named_weights']

MINI = 'mambavision-mini'
TIMM = 'timm:'
# That of configs/cascade_mambavision_mini_coco.py.
_MINI = dict(dim=32, stem_width=16, depths=(1, 2, 2, 2), num_heads=(1, 2, 4, 8),
             window_size=(8, 8, 14, 7), mlp_ratio=2)


@dataclass
class Backbone:
    """A backbone.

    Attributes:
        name: short name, such as 'mambavision-t'.
        family: its class.
        arch: its architecture, a name or all of it.
        channels: of its maps at strides 4, 8, 16 and 32.
    """

    name: str
    family: str
    arch: str | dict
    channels: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether it has one width throughout, and a table of positions."""
        return self.family in FAMILIES and FAMILIES[self.family].is_plain

    def released(self) -> str | None:
        """Short name of published weights of classification that fit."""
        return next((row.name for row in RELEASED.values() if row.address and row.file
                     and row.kind == 'classification'
                     and (row.family, row.arch) == (self.family, self.arch)), None)


def _short(arch: str) -> str:
    for word in ('tiny', 'small', 'base', 'large'):
        arch = arch.replace(word, word[0])
    return arch.replace('_', '-')


def _table() -> dict[str, Backbone]:
    found = {MINI: Backbone(MINI, 'MambaVision', _MINI, (32, 64, 128, 256))}
    for family in FAMILIES.values():
        known = family.architectures
        for arch, values in known.items():
            name = f'{family.name.lower()}-{_short(arch)}'
            # VMamba's tiny is another name of tiny_s1l8, under which weights are listed.
            arch = next(key for key, other in known.items() if other is values)
            found[name] = Backbone(name, family.name, arch, tuple(
                values['dim'] * (1 if family.is_plain else 2**stage) for stage in range(4)))
    return found


def backbone_names() -> list[str]:
    """All short names."""
    return [*_table()]


def find_backbone(name: str) -> Backbone:
    """Give the backbone of a short name, or of timm: 'timm:convnext_tiny'.

    Raises:
        UserError: if there is none; names the nearest.
    """
    if name.startswith(TIMM):
        return _of_timm(name)
    table = _table()
    found = table.get(name.lower().replace('_', '-'))
    if found is None:
        near = nearest_few(name.lower(), table, cutoff=0.3)
        raise UserError(f'--model {name} is not a backbone of this package.{did_you_mean(*near)} '
                        f'There are {", ".join(table)}, and {TIMM}NAME for networks of timm.')
    return found


def _of_timm(name: str) -> Backbone:
    try:
        built = TimmFeatures(name.removeprefix(TIMM))
    except (ImportError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f'--model {name}: {error}.') from error
    if built.out_strides != (4, 8, 16, 32):
        raise UserError(f'--model {name} has maps at strides {built.out_strides}, and the heads '
                        'here read 4, 8, 16 and 32. Take another network, such as '
                        f'{TIMM}convnext_tiny.')
    return Backbone(name, 'TimmFeatures', name.removeprefix(TIMM), built.out_channels)


def named_weights(weights: str) -> tuple[str, str] | None:
    """Family and architecture of weights given by short name; None for files and addresses."""
    row = RELEASED.get(weights.lower())
    return None if row is None else (row.family, row.arch)
