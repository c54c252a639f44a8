"""mmengine's ``init_cfg`` over our checkpoint loader."""
from __future__ import annotations

from collections.abc import Callable, Mapping

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor

from .arguments import check_names
from .checkpoints import load_backbone

__all__ = ['initialize_from_checkpoint']


def initialize_from_checkpoint(
        module: BaseModule, initialize_rest: Callable[[], None], *, may_differ: str | None = None,
        describe: Callable[[Mapping[str, Tensor]], str] | None = None,
        adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None) -> None:
    """Do what ``init_weights`` promises, with ``type='Pretrained'`` read by our loader.

    Args:
        module: has an ``init_cfg`` in mmengine's form.
        initialize_rest: ``super().init_weights`` of the caller; sees all entries but Pretrained.
        may_differ: see :func:`mmhybrid.models.checkpoints.compare`.
        describe: see :func:`mmhybrid.models.checkpoints.load_backbone`.
        adapt: see :func:`mmhybrid.models.checkpoints.load_backbone`.

    Raises:
        ValueError: if a checkpoint belongs to another model.
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
        check_names(entry, ['type', 'checkpoint', 'prefix', 'map_location'],
                    "init_cfg of type 'Pretrained': unknown key")
        result = load_backbone(
            module, entry['checkpoint'], prefix=entry.get('prefix'),
            map_location=entry.get('map_location') or 'cpu', may_differ=may_differ,
            describe=describe, adapt=adapt)
        print_log(f'{type(module).__name__} loaded from {entry["checkpoint"]}: {result}',
                  logger='current')
