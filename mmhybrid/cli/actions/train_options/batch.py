"""``--batch``, ``--accumulate`` and ``--lr``: images per step, and the rate that goes with them."""
from __future__ import annotations

from mmhybrid.cli._train_options import AUTO
from mmhybrid.errors import UserError

from .largest_batch import largest_batch

__all__ = ['apply_batch']

LR = 'optim_wrapper.optimizer.lr'


def apply_batch(cfg, options: dict, changed: dict, processes: int) -> list[str]:
    """Set the batch, how many make a step, and the learning rate.

    Args:
        cfg: the config, changed in place.
        options: of the command line; ``batch``, ``accumulate`` and ``lr`` count.
        changed: what ``--cfg-options`` gave: a rate among it stays.
        processes: that share a batch.

    Returns:
        Notes for the log.

    Raises:
        UserError: the config has several loaders or optimizers, of which an option cannot tell
            which is meant.
    """
    notes = []
    before = _images(cfg)
    if 'accumulate' in options:
        cfg.optim_wrapper.accumulative_counts = options['accumulate']
    if 'batch' in options:
        if not isinstance(cfg.train_dataloader, dict) or 'batch_size' not in cfg.train_dataloader:
            raise UserError(f'--batch {options["batch"]}: train_dataloader has no batch_size, so '
                            'its data set makes the batches. Set them there.')
        batch = options['batch']
        if batch == AUTO:
            batch, notes = largest_batch(cfg, processes)
        cfg.train_dataloader.batch_size = batch
    images = _images(cfg)
    if {'batch', 'accumulate'} & options.keys():
        notes.append(f'Each step of the optimizer takes {_product(cfg, processes)} images.')
    if 'lr' in options:
        _optimizer(cfg, f'--lr {options["lr"]:g}').lr = options['lr']
        _as_it_is(cfg)
        notes.append(f'--lr: the learning rate is {options["lr"]:g}, whatever the batch.')
    elif {'batch', 'accumulate'} & options.keys() and LR not in changed:
        notes += _scale(cfg, before, images, processes)
    return notes


def _images(cfg) -> int:
    """Images per step of the optimizer on one process."""
    loader = cfg.train_dataloader
    batch = loader.get('batch_size') if isinstance(loader, dict) else None
    return (batch or 1) * (cfg.optim_wrapper.get('accumulative_counts') or 1)


def _product(cfg, processes: int) -> str:
    counts = [(cfg.train_dataloader.get('batch_size', 1), ''), (processes, 'processes'),
              (cfg.optim_wrapper.get('accumulative_counts', 1), 'batches')]
    shown = ' x '.join(f'{count} {what}'.strip() for count, what in counts
                       if count != 1 or not what)
    return f'{_images(cfg) * processes} ({shown})' if 'x' in shown else shown


def _optimizer(cfg, option: str):
    optimizer = cfg.optim_wrapper.get('optimizer')
    if not isinstance(optimizer, dict):
        raise UserError(f'{option}: optim_wrapper has no optimizer of its own, but several with a '
                        'rate each. Set them with --cfg-options optim_wrapper.NAME.optimizer.lr=.')
    return optimizer


def _as_it_is(cfg) -> None:
    if cfg.get('auto_scale_lr'):
        cfg.auto_scale_lr.enable = False


def _scale(cfg, before: int, images: int, processes: int) -> list[str]:
    """The linear rule: a rate in proportion to the images per step."""
    optimizer = cfg.optim_wrapper.get('optimizer')
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get('lr'), (int, float)):
        return ['The learning rates stay as they are: optim_wrapper has not one rate to scale.']
    base = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    whence = 'the rate was chosen for (auto_scale_lr.base_batch_size)'
    if not base:
        base, whence = before * processes, 'the config has'
    old, ratio = optimizer.lr, images * processes / base
    optimizer.lr = old * ratio
    _as_it_is(cfg)
    return [f'The learning rate is {optimizer.lr:.4g}: {old:g} x {images * processes} images per '
            f'step / {base} that {whence}. --lr RATE sets it as it is.']
