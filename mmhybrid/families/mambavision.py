"""MambaVision: Hatamizadeh and Kautz, 2024."""
from __future__ import annotations

from .family import Family, Released, Shapes, count_blocks

__all__ = ['MAMBAVISION']

ARCHITECTURES = {
    'tiny': dict(dim=80, stem_width=32, depths=(1, 3, 8, 4), num_heads=(2, 4, 8, 16),
                 window_size=(8, 8, 14, 7)),
    'tiny2': dict(dim=80, stem_width=32, depths=(1, 3, 11, 4), num_heads=(2, 4, 8, 16),
                  window_size=(8, 8, 14, 7)),
    'small': dict(dim=96, stem_width=64, depths=(3, 3, 7, 5), num_heads=(2, 4, 8, 16),
                  window_size=(8, 8, 14, 7)),
    'base': dict(dim=128, stem_width=64, depths=(3, 3, 10, 5), num_heads=(2, 4, 8, 16),
                 window_size=(8, 8, 14, 7), layer_scale=1e-5),
    'large': dict(dim=196, stem_width=64, depths=(3, 3, 10, 5), num_heads=(4, 8, 16, 32),
                  window_size=(8, 8, 14, 7), layer_scale=1e-5),
    'large2': dict(dim=196, stem_width=64, depths=(3, 3, 12, 5), num_heads=(4, 8, 16, 32),
                   window_size=(8, 8, 14, 7), layer_scale=1e-5),
    'large3': dict(dim=256, stem_width=64, depths=(3, 3, 20, 10), num_heads=(4, 8, 16, 32),
                   window_size=(8, 8, 16, 8), layer_scale=1e-5),
}


def _facts_of(arch: dict) -> tuple:
    return arch['dim'], arch['stem_width'], arch['depths']


def _facts_in(shapes: Shapes) -> tuple:
    dim, stem_width = shapes['patch_embed.conv_down.3.weight'][:2]
    return dim, stem_width, count_blocks(shapes, 'levels')


def _released() -> list[Released]:
    hub = 'https://huggingface.co/nvidia/'
    rows = [
        ('t-1k', 'tiny', 'MambaVision-T-1K', 'mambavision_tiny_1k'),
        ('t2-1k', 'tiny2', 'MambaVision-T2-1K', 'mambavision_tiny2_1k'),
        ('s-1k', 'small', 'MambaVision-S-1K', 'mambavision_small_1k'),
        ('b-1k', 'base', 'MambaVision-B-1K', 'mambavision_base_1k'),
        ('b-21k', 'base', 'MambaVision-B-21K', 'mambavision_base_21k'),
        ('l-1k', 'large', 'MambaVision-L-1K', 'mambavision_large_1k'),
        ('l-21k', 'large', 'MambaVision-L-21K', 'mambavision_large_21k'),
        ('l2-1k', 'large2', 'MambaVision-L2-1K', 'mambavision_large2_1k'),
        ('l2-512-21k', 'large2', 'MambaVision-L2-512-21K', 'mambavision_L2_21k_240m_512'),
        ('l3-256-21k', 'large3', 'MambaVision-L3-256-21K', 'mambavision_L3_21k_740m_256'),
        ('l3-512-21k', 'large3', 'MambaVision-L3-512-21K', 'mambavision_L3_21k_740m_512'),
    ]
    windows = {'l2-512-21k': (8, 8, 32, 16), 'l3-256-21k': (8, 8, 16, 8),
               'l3-512-21k': (8, 8, 32, 16)}
    remarks = {name: 'as a classifier for images of 512 pixels, and with '
                     f'window_size={windows[name]}' for name in ('l2-512-21k', 'l3-512-21k')}
    found: list[tuple] = [
        (name, arch, 'classification', f'{stem}.pth.tar',
         f'{hub}{repository}/resolve/main/{stem}.pth.tar', remarks.get(name, ''),
         windows.get(name, (8, 8, 14, 7)))
        for name, arch, repository, stem in rows]
    dense = [(f'{short}-cascade-coco', arch, 'detector',
              f'cascade_mask_rcnn_mamba_vision_{arch}_3x_coco')
             for short, arch in (('t', 'tiny'), ('s', 'small'), ('b', 'base'))]
    dense += [(f'{short}-upernet-ade20k', arch, 'segmentor',
               f'mamba_vision_160k_ade20k-{size}_{part}')
              for short, arch, size, part in (
                  ('t', 'tiny', '512x512', 'tiny'), ('s', 'small', '512x512', 'small'),
                  ('b', 'base', '512x512', 'base'), ('l3', 'large3', '640x640', 'l3_21k'))]
    found += [(name, arch, kind, f'{stem}.pth', f'{hub}{stem}/resolve/main/{stem}.pth')
              for name, arch, kind, stem in dense]
    return [Released(f'mambavision-{name}', 'MambaVision', arch, kind, file, address,
                     'CC-BY-NC-SA-4.0', 'https://github.com/NVlabs/MambaVision', *more)
            for name, arch, kind, file, address, *more in found]


MAMBAVISION = Family(
    'MambaVision',
    required=('dim', 'stem_width', 'depths', 'num_heads', 'window_size'),
    optional=dict(mlp_ratio=4, layer_scale=None),
    architectures=ARCHITECTURES,
    mark=r'patch_embed\.conv_down\.\d',
    facts=('dim', 'stem_width', 'depths'),
    facts_of=_facts_of,
    facts_in=_facts_in,
    state_names='A_log|D',
    released=tuple(_released()))
