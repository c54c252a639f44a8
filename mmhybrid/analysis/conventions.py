"""Named ways to add up multiply-accumulates, for comparing with published tables."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .macs import KINDS, Record, scan_macs

__all__ = ['CONVENTIONS', 'Convention']


@dataclass(frozen=True)
class Convention:
    """What counts, and how much.

    Attributes:
        text: one line for people.
        kinds: the kinds of :data:`KINDS` that belong to the total.
        rois: how many regions the heads of a two-stage detector see: 'test_cfg' for the most that
            inference allows, 'mmdet2' for 1000 boxes and 100 masks per stage, 'mmdet3' for what
            the forward pass of mmdet 3 does (a cascade runs its mask heads on every proposal).
        blocks: the mixers of which a model must have one; none if any model can be counted.
        longest: whether a LocalVMamba block pays for its longest sequence in every direction.
        macs: cost of a record.
    """

    text: str
    kinds: tuple[str, ...] = KINDS
    rois: str = 'test_cfg'
    blocks: tuple[str, ...] = ()
    longest: bool = False
    macs: Callable[[Record], int] = lambda record: record.macs


# Weights of all scan directions but the first, in a LocalVim or a Vim block.
_FURTHER_DIRECTION = re.compile(r'(.*\.)?(conv1d|x_proj|dt_proj)_([1-9]\d*|b)')


def _localvim_released(record: Record) -> int:
    if record.scan is not None:
        return scan_macs(record.scan, per_state=5, per_element=2)
    return 0 if _FURTHER_DIRECTION.fullmatch(record.module) else record.macs


CONVENTIONS = {
    'all': Convention('everything; heads on as many regions as test_cfg allows'),
    'conv-linear': Convention(
        'convolutions and linear layers only, as hooks on modules (ptflops, thop) count',
        kinds=('conv', 'linear'), rois='mmdet2'),
    'mmdet2': Convention(
        'everything; 1000 boxes and 100 masks per stage, as tables made with mmdet 2',
        rois='mmdet2'),
    'mmdet3': Convention(
        'everything; the forward pass of mmdet 3, where a cascade makes masks of all proposals',
        rois='mmdet3'),
    'localvim-released': Convention(
        'the tables of LocalVim and Vim: scan 5 B D L N + 2 B D L, convolution, x_proj and dt_proj '
        'of one direction only, no norms',
        kinds=('conv', 'linear', 'attention', 'scan'), blocks=('LocalVimMixer', 'VimMixer'),
        macs=_localvim_released),
    'localvmamba-released': Convention(
        'the tables of LocalVMamba: as mmdet2, with the projections and scans of all directions of '
        'a block as long as its longest sequence',
        rois='mmdet2', blocks=('LocalSS2D',), longest=True),
}
