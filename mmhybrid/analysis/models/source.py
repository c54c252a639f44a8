"""Models from a config or a name, for tools that need neither data nor weights."""
from __future__ import annotations

import copy
import inspect
import os.path as osp
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from torch import nn
from torch.overrides import TorchFunctionMode

from mmhybrid.engine.config import load_config
from mmhybrid.errors import UserError
from mmhybrid.registry import MODELS
from mmhybrid.spelling import did_you_mean, nearest_few

__all__ = ['ModelSource', 'build_model', 'checked_shape', 'find_model', 'takes_samples']


@dataclass
class ModelSource:
    """What to build.

    Attributes:
        name: for tables.
        cfg: the model's dictionary.
        config: the whole config, or None for a model named by its class.
    """

    name: str
    cfg: ConfigDict
    config: Config | None

    @property
    def scope(self) -> str:
        """Registry in which names are looked up first."""
        return (self.config and self.config.get('default_scope')) or 'mmengine'


def find_model(spec: str, options: dict | None = None, backbone_only: bool = False) -> ModelSource:
    """Find the model that a command line names.

    Args:
        spec: a config file, of this or any other mm project; or the class of one of our backbones
            and classifiers with its variant, such as ``VMambaClassifier:tiny_s1l8``.
        options: changes of the config, as of ``--cfg-options``.
        backbone_only: take ``model.backbone`` instead of the whole model.

    Raises:
        UserError: if there is no such file or class, or it has no model or backbone.
    """
    if not spec.endswith('.py') and osp.sep not in spec:
        return _named_model(spec, options, backbone_only)
    config, _ = load_config(spec, options)
    name, cfg = osp.splitext(osp.basename(spec))[0], config.get('model')
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise UserError(f'{spec} has no model=dict(type=...), so there is nothing to build.')
    if backbone_only:
        cfg, name = _backbone_of(cfg, spec), f'backbone of {name}'
    return ModelSource(name, cfg, config)


def _named_model(spec: str, options: dict | None, backbone_only: bool) -> ModelSource:
    name, _, arch = spec.partition(':')
    known = [key for key, value in MODELS.module_dict.items() if _is_ours(value)]
    if name.removeprefix('mmhybrid.') not in known:
        near = nearest_few(name, known, 1) or sorted(known)
        raise UserError(f'{spec} is neither a config file (*.py) nor one of our models.'
                        + did_you_mean(*near))
    config = Config(dict(model=dict(type=f"mmhybrid.{name.removeprefix('mmhybrid.')}")))
    if arch:
        config.model.arch = arch
    config.merge_from_dict(options or {})
    cfg = _backbone_of(config.model, spec) if backbone_only else config.model
    return ModelSource(spec, cfg, None)


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith(tuple(
        f'mmhybrid.models.{room}.' for room in ('backbones', 'classifiers', 'dropins')))


def _backbone_of(cfg: ConfigDict, spec: str) -> ConfigDict:
    if 'backbone' in cfg:
        return cfg.backbone
    if 'Classifier' in str(cfg.type):
        raise UserError(f'{spec} is {cfg.type}, which has no part called backbone. Leave out '
                        '--backbone-only, or name the backbone itself.')
    return cfg  # a backbone already


class _Shapes(TorchFunctionMode):
    """Around constructors on the meta device.

    Keeps numbers real that they read one by one, such as rates of stochastic depth, and leaves out
    initialisation, which takes half of the time and fills nothing.
    """

    filling = frozenset(getattr(torch.Tensor, name) for name in (
        'add_', 'clamp_', 'copy_', 'div_', 'erfinv_', 'fill_', 'mul_', 'normal_', 'uniform_',
        'zero_'))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs = {**kwargs, 'device': 'cpu'}
        elif func in self.filling and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


def build_model(source: ModelSource, device: str | torch.device = 'cpu',
                seed: int | None = None) -> nn.Module:
    """Build a model as it is before any weights are loaded.

    Args:
        source: of :func:`find_model`.
        device: where it goes; on 'meta' parameters have shapes but no memory.
        seed: of the random weights.

    Raises:
        UserError: if the config does not fit its classes.
    """
    cfg = copy.deepcopy(source.cfg)
    if seed is not None:
        torch.manual_seed(seed)
    on_meta = torch.device(device).type == 'meta'
    try:
        with DefaultScope.overwrite_default_scope(source.scope), ExitStack() as stack:
            if on_meta:
                stack.enter_context(torch.device('meta'))
                stack.enter_context(_Shapes())
            model = MODELS.build(cfg)
    except (TypeError, ValueError, KeyError, ImportError, AssertionError, RuntimeError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f'{source.name} cannot be built. {type(error).__name__}: {text}\n'
                        '(--traceback shows where)') from error
    return revert_sync_batchnorm(model).to(device)


def takes_samples(model: nn.Module) -> bool:
    """Whether a model is called as those of mmdet and mmseg: with data samples and a mode."""
    return {'data_samples', 'mode'} <= set(inspect.signature(model.forward).parameters)


def checked_shape(values: Sequence[int]) -> tuple[int, int]:
    """Height and width from one or two numbers.

    Raises:
        UserError: for anything but one or two positive numbers.
    """
    if len(values) not in (1, 2) or min(values) < 1:
        raise UserError(f'--shape got {" ".join(map(str, values))}; expected a height and a width '
                        'in pixels such as --shape 800 1280, or one number for a square.')
    return values[0], values[-1]
