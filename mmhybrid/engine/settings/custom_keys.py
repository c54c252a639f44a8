"""Rules for parameters whose names no parameter has."""
from __future__ import annotations

import re
from collections.abc import Iterable

from mmengine.config import Config

from mmhybrid.errors import UserError
from mmhybrid.spelling import did_you_mean, is_slip, nearest

__all__ = ['check_custom_keys']

_SHORTEST = 4  # letters; any two shorter names look alike


def check_custom_keys(cfg: Config, path: str, parameters: Iterable[str]) -> list[str]:
    """Refuse ``optim_wrapper.paramwise_cfg.custom_keys`` that miss the parameter they mean.

    A key that is in no name may be honest: recipes list parameters that only some variants of a
    network have. It is an error if it nearly is a name, or a part of one between dots.

    Args:
        cfg: the whole config.
        path: the file it was read from.
        parameters: names of the model's parameters.

    Returns:
        Warnings about the other keys without effect.

    Raises:
        UserError: naming every misspelt key and the name that was probably meant.
    """
    rules = (cfg.get('optim_wrapper') or {}).get('paramwise_cfg') or {}
    names, place = list(parameters), 'optim_wrapper.paramwise_cfg.custom_keys'
    idle = [key for key in rules.get('custom_keys') or () if not any(key in each for each in names)]
    meant = cfg.get('extra_settings') or ()
    slips = {key: near for key in idle if f'{place}.{key}' not in meant
             and (near := _meant(key, names))}
    if slips:
        listed = '\n'.join(f'  {place}.{key}: no parameter has this in its name.'
                           + did_you_mean(near) for key, near in slips.items())
        paths = ', '.join(repr(f'{place}.{key}') for key in slips)
        raise UserError(f'{path} has rules without effect:\n{listed}\nCorrect or remove '
                        f'them, or keep them with extra_settings=[{paths}].')
    return [f'{place}.{key} is not part of any parameter name.' for key in idle]


def _meant(key: str, names: list[str]) -> str | None:
    """The part of a name that differs from ``key`` by a slip, and not only in a number."""
    if len(key) < _SHORTEST:
        return None
    length = key.count('.') + 1
    parts = {'.'.join(split[start:start + length]) for name in names
             for split in [name.split('.')] for start in range(len(split) - length + 1)}
    if _form(key) in map(_form, parts):
        return None
    return nearest(key, [part for part in parts if is_slip(_form(key), _form(part))])


def _form(name: str) -> str:
    return re.sub(r'\d+', '0', name)
