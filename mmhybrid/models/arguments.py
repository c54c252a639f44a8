"""Arguments of registered classes: a setting is either used or refused.

Config dictionaries are merged from many files, so a misspelt or inherited key is the usual mistake,
and a ``**kwargs`` parameter would hide it.  The helpers here turn it into an error that names the
nearest valid spelling.
"""
from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence

from mmhybrid.spelling import suggestion

__all__ = ['check_choice', 'check_flags', 'check_integers', 'check_names', 'check_number',
           'check_out_indices', 'check_rate', 'checked_architecture', 'strict_arguments']


def check_names(given: Iterable[str], valid: Iterable[str], what: str) -> None:
    """Refuse names that are not valid.

    Args:
        given: names that came.
        valid: names that are known.
        what: beginning of the message, e.g. ``"MambaVision: unknown argument"``.

    Raises:
        TypeError: naming every unknown name, the nearest valid one and all valid ones.
    """
    valid = list(valid)
    unknown = [name for name in given if name not in valid]
    if unknown:
        listed = ', '.join(repr(name) for name in unknown)
        raise TypeError(f'{what} {listed}; {suggestion(unknown[0], valid)}')


def strict_arguments(cls: type) -> type:
    """Class decorator: an unknown keyword is a TypeError that names the nearest valid one.

    The class keeps its explicit signature and needs no ``**kwargs``; Python would refuse the
    keyword by itself, only less helpfully.
    """
    init = cls.__init__
    parameters = list(inspect.signature(init).parameters.values())[1:]
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters), f'{cls.__name__} swallows keywords'
    valid = [p.name for p in parameters]

    @functools.wraps(init)
    def checked_init(self, *args, **kwargs):
        check_names(kwargs, valid, f'{cls.__name__}: unknown argument')
        init(self, *args, **kwargs)

    cls.__init__ = checked_init
    return cls


def checked_architecture(arch: str | dict, known: Mapping[str, dict], required: Sequence[str],
                         optional: Mapping[str, object]) -> dict:
    """Turn the name of a variant or a dictionary into a complete dictionary.

    Raises:
        TypeError: for an unknown key or another type.
        ValueError: for an unknown name or a missing key.
    """
    if isinstance(arch, str):
        if arch not in known:
            raise ValueError(f'got arch={arch!r}; {suggestion(arch, known)}; or give a '
                             f'dictionary with the keys {", ".join(required)}')
        arch = known[arch]
    elif not isinstance(arch, dict):
        raise TypeError(f'got arch of type {type(arch).__name__}, expected the name of a variant '
                        f'({", ".join(known)}) or a dictionary')
    check_names(arch, [*required, *optional], 'arch: unknown key')
    missing = [key for key in required if key not in arch]
    if missing:
        raise ValueError(f'the arch dictionary lacks {", ".join(missing)}; it needs all of '
                         f'{", ".join(required)}')
    return {**optional, **arch}


def check_integers(name: str, values: Sequence[int], low: int, high: int | None = None,
                   length: int | None = None) -> None:
    """Refuse anything but integers between ``low`` and ``high``."""
    wanted = f'from {low} to {high}' if high is not None else f'of at least {low}'
    if not isinstance(values, (list, tuple)) or not all(
            isinstance(v, int) and not isinstance(v, bool) for v in values):
        shown = values[0] if isinstance(values, list) and len(values) == 1 else values
        raise TypeError(f'got {name}={shown!r}, expected integers {wanted}')
    if length is not None and len(values) != length:
        raise ValueError(f'got {len(values)} values for {name} ({values}), expected {length}, '
                         'one per stage')
    for value in values:
        if value < low or (high is not None and value > high):
            raise ValueError(f'got {value} for {name}, expected an integer {wanted}')


def check_out_indices(out_indices: Sequence[int], count: int, example: str) -> None:
    """Refuse anything but ascending indices of ``count`` stages or blocks."""
    check_integers('out_indices', out_indices, 0, count - 1)
    if not out_indices or list(out_indices) != sorted(set(out_indices)):
        raise ValueError(f'got out_indices={out_indices}, expected at least one stage or block and '
                         f'ascending order without repeats, such as {example}')


def check_number(name: str, value: float, above: float | None = None) -> None:
    """Refuse anything but a number (greater than ``above``)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f'got {name}={value!r}, expected a number')
    if above is not None and value <= above:
        wanted = 'a positive number' if above == 0 else f'a number above {above}'
        raise ValueError(f'got {name}={value}, expected {wanted}')


def check_rate(name: str, value: float) -> None:
    """Refuse anything but a number in [0, 1)."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f'got {name}={value}, expected 0 <= rate < 1')


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse anything but one of the named choices."""
    if value not in choices:
        raise ValueError(f'got {name}={value!r}; {suggestion(str(value), choices)}')


def check_flags(**flags: bool) -> None:
    """Refuse anything but True and False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f'got {name}={value!r}, expected True or False')
