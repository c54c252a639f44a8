"""Arguments of registered classes: a setting is either used or refused.

Config dictionaries are merged from many files, so a misspelt or inherited key is the usual mistake,
and a ``**kwargs`` parameter would hide it.  The helpers here turn it into an error that names the
nearest valid spelling.
"""
from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable

from mmhybrid.spelling import suggestion

__all__ = ['check_names', 'strict_arguments']


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
