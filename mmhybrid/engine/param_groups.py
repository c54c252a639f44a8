"""Which tensors get weight decay, and with which learning rate.

A hybrid backbone mixes kinds of parameters that one rule does not fit: matrices, normalisation
scales, and the state matrices of the scan.  The released MambaVision recipes exempt every tensor
whose *name* contains "norm" and nothing else, so A_log, D, all biases and the stem's BatchNorms
do decay, although the model code marks A_log and D as exempt.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Callable

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmhybrid.families import FAMILIES
from mmhybrid.spelling import did_you_mean, nearest_few

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ['HybridOptimWrapperConstructor', 'is_exempt']

POLICIES = ('published', 'ssm', '1d')
NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
# State-space parameters hold one number per channel and state (or a per-direction stack of these),
# so their rank does not give them away. Ours are marked; those of other implementations have names.
STATE_NAMES = re.compile('|'.join(family.state_names for family in FAMILIES.values()))

CHOICES = {
    'no_decay': 'which tensors are exempt from weight decay: "published", "ssm", "1d" or None',
    'layer_decay': 'factor on the learning rate per depth, from the heads down to the stem',
    'custom_keys': 'substring of a name -> dict(lr_mult=, decay_mult=), longest substring first',
    'bypass_duplicate': 'take a tensor that two modules share once instead of refusing it',
    'print_groups': 'print the table of all trainable tensors',
}


def is_exempt(policy: str | None, name: str, param: nn.Parameter, owner: nn.Module) -> bool:
    """Whether ``policy`` frees a tensor from weight decay.

    Args:
        policy: "published" (names that contain "norm", as in the released MambaVision recipes),
            "ssm" (state-space parameters, norm layers of every kind, biases, and every other
            tensor with fewer than two dimensions), "1d" (tensors with fewer than two dimensions,
            and biases, as timm and BEiT have it) or None (nothing is exempt).
        name: full name of the parameter in the model.
        param: the parameter.
        owner: the module that holds it.
    """
    if policy is None:
        return False
    if policy == 'published':
        return 'norm' in name
    leaf = name.rpartition('.')[2]
    if param.ndim <= 1 or leaf == 'bias':
        return True
    return policy == 'ssm' and bool(
        STATE_NAMES.fullmatch(leaf) or isinstance(owner, NORM_LAYERS)
        or getattr(param, '_no_weight_decay', False))


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class HybridOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups for models that hold state-space layers.

    All tensors with the same learning rate and weight decay share one group, so an optimizer has
    two or a few groups instead of one per tensor.

    Args:
        optim_wrapper_cfg: as for mmengine's constructor: ``optimizer``, and optionally ``type``
            and the wrapper's arguments.
        paramwise_cfg: any of

            - ``no_decay``: "published", "ssm", "1d" or None, see :func:`is_exempt`. Default None.
            - ``layer_decay``: factor r in (0, 1] of layer-wise learning rates: a tensor at depth d
              of D learns with r ** (D - 1 - d) times the rate. The backbone says how deep its
              tensors lie (``get_layer_depth``, as all of mmhybrid's do): the embedding is 0, each
              block one more, and whatever follows the last block, the neck and the heads have the
              full rate. Multiplies with ``lr_mult``. Default None: one rate for all.
            - ``custom_keys``: ``{substring of a name: dict(lr_mult=, decay_mult=)}``. The longest
              matching substring counts, then the alphabetically first. Differs from mmengine in
              one point: an entry without ``decay_mult`` leaves ``no_decay`` in force.
            - ``bypass_duplicate``: take a tensor that two modules share once. Otherwise such a
              tensor is an error. Default False.
            - ``print_groups``: log one line per trainable tensor. Default False.

    Raises:
        TypeError: for an unknown key, with the nearest valid one.
        ValueError: for an unknown policy, a decay rule without ``optimizer.weight_decay``, or
            ``layer_decay`` for a model without a backbone that declares depths.
    """

    def _validate_cfg(self) -> None:
        if not isinstance(self.paramwise_cfg, dict):
            raise TypeError(f'paramwise_cfg must be a dict or None, got {self.paramwise_cfg!r}.')
        for key in self.paramwise_cfg:
            _check_key(key, CHOICES, 'paramwise_cfg')
        policy = self.paramwise_cfg.get('no_decay')
        if policy is not None and policy not in POLICIES:
            raise ValueError(
                f"paramwise_cfg.no_decay must be 'published', 'ssm', '1d' or None, got {policy!r}. "
                f"'published' exempts names that contain \"norm\"; 'ssm' exempts state-space "
                "parameters, norms, biases and all one-dimensional tensors; '1d' exempts biases "
                'and all one-dimensional tensors.')
        rate = self.paramwise_cfg.get('layer_decay')
        if rate is not None:
            if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 < rate <= 1:
                raise ValueError('paramwise_cfg.layer_decay must be a number above 0 and at most '
                                 f'1 (1 is one rate for all), got {rate!r}.')
            if self.base_lr is None:
                raise ValueError('paramwise_cfg.layer_decay is set, but optimizer.lr is not '
                                 'given. Set it in optim_wrapper.optimizer.')
        custom = self.paramwise_cfg.get('custom_keys') or {}
        if not isinstance(custom, dict):
            raise TypeError('paramwise_cfg.custom_keys must be a dict of '
                            f'name -> dict(lr_mult=, decay_mult=), got {custom!r}.')
        for key, setting in custom.items():
            if not isinstance(setting, dict):
                raise TypeError(f'paramwise_cfg.custom_keys[{key!r}] must be '
                                f'dict(lr_mult=, decay_mult=), got {setting!r}.')
            for name in setting:
                _check_key(name, ('lr_mult', 'decay_mult'), f'custom_keys[{key!r}]')
        decays = policy or any('decay_mult' in setting for setting in custom.values())
        if decays and self.base_wd is None:
            raise ValueError('paramwise_cfg sets weight decay rules, but optimizer.weight_decay '
                             'is not given. Set it in optim_wrapper.optimizer.')
        if self.base_lr is None and any('lr_mult' in setting for setting in custom.values()):
            raise ValueError('paramwise_cfg.custom_keys sets lr_mult, but optimizer.lr is not '
                             'given. Set it in optim_wrapper.optimizer.')

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '',
                   is_dcn_module=None) -> None:
        """Append the groups of ``module`` to ``params``, in the order in which they appear."""
        policy = self.paramwise_cfg.get('no_decay')
        custom = self.paramwise_cfg.get('custom_keys') or {}
        layer_rate = _layer_rates(module, prefix, self.paramwise_cfg.get('layer_decay'))
        keys = sorted(sorted(custom), key=len, reverse=True)
        unused = set(keys)
        groups: dict[tuple, dict] = {}
        seen: dict[int, str] = {}
        table, frozen = [], 0
        for name, param, owner in _parameters(module, prefix):
            if id(param) in seen:
                if not self.paramwise_cfg.get('bypass_duplicate', False):
                    raise ValueError(
                        f'{name} and {seen[id(param)]} are the same tensor. Set '
                        'paramwise_cfg.bypass_duplicate=True to give it to the optimizer once.')
                continue
            seen[id(param)] = name
            if not param.requires_grad:
                frozen += 1
                continue
            key = next((key for key in keys if key in name), None)
            unused.discard(key)
            setting = custom.get(key, {})
            decay_mult = setting.get('decay_mult')
            if decay_mult is None:
                decay_mult = 0.0 if is_exempt(policy, name, param, owner) else 1.0
            lr = None if self.base_lr is None else (
                self.base_lr * setting.get('lr_mult', 1.0) * layer_rate(name))
            decay = None if self.base_wd is None else self.base_wd * decay_mult
            group = groups.setdefault((lr, decay), {'params': []})
            if lr is not None:
                group['lr'] = lr
            if decay is not None:
                group['weight_decay'] = decay
            group['params'].append(param)
            table.append((name, param, lr, decay))
        params.extend(groups.values())
        for key in sorted(unused):
            print_log(f'paramwise_cfg.custom_keys[{key!r}] is not part of any parameter name.',
                      logger='current', level=logging.WARNING)
        self._report(table, frozen)

    def _report(self, table: list[tuple], frozen: int) -> None:
        totals: dict[tuple, list[int]] = {}
        for _, param, lr, decay in table:
            total = totals.setdefault((lr, decay), [0, 0])
            total[0] += 1
            total[1] += param.numel()
        lines = [f'  lr {_number(lr)}, weight decay {_number(decay)}: '
                 f'{tensors} tensors, {values:,} values'
                 for (lr, decay), (tensors, values) in totals.items()]
        chosen = ', '.join(f'{key}={self.paramwise_cfg.get(key)!r}'
                           for key in ('no_decay', 'layer_decay'))
        print_log(f'Parameter groups ({chosen}, {len(table)} trainable tensors, '
                  f'{frozen} frozen):\n' + '\n'.join(lines), logger='current')
        if self.paramwise_cfg.get('print_groups', False):
            numbers = {pair: index for index, pair in enumerate(totals)}
            width = max((len(name) for name, *_ in table), default=0)
            print_log('group  lr        decay     tensor\n' + '\n'.join(
                f'{numbers[lr, decay]:<5}  {_number(lr):<8}  {_number(decay):<8}  '
                f'{name:<{width}}  {tuple(param.shape)}'
                for name, param, lr, decay in table), logger='current')


def _layer_rates(model: nn.Module, prefix: str, decay: float | None) -> Callable[[str], float]:
    """Give the factor on the learning rate for each name of a parameter."""
    if decay is None:
        return lambda name: 1.0
    start = f'{prefix}.' if prefix else ''
    declared: dict[str, Callable] = {}
    for path, part in model.named_modules():
        inner = any(path.startswith(outer) for outer in declared)
        if hasattr(part, 'get_layer_depth') and not inner:
            declared[f'{path}.' if path else ''] = part.get_layer_depth
    if not declared:
        backbone = getattr(model, 'backbone', model)
        raise ValueError(
            f'paramwise_cfg.layer_decay={decay} needs a backbone that says how deep each of its '
            "parameters lies (a method get_layer_depth, as mmhybrid's backbones have), and "
            f'{type(backbone).__name__} does not. Leave layer_decay out, or set lr_mult of chosen '
            'names in paramwise_cfg.custom_keys.')

    def rate(name: str) -> float:
        for path, depth_of in declared.items():
            if name.startswith(start + path):
                depth, depths = depth_of(name, start + path)
                return decay ** (depths - 1 - depth)
        return 1.0

    return rate


def _parameters(module: nn.Module, prefix: str):
    """Yield (full name, parameter, owner), a shared tensor once per place where it is used."""
    for path, owner in module.named_modules(prefix=prefix):
        for leaf, param in owner.named_parameters(recurse=False):
            yield (f'{path}.{leaf}' if path else leaf), param, owner


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:g}'


def _check_key(key: str, valid, where: str) -> None:
    if key not in valid:
        raise TypeError(f'{where} got the unknown key {key!r}.'
                        f'{did_you_mean(*nearest_few(key, valid, 1))} Valid keys: '
                        f'{", ".join(valid)}.')
