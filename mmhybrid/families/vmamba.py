"""VMamba: Liu et al., 2024."""
from __future__ import annotations

from .family import Family, Released, Shapes, count_blocks

__all__ = ['V0', 'VMAMBA', 'mixer_of']

# The form of the first release: gated mixers without MLP, Swin's stem and patch merging.
V0 = dict(state_dim=16, mlp_ratio=0.0, gate=True, conv_bias=True, channel_first=False, stem='v1',
          downsample='v1', float32_scan=True)

# sXlY: ssm_ratio X, Y blocks in stage 3.
ARCHITECTURES = {
    'tiny_s1l8': dict(dim=96, depths=(2, 2, 8, 2), ssm_ratio=1.0),
    'tiny_s2l5': dict(dim=96, depths=(2, 2, 5, 2)),
    'small_s2l15': dict(dim=96, depths=(2, 2, 15, 2)),
    'small_s1l20': dict(dim=96, depths=(2, 2, 20, 2), ssm_ratio=1.0),
    'base_s2l15': dict(dim=128, depths=(2, 2, 15, 2)),
    'base_s1l20': dict(dim=128, depths=(2, 2, 20, 2), ssm_ratio=1.0),
    'v0_tiny': dict(dim=96, depths=(2, 2, 9, 2), **V0),
    'v0_small': dict(dim=96, depths=(2, 2, 27, 2), **V0),
    'v0_base': dict(dim=128, depths=(2, 2, 27, 2), **V0),
}
# The names under which the paper reports its models.
ARCHITECTURES.update(tiny=ARCHITECTURES['tiny_s1l8'], small=ARCHITECTURES['small_s2l15'],
                     base=ARCHITECTURES['base_s2l15'])


def _facts_of(arch: dict) -> tuple:
    return arch['dim'], arch['depths'], arch['ssm_ratio'], arch['mlp_ratio'] > 0


def _facts_in(shapes: Shapes) -> tuple:
    dim, inner = mixer_of(shapes)
    return (dim, count_blocks(shapes, 'layers'), inner // dim,
            'layers.0.blocks.0.mlp.fc1.weight' in shapes)


def mixer_of(shapes: Shapes) -> tuple[int, int]:
    """Channels of the first stage and inside its mixers."""
    block = 'layers.0.blocks.0'
    op = f'{block}.op' if f'{block}.op.A_logs' in shapes else f'{block}.self_attention'
    dim, inner = shapes[f'{op}.out_proj.weight'][:2]
    return dim, inner


def _released() -> list[Released]:
    # A tag of a release is its number, v0 the first one, and the kind of its files.
    base = 'https://github.com/MzeroMiko/VMamba/releases/download/%23'
    cls, det, seg = 'classification', 'detector', 'segmentor'
    kinds = {cls: 'cls', det: 'det', seg: 'seg'}
    upernet = 'upernet_vssm_4xb4-160k_ade20k-512x512_'
    mask = 'mask_rcnn_vssm_fpn_coco_'
    rows = [
        ('t-s1l8', 'tiny_s1l8', cls, 'vssm1_tiny_0230s_ckpt_epoch_264'),
        ('s-s2l15', 'small_s2l15', cls, 'vssm_small_0229_ckpt_epoch_222'),
        ('b-s2l15', 'base_s2l15', cls, 'vssm_base_0229_ckpt_epoch_237'),
        ('t-s2l5', 'tiny_s2l5', cls, 'vssm_tiny_0230_ckpt_epoch_262'),
        ('s-s1l20', 'small_s1l20', cls, 'vssm1_small_0229s_ckpt_epoch_240'),
        ('b-s1l20', 'base_s1l20', cls, 'vssm1_base_0229s_ckpt_epoch_225'),
        ('v0-t', 'v0_tiny', cls, 'vssmtiny_dp01_ckpt_epoch_292'),
        ('v0-s', 'v0_small', cls, 'vssmsmall_dp03_ckpt_epoch_238'),
        ('v0-b', 'v0_base', cls, 'vssmbase_dp06_ckpt_epoch_241'),
        ('t-s1l8-mask-rcnn-coco', 'tiny_s1l8', det, f'{mask}tiny_s_epoch_12'),
        ('s-s2l15-mask-rcnn-coco', 'small_s2l15', det, f'{mask}small_epoch_11'),
        ('b-s2l15-mask-rcnn-coco', 'base_s2l15', det, f'{mask}base_epoch_11'),
        ('b-s2l15-mask-rcnn-coco-bs8', 'base_s2l15', det, f'{mask}base_epoch_12_bs8'),
        ('t-s1l8-mask-rcnn-coco-3x', 'tiny_s1l8', det, f'{mask}tiny_ms_3x_s_epoch_31'),
        ('s-s2l15-mask-rcnn-coco-3x', 'small_s2l15', det, f'{mask}small_ms_3x_epoch_32'),
        ('t-s2l5-mask-rcnn-coco', 'tiny_s2l5', det, f'{mask}tiny_epoch_12'),
        ('t-s2l5-mask-rcnn-coco-3x', 'tiny_s2l5', det, f'{mask}tiny_ms_3x_epoch_36'),
        *((f'v0-{size[0]}-mask-rcnn-coco', f'v0_{size}', det,
           f'vssm{size}_mask_rcnn_swin_fpn_coco_epoch_12') for size in ('tiny', 'small', 'base')),
        *((f'v0-{size[0]}-mask-rcnn-coco-3x', f'v0_{size}', det,
           f'vssm{size}_mask_rcnn_swin_fpn_coco_ms_3x_epoch_34') for size in ('tiny', 'small')),
        ('t-s1l8-upernet-ade20k', 'tiny_s1l8', seg, f'{upernet}tiny_s_iter_160000'),
        ('s-s2l15-upernet-ade20k', 'small_s2l15', seg, f'{upernet}small_iter_144000'),
        ('b-s2l15-upernet-ade20k', 'base_s2l15', seg, f'{upernet}base_iter_160000'),
        ('t-s2l5-upernet-ade20k', 'tiny_s2l5', seg, f'{upernet}tiny_iter_160000'),
        *((f'v0-{size[0]}-upernet-ade20k', f'v0_{size}', seg,
           f'vssm{size}_upernet_4xb4-160k_ade20k-512x512_iter_{iteration}')
          for size, iteration in (('tiny', 160000), ('small', 160000), ('base', 128000))),
    ]
    return [Released(f'vmamba-{name}', 'VMamba', arch, kind, f'{stem}.pth',
                     f'{base}{"v0" if arch.startswith("v0") else "v2"}{kinds[kind]}/{stem}.pth',
                     'MIT', 'https://github.com/MzeroMiko/VMamba')
            for name, arch, kind, stem in rows]


VMAMBA = Family(
    'VMamba',
    required=('dim', 'depths'),
    optional=dict(ssm_ratio=2.0, state_dim=1, dt_rank=None, mlp_ratio=4.0, gate=False,
                  conv_bias=False, channel_first=True, stem='v2', downsample='v3',
                  float32_scan=False),
    architectures=ARCHITECTURES,
    mark=r'layers\.\d+\.blocks\.\d+\.(op|self_attention)\.',
    facts=('dim', 'depths', 'ssm_ratio', 'mlp'),
    facts_of=_facts_of,
    facts_in=_facts_in,
    state_names='A_logs|Ds|dt_projs_bias',
    released=tuple(_released()))
