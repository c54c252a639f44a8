"""``--norms``: what BatchNorm does in batches that are too small for it."""
from __future__ import annotations

import math
from collections.abc import Iterator

from mmhybrid.engine.amp import has_accelerator
from mmhybrid.engine.config import has_weights
from mmhybrid.engine.distributed import SYNC_BN
from mmhybrid.engine.small_batches import FEW
from mmhybrid.errors import UserError

__all__ = ['apply_norms']

GROUPS = 32
WIDTHS = ('channels', 'out_channels', 'conv_out_channels', 'feat_channels')


def apply_norms(cfg, policy: str, processes: int) -> list[str]:
    """Let small batches do no harm.

    Args:
        cfg: the config, changed in place.
        policy: ``frozen``, ``gn``, ``sync``, or ``auto``, which chooses: several processes
            synchronise; one alone keeps the statistics of weights it starts from and gives neck
            and heads GroupNorm. Batches of 8 images or more are left alone.
        processes: that share a batch.

    Returns:
        Notes for the log.

    Raises:
        UserError: the policy has nothing to work on, or no effect.
    """
    batch = cfg.train_dataloader.get('batch_size') or 1
    if policy != 'auto':
        return [f'--norms {policy}: {_APPLY[policy](cfg, processes)}.']
    if batch >= FEW:
        return [f'--norms auto: batches of {batch} images on each process are enough for '
                'BatchNorm, and nothing was changed.']
    told = f'--norms auto: {batch} image(s) on each of {processes} process(es) are few; '
    if processes > 1 and has_accelerator() and batch * processes >= FEW:
        return [f'{told}chosen sync: {_sync(cfg, processes)}.']
    chosen = []
    if has_weights(cfg):
        chosen.append(f'frozen: {_frozen(cfg, processes)}')
    if any(_batch_norms(cfg.model)):
        chosen.append(f'gn: {_groups(cfg, processes)}')
    if not chosen:
        return [f'{told}but the backbone starts from random weights, whose statistics it has to '
                'learn, and no other part has BatchNorm. Nothing was changed.']
    return [f'{told}chosen {"; ".join(chosen)}.']


def _frozen(cfg, processes: int) -> str:
    if not has_weights(cfg):
        raise UserError('--norms frozen keeps the statistics of the weights that training starts '
                        'from, and this one starts from random weights. Give some (--pretrained), '
                        'or take --norms gn.')
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='mmhybrid.FrozenNormsHook')]
    return 'BatchNorm of the backbone keeps the statistics it starts with'


def _groups(cfg, processes: int) -> str:
    found = [*_batch_norms(cfg.model)]
    if not found:
        raise UserError('--norms gn: no norm_cfg of neck and heads says BN or SyncBN, so there is '
                        'nothing to change. BatchNorm of a backbone is part of its weights; '
                        '--norms frozen keeps its statistics.')
    for owner, norm in found:
        widths = [owner[key] for key in WIDTHS if isinstance(owner.get(key), int)]
        norm.update(type='GN', num_groups=math.gcd(GROUPS, *widths))
        norm.pop('momentum', None)
    return f'GroupNorm instead of BatchNorm in {len(found)} setting(s) of neck and heads'


def _batch_norms(model) -> Iterator[tuple[dict, dict]]:
    """Parts outside the backbone that say BatchNorm, and where they do."""
    stack = [value for key, value in model.items()
             if key not in ('backbone', 'train_cfg', 'test_cfg')]
    stack.append({key: value for key, value in model.items() if key == 'norm_cfg'})
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            norm = node.get('norm_cfg')
            if isinstance(norm, dict) and str(norm.get('type')) in ('BN', 'BN2d', *SYNC_BN):
                yield node, norm
            stack.extend(node.values())
        elif isinstance(node, (list, tuple)):
            stack.extend(node)


def _sync(cfg, processes: int) -> str:
    if processes == 1 or not has_accelerator():
        raise UserError('--norms sync computes statistics over several processes on GPUs, and '
                        f'here {"there is one process" if processes == 1 else "is no GPU"}. Take '
                        '--norms frozen, or gn.')
    cfg.sync_bn = 'torch'
    return f'BatchNorm computes over the images of all {processes} processes'


_APPLY = dict(frozen=_frozen, gn=_groups, sync=_sync)
