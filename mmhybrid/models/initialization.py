"""mmengine's ``init_cfg`` over our checkpoint loader."""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit

from .arguments import check_names
from .checkpoints import load_backbone

__all__ = ['initialize_from_checkpoint']

_OPTIONS = ('prefix', 'map_location', 'key', 'strict', 'trust')


def initialize_from_checkpoint(module: BaseModule, initialize_rest: Callable[[], None]) -> None:
    """Do what ``init_weights`` promises, with ``type='Pretrained'`` read by our loader.

    Args:
        module: has an ``init_cfg`` in mmengine's form; an entry of type Pretrained has
            ``checkpoint`` and optionally what :func:`mmhybrid.models.checkpoints.load_backbone`
            takes: prefix, map_location, key, strict, trust.
        initialize_rest: ``super().init_weights`` of the caller; sees all entries but Pretrained.

    Raises:
        WeightsError: if a checkpoint cannot be used.
        FileNotFoundError: if it does not exist.
    """
    entries = module.init_cfg or []
    entries = [entries] if isinstance(entries, Mapping) else list(entries)
    pretrained = [e for e in entries if e.get('type') in ('Pretrained', PretrainedInit)]
    if not pretrained or module.is_init:
        initialize_rest()
        return
    given = module.init_cfg
    module.init_cfg = [e for e in entries if e not in pretrained] or None
    try:
        initialize_rest()
    finally:
        module.init_cfg = given
    for entry in pretrained:
        check_names(entry, ['type', 'checkpoint', *_OPTIONS],
                    "init_cfg of type 'Pretrained': unknown key")
        options = {key: entry[key] for key in _OPTIONS if entry.get(key) is not None}
        # A training may start from a classifier of other classes.
        report = load_backbone(module, entry['checkpoint'], new_classes=True, **options)
        level = logging.INFO if report.fits else logging.WARNING
        print_log(str(report), logger='current', level=level)
