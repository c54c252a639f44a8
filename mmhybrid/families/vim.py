"""Vim: Zhu et al., 2024."""
from __future__ import annotations

from .family import Family, Released, Shapes

__all__ = ['VIM', 'facts_in', 'facts_of']

ARCHITECTURES = {
    'tiny': dict(dim=192, depth=24),
    'small': dict(dim=384, depth=24),
    'base': dict(dim=768, depth=24),
}


def facts_of(arch: dict) -> tuple:
    """Width and number of blocks."""
    return arch['dim'], arch['depth']


def facts_in(shapes: Shapes) -> tuple:
    """The same of a file."""
    layers = {name.split('.')[1] for name in shapes if name.startswith('layers.')}
    return shapes['patch_embed.proj.weight'][0], len(layers)


def _released() -> list[Released]:
    first = "first release: class_token='first', rope=True, divide=False"
    rows = [
        ('t', 'tiny', 'Vim-tiny-midclstok', 'vim_t_midclstok_76p1acc.pth', ''),
        ('t-stride8', 'tiny', 'Vim-tiny-midclstok', 'vim_t_midclstok_ft_78p3acc.pth', 'stride=8'),
        ('s', 'small', 'Vim-small-midclstok', 'vim_s_midclstok_80p5acc.pth', ''),
        ('s-stride8', 'small', 'Vim-small-midclstok', 'vim_s_midclstok_ft_81p6acc.pth',
         'stride=8'),
        # the list of this repository's files is not at hand; its one file of weights is meant
        ('b', 'base', 'Vim-base-midclstok', '', ''),
        ('t-first', 'tiny', 'Vim-tiny', 'vim_tiny_73p1.pth', first),
    ]
    return [Released(f'vim-{name}', 'Vim', arch, 'classification', file,
                     f'hf://hustvl/{repository}/{file}'.rstrip('/'), 'Apache-2.0',
                     'https://github.com/hustvl/Vim', remark)
            for name, arch, repository, file, remark in rows]


VIM = Family(
    'Vim',
    required=('dim', 'depth'),
    optional=dict(state_dim=16, dt_rank=None),
    architectures=ARCHITECTURES,
    mark=r'layers\.\d+\.mixer\.A_b_log\Z',
    facts=('dim', 'depth'),
    facts_of=facts_of,
    facts_in=facts_in,
    state_names='A_log|A_b_log|D|D_b',
    released=tuple(_released()))
