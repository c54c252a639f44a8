"""Helpers for classes that accept the released configs word for word."""
from __future__ import annotations

import warnings
from collections.abc import Mapping

__all__ = ['NOT_GIVEN', 'fixed', 'pretrained_init', 'warn_without_effect']


class _NotGiven:
    def __repr__(self) -> str:
        return '<not given>'


#: Default of arguments that are accepted without effect.
NOT_GIVEN = _NotGiven()


def warn_without_effect(name: str, settings: Mapping[str, object], instead: str,
                        remark: str = '', stacklevel: int = 3) -> None:
    """Warn once, naming each setting that was given and has no effect.

    Args:
        name: the registered class.
        settings: all such arguments; those that are ``NOT_GIVEN`` are left out.
        instead: the class whose every setting counts.
        remark: a further sentence.
        stacklevel: as in ``warnings.warn``, seen from the caller.
    """
    given = {key: value for key, value in settings.items() if value is not NOT_GIVEN}
    if given:
        listed = ', '.join(f'{key}={value!r}' for key, value in given.items())
        warnings.warn(
            f'{name} builds what the published code builds; these settings have no effect: '
            f"{listed}.{remark} Use type='mmhybrid.{instead}' for a backbone that follows its "
            'config.',
            stacklevel=stacklevel + 1)


def fixed(name: str, given: object, *expected: object) -> None:
    """Refuse a setting of the published class that no released model uses.

    Raises:
        ValueError: if ``given`` is none of ``expected``.
    """
    if given not in expected:
        listed = ' or '.join(repr(value) for value in expected)
        raise ValueError(f'got {name}={given!r}, expected {listed}: no released model uses another '
                         'value')


def pretrained_init(path: str | None) -> dict | None:
    """Turn ``pretrained`` into an ``init_cfg``; an empty path, as configs ship it, means none."""
    return dict(type='Pretrained', checkpoint=path) if path else None
