"""The published files of weights: one row each, under a short name.

Rows are copied from the repositories' own lists.  A file that is announced but cannot be fetched
has no address and says why, so that its name still leads to an answer.
"""
from __future__ import annotations

import os
import re
from typing import NamedTuple

from .errors import WeightsError

__all__ = ['RELEASED', 'Released', 'find_released', 'released_as']


class Released(NamedTuple):
    """One published file.

    Attributes:
        name: short name.
        family: registered class of the backbone.
        arch: its variant.
        kind: 'classification', 'detector' or 'segmentor'.
        file: published file name.
        address: where it is, '' if nowhere.
        licence: of the weights.
        source: repository that published it.
        remark: what a user must know.
        window_size: windows of a classifier with these weights, which no file tells; None for
            other kinds and for families without windows.
    """

    name: str
    family: str
    arch: str
    kind: str
    file: str
    address: str
    licence: str
    source: str
    remark: str = ''
    window_size: tuple[int, int, int, int] | None = None


def _mambavision() -> list[Released]:
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


def _vmamba() -> list[Released]:
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


def _vim() -> list[Released]:
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


def _localmamba() -> list[Released]:
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
    return [Released(name, family, arch, 'classification', file,
                     '' if name in absent else base + file, 'Apache-2.0',
                     'https://github.com/hunto/LocalMamba', remark)
            for name, family, arch, file, remark in rows]


#: All published files by short name.
RELEASED: dict[str, Released] = {
    row.name: row for row in (*_mambavision(), *_vmamba(), *_vim(), *_localmamba())}


def find_released(name: str) -> Released | None:
    """Give the row of a short name, None if it is none.

    Raises:
        WeightsError: if the file cannot be fetched.
    """
    row = RELEASED.get(name.lower())
    if row is not None and not row.address:
        raise WeightsError(f'{row.name} has no address: {row.remark}; if you have the file'
                           f'{" " + row.file if row.file else ""}, give its path')
    return row


def released_as(source: str | os.PathLike) -> Released | None:
    """Give the row of the published file that a source names, None if it names none.

    That is its short name, its address, its repository if that has one file of weights, or a path
    or an address whose last part is the published file name, also with another suffix or behind
    '-', as downloads are kept.
    """
    text = os.fspath(source).lower()
    if text in RELEASED:
        return RELEASED[text]
    address = '://' in text
    if address:
        text = re.split('[?#]', text)[0]
    if text.startswith('hf://'):
        text = text.partition('@')[0]  # a revision
    for row in RELEASED.values():
        if row.file and re.search(rf'(\A|-){re.escape(_stem(row.file.lower()))}\Z', _stem(text)):
            return row
    if not address and 'models--' not in text:
        return None  # one's own folders may have any name; those of the hub's cache are its own
    parts = re.split('/|--', text)
    rows = [row for row in RELEASED.values() if _repository(row.address) in parts]
    return rows[0] if len(rows) == 1 else None


def _stem(path: str) -> str:
    return re.sub(r'\.(pth\.tar|pth|pt|ckpt|bin|safetensors)\Z', '', path.rpartition('/')[2])


def _repository(address: str) -> str | None:
    found = re.match(r'(?:hf://|https://huggingface\.co/)[^/]+/([^/]+)', address)
    return found[1].lower() if found else None
