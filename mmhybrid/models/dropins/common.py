"""Helpers for classes that accept the released configs word for word."""
from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable

__all__ = ['NOT_GIVEN', 'SWIN_BASE', 'fixed', 'ignores', 'pretrained_init']

#: What configs inherit from a Swin base.
SWIN_BASE = (
    'embed_dims', 'num_heads', 'window_size', 'qkv_bias', 'qk_scale', 'drop_rate',
    'attn_drop_rate', 'with_cp', 'convert_weights', 'init_cfg', 'pretrain_img_size', 'patch_size',
    'strides', 'use_abs_pos_embed', 'act_cfg', 'norm_cfg')


class _NotGiven:
    def __repr__(self) -> str:
        return '<not given>'


#: Default of arguments that are accepted without effect.
NOT_GIVEN = _NotGiven()


def ignores(*names: str, instead: str, remark: str = '') -> Callable[[type], type]:
    """Class decorator: accept further keywords without effect, and warn once if any came.

    A setting of the class itself that has no effect in a case joins them where its ``__init__``
    puts it into ``self.without_effect``.

    Args:
        names: the keywords; they join the signature.
        instead: the class whose every setting counts.
        remark: a further sentence of the warning.
    """
    def decorate(cls: type) -> type:
        init = cls.__init__
        signature = inspect.signature(init)
        keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=NOT_GIVEN)
                    for name in names]

        @functools.wraps(init)
        def accepting_init(self, *args, **kwargs):
            given = {name: kwargs.pop(name) for name in names if name in kwargs}
            init(self, *args, **kwargs)
            given |= getattr(self, 'without_effect', {})
            if given:
                listed = ', '.join(f'{key}={value!r}' for key, value in given.items())
                warnings.warn(
                    f'{cls.__name__} builds what the published code builds; these settings have '
                    f"no effect: {listed}.{remark} Use type='mmhybrid.{instead}' for a backbone "
                    'that follows its config.',
                    stacklevel=3)

        accepting_init.__signature__ = signature.replace(
            parameters=[*signature.parameters.values(), *keywords])
        cls.__init__ = accepting_init
        return cls

    return decorate


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
