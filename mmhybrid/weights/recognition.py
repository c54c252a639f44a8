"""Whose weights are these?  Told from names and shapes alone, without building a model."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mmhybrid.families import FAMILIES

from .released import RELEASED

__all__ = ['Identity', 'identify', 'kind_of', 'recognized_family']

# Names of networks that are often mistaken for ours.
_FOREIGN = (
    ('Swin', r'(layers|stages)\.\d+\.blocks\.\d+\.attn\..*relative_position'),
    ('ResNet', r'layer\d\.\d+\.conv\d\.weight'),
    ('ConvNeXt', r'stages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv|depthwise_conv)\.'),
    ('ViT', r'blocks\.\d+\.attn\.qkv\.weight'),
)

@dataclass(frozen=True)
class Identity:
    """A family and the variant within it.

    Attributes:
        family: registered class of the backbone, or the name of a foreign network.
        variant: ``arch`` of a published variant, None for another one.
        facts: what distinguishes variants, in words; '' if parts are missing.
        ours: whether this package has the family.
    """

    family: str
    variant: str | None = None
    facts: str = ''
    ours: bool = True

    def __str__(self) -> str:
        if not self.ours:
            return self.family
        if self.variant:
            return f'{self.family} arch={self.variant!r}'
        return f'{self.family} with {self.facts}' if self.facts else self.family

    @property
    def released(self) -> list[str]:
        """Short names of published classification weights."""
        return [row.name for row in RELEASED.values()
                if (row.family, row.arch, row.kind) == (self.family, self.variant,
                                                        'classification') and row.address]


def recognized_family(names: Iterable[str]) -> str | None:
    """Say which of our families names belong to; they must begin with the backbone's own."""
    names = list(names)
    for family in FAMILIES.values():
        if any(re.match(family.mark, name) for name in names):
            return family.name
    return None


def identify(shapes: Mapping[str, tuple[int, ...]]) -> Identity | None:
    """Tell family and variant from names and shapes; None if neither is known."""
    name = recognized_family(shapes)
    if name is None:
        for foreign, mark in _FOREIGN:
            if any(re.match(mark, name) for name in shapes):
                return Identity(foreign, ours=False)
        return None
    family = FAMILIES[name]
    try:
        facts = family.facts_in(shapes)
    except (KeyError, IndexError, ZeroDivisionError, ValueError):
        return Identity(name)  # parts are missing, or have other shapes
    words = ', '.join(f'{key}={value}' for key, value in zip(family.facts, facts, strict=True))
    return Identity(name, family.variants.get(facts), words)


_KINDS = (
    ('detector', r'(.*\.)?(rpn_head|roi_head|bbox_head|roi_heads|proposal_generator|mask_head)\.'),
    ('segmentor', r'(.*\.)?(decode_head|auxiliary_head)\.'),
    ('classification', r'((module|_orig_mod|model|encoder|backbone|net)\.)*(head|classifier)\.'),
)


def kind_of(names: Iterable[str]) -> str:
    """Say what a whole file is: detector, segmentor, classification or backbone."""
    names = list(names)
    for kind, mark in _KINDS:
        if any(re.match(mark, name) for name in names):
            return kind
    return 'backbone'
