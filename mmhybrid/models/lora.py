"""Low-rank adapters: of a trained backbone few weights learn, and the others stay.

    W + (alpha / rank) * B A,  A (..., rank, in), B (..., out, rank)

From Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).

The weight stays where it is and keeps its name, so files fit as before; A and B become parameters
of the same module.  Whoever reads ``layer.weight`` gets the sum, because the module's class is one
whose attribute computes it: layers, fused kernels, and modules that hand a matrix on themselves.
It is computed anew for each reader, in the precision of the weight even under autocast, where a
young adapter would vanish in the digits of a half precision weight.
"""
from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mmhybrid.ops.precision import autocast_off
from mmhybrid.spelling import suggestion
from mmhybrid.weights.adapters import DOWN, SCALE, UP

from .arguments import check_names

__all__ = ['TARGETS', 'Lora', 'adapt']

#: Kinds of weights that can have adapters, by the names of their layers or parameters.
TARGETS = {
    'qkv': r'qkv', 'proj': r'proj', 'in_proj': r'in_proj', 'out_proj': r'out_proj',
    'x_proj': r'x_proj(_b|_\d+|_weight)?', 'dt_proj': r'dt_projs?(_b|_\d+|_weight)?',
    'mlp': r'fc[12]'}
# What is new in a dense network, or for other classes: with weights from a file of classification
# these parts start at random, so they learn whatever is asked for.
_NEW = r'(outnorm_?\d+|norm|norm_f|head|classifier|fpn\d+)\.'
_NORMS = (_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_DYNAMICS = re.compile(r'(.*\.)?(A(_b)?_log(s|_\d+)?|D(s|_b|_\d+)?|dt_proj(_b|_\d+)?\.bias'
                       r'|dt_projs_bias)')


@dataclass(frozen=True)
class Lora:
    """How a backbone is adapted; ``lora`` of a backbone is a dictionary with these keys.

    Attributes:
        rank: of the adapters.  Weights that are narrower than the others of their block, x_proj and
            dt_proj, get one that is smaller in proportion, or they would hold most of what learns.
        alpha: the adapters' product counts alpha / rank times; None for 2 * rank.
        targets: which weights have adapters, of ``TARGETS``.
        norms: whether scales and biases of the norms learn.
        dynamics: whether the dynamics of the state learn: A_log, D and the bias of the step.
        train: parts of names of other parameters that learn as they are, e.g. ``'pos_embed'``.

    Raises:
        TypeError: for an unknown key or a value of the wrong type.
        ValueError: for a value out of range.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = tuple(TARGETS)
    norms: bool = True
    dynamics: bool = False
    train: tuple[str, ...] = ()

    def __post_init__(self):
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f'got lora rank {self.rank!r}, expected an integer of at least 1')
        if self.alpha is not None and not (
                isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
                and 0 < self.alpha < math.inf):
            raise ValueError(f'got lora alpha {self.alpha!r}, expected a number above 0, or None '
                             'for twice the rank')
        for key in ('targets', 'train'):
            names = getattr(self, key)
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise TypeError(f'got lora {key} {names!r}, expected a list of names')
            object.__setattr__(self, key, tuple(names))
        for name in self.targets:
            if name not in TARGETS:
                raise ValueError(f'got {name!r} in lora targets; {suggestion(name, TARGETS)}')
        for key in ('norms', 'dynamics'):
            if not isinstance(getattr(self, key), bool):
                raise TypeError(f'got lora {key} {getattr(self, key)!r}, expected True or False')

    @classmethod
    def of(cls, settings: Mapping | Lora) -> Lora:
        """Read the setting of a config."""
        if isinstance(settings, cls):
            return settings
        if not isinstance(settings, Mapping):
            raise TypeError(f'got lora={settings!r}, expected a dictionary such as dict(rank=8)')
        check_names(settings, [field.name for field in fields(cls)], 'lora: unknown key')
        if 'rank' not in settings:
            raise TypeError('lora has no rank, expected a dictionary such as dict(rank=8)')
        return cls(**settings)

    @property
    def scale(self) -> float:
        """The factor of the adapters' product."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def __str__(self) -> str:
        return ', '.join(f'{key}={value!r}' for key, value in asdict(self).items()
                         if value != self.__dataclass_fields__[key].default)


def adapt(network: nn.Module, lora: Lora, without: Iterable[nn.Module | nn.Parameter] = (),
          new: str = '') -> None:
    """Give a network adapters, unless it has them, and take the gradient from all that stays.

    Modes are left alone: BatchNorm goes on counting statistics, or not, as without adapters.

    Args:
        network: a backbone.
        lora: the settings.
        without: parts that are frozen or not run.
        new: regular expression; names that it matches from their start learn, too.

    Raises:
        ValueError: if nothing has such a name, or the rank is not less than a weight's.
    """
    if SCALE not in network._buffers:
        still = {id(p) for part in without
                 for p in (part.parameters() if isinstance(part, nn.Module) else [part])}
        _insert(network, lora, still)
    learns = re.compile('|'.join(filter(None, (_NEW, new))))
    for name, parameter, owner in _parameters(network):
        if not (learns.match(name) or _learns(lora, name, owner)):
            parameter.requires_grad_(False)


def _insert(network: nn.Module, lora: Lora, still: set[int]) -> None:
    places = [(holder, name, rank) for holder, name, rank in _places(network, lora)
              if id(holder._parameters[name]) not in still]
    if not places:
        raise ValueError(f'{type(network).__name__} has none of the layers that lora adapts '
                         f'({", ".join(lora.targets)}), or all of them are frozen (frozen_stages); '
                         'leave lora out, or change targets')
    names = [name for name, *_ in _parameters(network)]
    for text in lora.train:
        if not any(text in name for name in names):
            raise ValueError(f'got {text!r} in lora train, which is not part of any parameter name '
                             f'of {type(network).__name__}; {suggestion(text, names[:40])}')
    with torch.random.fork_rng(devices=[]):  # heads start from the numbers of a run without
        for holder, name, rank in places:
            _adapt_weight(holder, name, rank, lora.scale)
    network.register_buffer(SCALE, torch.tensor(lora.scale))


def _places(network: nn.Module, lora: Lora) -> Iterator[tuple[nn.Module, str, int]]:
    """Modules, names of their weights, and ranks."""
    wanted = re.compile('|'.join(TARGETS[name] for name in lora.targets) or r'\Z.')
    known = re.compile('|'.join(TARGETS.values()))
    for path, parent in network.named_modules():
        found = [(child, 'weight', name) for name, child in parent.named_children()
                 if isinstance(child, nn.Linear) and known.fullmatch(name)]
        found += [(parent, name, name) for name, p in parent._parameters.items()
                  if p is not None and p.dim() == 3 and known.fullmatch(name)]
        sides = [min(holder._parameters[name].shape[-2:]) for holder, name, _ in found]
        if found and lora.rank >= max(sides):
            raise ValueError(
                f'got lora rank {lora.rank}, but the weights of {path or "the network"} have rank '
                f'{max(sides)} themselves; take a smaller one, such as 8, or train without lora')
        for (holder, name, kind), side in zip(found, sides, strict=True):
            if wanted.fullmatch(kind):
                yield holder, name, -(-lora.rank * side // max(sides))


def _adapt_weight(holder: nn.Module, name: str, rank: int, scale: float) -> None:
    weight = holder._parameters[name]
    *more, rows, columns = weight.shape
    down, up = weight.new_empty(*more, rank, columns), weight.new_zeros(*more, rows, rank)
    nn.init.uniform_(down, -columns ** -0.5, columns ** -0.5)
    holder.register_parameter(name + DOWN, nn.Parameter(down))
    holder.register_parameter(name + UP, nn.Parameter(up))
    holder.adapter_scale = scale
    # Nobody else casts it for autocast; see weight_casts.py.
    holder.reads_itself = (*getattr(holder, 'reads_itself', ()), name)
    base, before = type(holder), getattr(type(holder), 'adapted', ())
    holder.__class__ = _adapted(base.__base__ if before else base, (*before, name))


@functools.cache
def _adapted(base: type, names: tuple[str, ...]) -> type:
    """A class whose instances give adapted weights under these names."""
    members = {name: property(_reader(name)) for name in names}
    members['__reduce__'] = lambda self: (_bare, (base, names), self.__dict__)
    return type(f'Adapted{base.__name__}', (base,),
                dict(members, adapted=names, __module__=__name__, __doc__=base.__doc__))


def _bare(base: type, names: tuple[str, ...]) -> nn.Module:
    cls = _adapted(base, names)
    return cls.__new__(cls)


def _reader(name: str):
    def read(self) -> Tensor:
        return _adapted_weight(self, name)

    return read


def _adapted_weight(holder: nn.Module, name: str) -> Tensor:
    own = holder._parameters
    weight = own[name]
    add = torch.addmm if weight.dim() == 2 else torch.baddbmm
    with autocast_off(weight.device):
        return add(weight, own[name + UP], own[name + DOWN], alpha=holder.adapter_scale)


def _learns(lora: Lora, name: str, owner: nn.Module) -> bool:
    return (name.endswith((DOWN, UP)) or lora.norms and isinstance(owner, _NORMS)
            or lora.dynamics and bool(_DYNAMICS.fullmatch(name))
            or any(text in name for text in lora.train))


def _parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    for path, owner in network.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            yield (f'{path}.{leaf}' if path else leaf), parameter, owner
