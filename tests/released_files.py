"""Small files as trainers write them, made from the key lists of the published networks.

Widths and depths of the key lists are kept where one case is judged by them; for the many cases
the tests take toy networks of each family, whose names are checked against the lists elsewhere.
"""
import argparse
import collections
import functools
import json
import os
from pathlib import Path

import numpy as np
import torch

from mmhybrid.models import (
    LocalVim,
    LocalVimClassifier,
    LocalVMamba,
    LocalVMambaClassifier,
    MambaVision,
    MambaVisionClassifier,
    Vim,
    VimClassifier,
    VMamba,
    VMambaClassifier,
)

DATA = Path(__file__).resolve().parents[0] / 'data'

_STAGES = dict(dim=8, depths=(1, 1, 1, 1))
_LINES = [['h', 'v', 'h_flip', 'v_flip']] * 2
# family: (dense class, classification class, settings, settings of another variant)
FAMILIES = {
    'MambaVision': (
        MambaVision, MambaVisionClassifier,
        dict(arch=dict(dim=8, stem_width=4, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4),
                       window_size=(8, 8, 4, 3))),
        dict(arch=dict(dim=16, stem_width=4, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4),
                       window_size=(8, 8, 4, 3)))),
    'VMamba': (VMamba, VMambaClassifier, dict(arch=_STAGES),
               dict(arch=dict(dim=8, depths=(1, 1, 2, 1)))),
    'LocalVMamba': (LocalVMamba, LocalVMambaClassifier,
                    dict(arch=_STAGES, directions='unsearched'),
                    dict(arch=dict(dim=16, depths=(1, 1, 1, 1)), directions='unsearched')),
    'Vim': (Vim, VimClassifier, dict(arch=dict(dim=8, depth=2)),
            dict(arch=dict(dim=8, depth=4))),
    'LocalVim': (LocalVim, LocalVimClassifier, dict(arch=dict(dim=8, depth=2), directions=_LINES),
                 dict(arch=dict(dim=16, depth=2), directions=_LINES)),
}
_MAPS = {'Vim': dict(out_indices=(1,), pyramid=False), 'LocalVim': dict(out_indices=(1,))}


def dense(family, other=False, **more):
    """The dense form at its toy size."""
    cls, _, settings, others = FAMILIES[family]
    return cls(**(others if other else settings), **_MAPS.get(family, {}), **more)


def weights(family, other=False):
    """State dict of the classification form, every value random."""
    _, cls, settings, others = FAMILIES[family]
    state = cls(**(others if other else settings), num_classes=3).state_dict()
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
            for name, t in state.items()}


def prefixed(prefix, state_dict):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def _timm(w):
    return dict(epoch=310, arch='x', state_dict=w, state_dict_ema={n: 0 * t for n, t in w.items()},
                optimizer=dict(state={0: dict(step=torch.tensor(3.))}, param_groups=[dict(lr=0.1)]),
                args=argparse.Namespace(lr=0.1, opt='lamb', crop=None), version=2,
                metric=np.float64(82.3))


def _detectron(w):
    return dict(model={**prefixed('backbone.net.', w), 'backbone.simfp_2.0.weight': torch.ones(1),
                       'proposal_generator.conv.weight': torch.ones(1)}, iteration=7)


def _mmengine(w):
    from mmengine.logging import HistoryBuffer
    return dict(
        meta=dict(epoch=12, iter=40, cfg='model = dict()', dataset_meta=dict(classes=('a', 'b'))),
        state_dict={**prefixed('backbone.', w), 'neck.lateral.conv.weight': torch.ones(2),
                    'roi_head.bbox_head.fc_cls.weight': torch.ones(2)},
        message_hub=dict(log_scalars={'train/loss': HistoryBuffer([1.5, 1.], [1, 1])},
                         runtime_info=dict(iter=40), resumed_keys={}),
        param_schedulers=[dict(milestones=collections.Counter({8: 1}), gamma=0.1)])


#: How trainers nest and prefix weights.
NESTINGS = {
    'bare': lambda w: w,
    'state_dict': lambda w: dict(state_dict=w),
    'deit': lambda w: dict(model=w, model_ema={n: 0 * t for n, t in w.items()},
                           args=argparse.Namespace(x=1), scaler={}, epoch=299, max_accuracy=76.1),
    'timm': _timm,
    'module': lambda w: dict(state_dict=prefixed('module.', w)),
    'module.encoder': lambda w: dict(state_dict={**prefixed('module.encoder.', w),
                                                 'module.fc.weight': torch.ones(1)}),
    'transformers': lambda w: prefixed('model.', w),
    'lightning': lambda w: {'pytorch-lightning_version': '2', 'hyper_parameters': dict(lr=1e-3),
                            'state_dict': prefixed('model.net.', w)},
    'compiled': lambda w: dict(state_dict=prefixed('module._orig_mod.', w)),
    'mmengine': _mmengine,
    'detectron2': _detectron,
}


class Hostile:
    """Leaves a folder behind when it is executed."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@functools.lru_cache
def key_lists():
    """(name, {tensor: shape}) of every published network."""
    found = {}
    for path in sorted((DATA / 'mambavision' / 'keys').glob('*.json')):
        facts = json.loads(path.read_text())
        for form in (f for f in ('classification', 'dense') if f in facts):
            found[f'mambavision_{path.stem}_{form}'] = {n: tuple(s) for n, s, _ in facts[form]}
    for family in ('vmamba', 'vim', 'localmamba'):
        for name, facts in json.loads((DATA / family / 'keys.json').read_text()).items():
            found[name] = {n: tuple(s) for n, s in facts['keys'].items()}
    return found
