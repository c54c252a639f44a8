"""``--lora`` and ``--optimizer-8bit``: training where memory or data are short."""
from __future__ import annotations

import inspect

from mmengine.config import Config, ConfigDict
from mmengine.model import is_model_wrapper
from mmengine.registry import OPTIMIZERS as ROOT_OPTIMIZERS
from torch import nn

from mmhybrid.models.backbones.base import DenseBackbone
from mmhybrid.models.lora import Lora
from mmhybrid.weights import strip_parallel
from mmhybrid.weights.adapters import DOWN, SCALE, UP, adapters_of

from ..errors import UserError
from ..registry import MODELS, find_type
from .amp import has_accelerator
from .config import has_weights

__all__ = ['EIGHT_BIT', 'INSTALL', 'apply_eight_bit', 'apply_lora', 'check_adapters',
           'check_lora_start', 'describe_lora']

#: Optimizers whose states bitsandbytes keeps in eight bits, and whether they can be paged out.
EIGHT_BIT = {'AdamW': True, 'Adam': True, 'Lion': True, 'SGD': False, 'RMSprop': False,
             'Adagrad': False}
INSTALL = 'pip install bitsandbytes'
# How torch's optimizers step, which bitsandbytes' decide for themselves.
_OF_TORCH = ('fused', 'foreach')


# --- adapters -------------------------------------------------------------------------------------

def apply_lora(cfg: Config, rank: int | None) -> None:
    """Let the backbone learn through adapters of this rank, or as ``model.backbone.lora`` says.

    Raises:
        UserError: if the backbone has no such setting, or it makes no sense.
    """
    backbone = cfg.model.get('backbone')
    if rank is not None:
        _check_takes_lora(cfg, backbone)
        backbone.lora = ConfigDict(backbone.get('lora') or {}, rank=rank)
    settings = backbone.get('lora') if isinstance(backbone, dict) else None
    if settings is None:
        return
    try:
        Lora.of(settings)
    except (TypeError, ValueError) as error:
        raise UserError(f'model.backbone.lora: {error}.') from error


def check_lora_start(cfg: Config) -> None:
    """Raise UserError if weights that adapters leave as they are would be random ones."""
    backbone = cfg.model.get('backbone')
    if isinstance(backbone, dict) and backbone.get('lora') and not has_weights(cfg):
        raise UserError(
            '--lora (model.backbone.lora) leaves the weights of the backbone as they are, and this '
            'run would start from random ones, from which no detector learns. Add --pretrained '
            'PATH or load_from.')


def _check_takes_lora(cfg: Config, backbone: ConfigDict | None) -> None:
    if not isinstance(backbone, dict) or 'type' not in backbone:
        raise UserError('--lora is for model.backbone, and this model has none.')
    kind = find_type(backbone, MODELS, cfg.get('default_scope') or 'mmengine')
    if not (isinstance(kind, type) and issubclass(kind, DenseBackbone)
            and 'lora' in inspect.signature(kind).parameters):
        takers = sorted(name for name, each in MODELS.module_dict.items() if isinstance(each, type)
                        and issubclass(each, DenseBackbone)
                        and 'lora' in inspect.signature(each).parameters)
        raise UserError(f'--lora: model.backbone.type is {backbone.type!r}, which has no setting '
                        f'lora. These have it: {", ".join(takers)}.')


def describe_lora(model: nn.Module) -> str | None:
    """Say what of a model with adapters learns; None for one without."""
    model = model.module if is_model_wrapper(model) else model
    backbone = getattr(model, 'backbone', None)
    lora = getattr(backbone, 'lora', None)
    if lora is None:
        return None
    inside = dict(backbone.named_parameters())
    adapters = sum(p.numel() for name, p in inside.items() if name.endswith((DOWN, UP)))
    whole = sum(p.numel() for p in inside.values()) - adapters
    learns = sum(p.numel() for p in inside.values() if p.requires_grad)
    around = sum(p.numel() for p in model.parameters() if p.requires_grad) - learns
    return (f'LoRA ({lora}): {len(adapters_of(inside))} weights of the backbone have adapters, of '
            f'{adapters / 1e6:.2f} M values. Of the backbone {learns / 1e6:.2f} M values learn, '
            f'{100 * learns / whole:.1f} % of its {whole / 1e6:.2f} M; of the rest (neck, heads) '
            f'{around / 1e6:.2f} M. BatchNorm counts its statistics as it does without adapters.')


def check_adapters(model: nn.Module, state_dict: dict, path: str) -> None:
    """Raise UserError unless a run that goes on has the adapters that its checkpoint has.

    (Where nothing goes on, adapters of a file are merged into the weights.)
    """
    before, now = (strip_parallel(state)[0] for state in (state_dict, model.state_dict()))
    ranks = [adapters_of(state) for state in (before, now)]
    scales = [{name: float(tensor) for name, tensor in state.items() if name.endswith(SCALE)}
              for state in (before, now)]
    if ranks[0] == ranks[1] and scales[0] == scales[1]:
        return
    said = [f'adapters of {len(each)} weights, up to rank {max(each.values())} with the factor '
            f'{max(factors.values(), default=0):g}' if each else 'no adapters'
            for each, factors in zip(ranks, scales, strict=True)]
    raise UserError(
        f'{path} was trained with {said[0]}, and this run has {said[1]} (--lora, '
        'model.backbone.lora). Set that back, or start a new training from its weights: '
        f'--cfg-options load_from={path} , without --resume.')


# --- states of the optimizer ----------------------------------------------------------------------

def apply_eight_bit(cfg: Config, wanted: str | None) -> list[str]:
    """Keep the states of the optimizer in eight bits, with bitsandbytes.

    Args:
        cfg: the config, whose optimizer is replaced by its kind of eight bits.
        wanted: None, 'resident' for the GPU's memory, or 'paged' for states that move to the
            CPU's when the GPU has no room.

    Returns:
        What to say in the log.

    Raises:
        UserError: if there is no such optimizer, no bitsandbytes, or no GPU for paging.
    """
    if wanted is None:
        return []
    optimizer = cfg.optim_wrapper.get('optimizer')
    kind = optimizer.get('type') if isinstance(optimizer, dict) else None
    known = [name for name, paged in EIGHT_BIT.items() if paged or wanted != 'paged']
    if kind not in known:
        raise UserError(f'--optimizer-8bit{" paged" * (wanted == "paged")} is for '
                        f'{", ".join(known)}, and optim_wrapper.optimizer.type is {kind!r}.')
    name = f'{"Paged" * (wanted == "paged")}{kind}8bit'
    if name not in ROOT_OPTIMIZERS.module_dict:
        raise UserError(f'--optimizer-8bit needs the package bitsandbytes, which is not installed '
                        f'(or does not import): {INSTALL}')
    if wanted == 'paged' and not has_accelerator():
        raise UserError('--optimizer-8bit paged moves states between a GPU and the CPU, and there '
                        'is no GPU. Leave "paged" out.')
    dropped = [key for key in _OF_TORCH if optimizer.pop(key, None) is not None]
    optimizer.type = name
    less = f', without {", ".join(dropped)}' if dropped else ''
    return [f'The optimizer is {name} of bitsandbytes{less}.']
