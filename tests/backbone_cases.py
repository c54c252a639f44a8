"""The backbones of the registry, small, as test cases: new ones are covered without a new test."""

import inspect
import sys

import pytest
from fill import fill_state_dict, make_input

import mmhybrid.models  # noqa: F401  (fills the registry)
from mmhybrid.registry import MODELS


def backbone_classes():
    """Classes of the registry that live in a module with a table of architectures."""
    for cls in MODELS.module_dict.values():
        module = sys.modules[cls.__module__]
        if cls.__module__.startswith('mmhybrid.models.backbones') and hasattr(
                module, 'ARCHITECTURES'):
            yield cls, module.ARCHITECTURES


def shrunk(arch):
    """Keep the kind of an architecture, take away its size."""
    small = dict(arch, dim=8)
    for name, value in dict(depths=(1, 2, 2, 1), depth=5, stem_width=4, num_heads=(1, 1, 2, 4),
                            window_size=(8, 8, 4, 3)).items():
        if name in arch:
            small[name] = value
    return small


def cases():
    """Each class with each distinct small architecture, and the arguments that go with it."""
    seen = {}
    for cls, architectures in backbone_classes():
        for name, arch in architectures.items():
            small = shrunk(arch)
            key = cls, repr(sorted(small.items()))
            if key in seen:
                continue
            arguments = dict(arch=small, drop_path_rate=0.0)
            blocks = sum(small['depths']) if 'depths' in small else small['depth']
            if 'depth' in small:
                arguments.update(out_indices=(0, 1, 2, 4), img_size=64)
            if 'directions' in inspect.signature(cls.__init__).parameters:
                lists = [('h', 'h_flip', 'v', 'w2'), ('v_flip', 'w2_flip', 'w7', 'w7_flip')]
                arguments['directions'] = (lists * blocks)[:blocks]
            seen[key] = pytest.param(cls, arguments, id=f'{cls.__name__}-{name}')
    return list(seen.values())


CASES = cases()


def build(cls, arguments, **changes):
    return fill_state_dict(cls(**arguments | changes), dt_bias=-1.0)


def loss_of(maps):
    """Depend on every value of every map, each in its own way."""
    total = 0
    for i, y in enumerate(maps):
        total = total + (y * make_input(i, y.shape).to(y)).sum() / y[0].numel() ** 0.5
    return total
