"""Whose weights are these?  Told from names and shapes alone, without building a model."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .released import RELEASED

__all__ = ['Identity', 'VARIANTS', 'identify', 'kind_of', 'recognized_family']

# Names that only one family has, beside those of networks that are often mistaken for ours.
_MARKS = (
    ('MambaVision', r'patch_embed\.conv_down\.\d'),
    ('LocalVMamba', r'layers\.\d+\.blocks\.\d+\.op\.multi_scan\.'),
    ('VMamba', r'layers\.\d+\.blocks\.\d+\.(op|self_attention)\.'),
    ('Vim', r'layers\.\d+\.mixer\.A_b_log\Z'),
    ('LocalVim', r'layers\.\d+\.mixer\.A_log_\d+\Z'),
)
_FOREIGN = (
    ('Swin', r'(layers|stages)\.\d+\.blocks\.\d+\.attn\..*relative_position'),
    ('ResNet', r'layer\d\.\d+\.conv\d\.weight'),
    ('ConvNeXt', r'stages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv|depthwise_conv)\.'),
    ('ViT', r'blocks\.\d+\.attn\.qkv\.weight'),
)

# What distinguishes the published variants: see _facts.
VARIANTS: dict[str, dict[tuple, str]] = {
    'MambaVision': {
        (80, 32, (1, 3, 8, 4)): 'tiny', (80, 32, (1, 3, 11, 4)): 'tiny2',
        (96, 64, (3, 3, 7, 5)): 'small', (128, 64, (3, 3, 10, 5)): 'base',
        (196, 64, (3, 3, 10, 5)): 'large', (196, 64, (3, 3, 12, 5)): 'large2',
        (256, 64, (3, 3, 20, 10)): 'large3'},
    'VMamba': {
        (96, (2, 2, 8, 2), 1, True): 'tiny_s1l8', (96, (2, 2, 5, 2), 2, True): 'tiny_s2l5',
        (96, (2, 2, 15, 2), 2, True): 'small_s2l15', (96, (2, 2, 20, 2), 1, True): 'small_s1l20',
        (128, (2, 2, 15, 2), 2, True): 'base_s2l15', (128, (2, 2, 20, 2), 1, True): 'base_s1l20',
        (96, (2, 2, 9, 2), 2, False): 'v0_tiny', (96, (2, 2, 27, 2), 2, False): 'v0_small',
        (128, (2, 2, 27, 2), 2, False): 'v0_base'},
    'LocalVMamba': {(96, (2, 2, 9, 2)): 'tiny', (96, (2, 2, 27, 2)): 'small'},
    'Vim': {(192, 24): 'tiny', (384, 24): 'small', (768, 24): 'base'},
    'LocalVim': {(192, 20): 'tiny', (384, 20): 'small'},
}
_FACT_NAMES = {
    'MambaVision': ('dim', 'stem_width', 'depths'),
    'VMamba': ('dim', 'depths', 'ssm_ratio', 'mlp'),
    'LocalVMamba': ('dim', 'depths'), 'Vim': ('dim', 'depth'), 'LocalVim': ('dim', 'depth')}


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
    for family, mark in _MARKS:
        if any(re.match(mark, name) for name in names):
            return family
    return None


def identify(shapes: Mapping[str, tuple[int, ...]]) -> Identity | None:
    """Tell family and variant from names and shapes; None if neither is known."""
    family = recognized_family(shapes)
    if family is None:
        for foreign, mark in _FOREIGN:
            if any(re.match(mark, name) for name in shapes):
                return Identity(foreign, ours=False)
        return None
    try:
        facts = _facts(family, shapes)
    except (KeyError, IndexError, ZeroDivisionError, ValueError):
        return Identity(family)  # parts are missing, or have other shapes
    words = ', '.join(f'{key}={value}'
                      for key, value in zip(_FACT_NAMES[family], facts, strict=True))
    return Identity(family, VARIANTS[family].get(facts), words)


def _facts(family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple:
    if family == 'MambaVision':
        dim, stem = shapes['patch_embed.conv_down.3.weight'][:2]
        return dim, stem, _depths(shapes, 'levels')
    if family in ('Vim', 'LocalVim'):
        layers = {name.split('.')[1] for name in shapes if name.startswith('layers.')}
        return shapes['patch_embed.proj.weight'][0], len(layers)
    block = 'layers.0.blocks.0'
    op = f'{block}.op' if f'{block}.op.A_logs' in shapes else f'{block}.self_attention'
    dim, inner = shapes[f'{op}.out_proj.weight'][:2]
    depths = _depths(shapes, 'layers')
    if family == 'LocalVMamba':
        return dim, depths
    return dim, depths, inner // dim, f'{block}.mlp.fc1.weight' in shapes


def _depths(shapes: Mapping[str, tuple[int, ...]], stages: str) -> tuple[int, ...]:
    found = {tuple(map(int, match.groups())) for match in (
        re.match(rf'{stages}\.(\d+)\.blocks\.(\d+)\.', name) for name in shapes) if match}
    count = max(stage for stage, _ in found) + 1
    if count > 100:
        raise ValueError(f'got {count} stages')
    return tuple(sum(stage == i for stage, _ in found) for i in range(count))


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
