"""LocalVMamba: Huang et al., 2024, and the files of LocalMamba."""
from __future__ import annotations

from .family import Family, Released, Shapes, count_blocks
from .vmamba import V0, mixer_of

__all__ = ['LOCALVMAMBA', 'released_with_localmamba']

ARCHITECTURES = {
    'tiny': dict(dim=96, depths=(2, 2, 9, 2)),
    'small': dict(dim=96, depths=(2, 2, 27, 2)),
}


def _facts_of(arch: dict) -> tuple:
    return arch['dim'], arch['depths']


def _facts_in(shapes: Shapes) -> tuple:
    dim, _ = mixer_of(shapes)
    return dim, count_blocks(shapes, 'layers')


def released_with_localmamba(family: str) -> tuple[Released, ...]:
    """Published files of one of the two families of LocalMamba."""
    base = 'https://github.com/hunto/LocalMamba/releases/download/v1.0.0/'
    rows = [
        ('localvim-t', 'LocalVim', 'tiny', 'local_vim_tiny.ckpt', ''),
        ('localvim-t-middle', 'LocalVim', 'tiny', 'local_vim_tiny_middle_cls_token.ckpt',
         'class token in the middle: for classification only'),
        ('localvim-s', 'LocalVim', 'small', '',
         'never published: its link leads to the file of LocalVMamba-S'),
        ('localvmamba-t', 'LocalVMamba', 'tiny', 'local_vssm_tiny.ckpt',
         'missing from the release'),
        ('localvmamba-s', 'LocalVMamba', 'small', 'local_vssm_small.ckpt', ''),
    ]
    absent = ('localvim-s', 'localvmamba-t')
    return tuple(
        Released(name, family, arch, 'classification', file,
                 '' if name in absent else base + file, 'Apache-2.0',
                 'https://github.com/hunto/LocalMamba', remark)
        for name, whose, arch, file, remark in rows if whose == family)


LOCALVMAMBA = Family(
    'LocalVMamba',
    required=('dim', 'depths'),
    optional=dict(V0, ssm_ratio=2.0, dt_rank=None),
    architectures=ARCHITECTURES,
    mark=r'layers\.\d+\.blocks\.\d+\.op\.multi_scan\.',
    facts=('dim', 'depths'),
    facts_of=_facts_of,
    facts_in=_facts_in,
    state_names='A_logs|Ds|dt_projs_bias',
    released=released_with_localmamba('LocalVMamba'))
