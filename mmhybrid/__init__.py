"""MambaVision and other hybrid backbones for mmdetection and mmsegmentation.

``import mmhybrid`` makes it a plugin of mmengine: models and hooks are registered, and the patches
of :mod:`mmhybrid.compat` applied. Importing a part, such as ``mmhybrid.ops``, does what that part
needs and no more.
"""

import sys
from importlib.util import find_spec

__version__ = '0.1.0'
__all__ = ['__version__', 'config_path', 'load']


def config_path(name):
    """Return the path of one of our configs.

    With it any tool of mmengine's family reads a config that builds on ours::

        _base_ = __import__('mmhybrid').config_path('cascade_mambavision_t_coco.py')

    Args:
        name (str): relative to the folder of the configs.

    Raises:
        FileNotFoundError: there is no such config; the message names the nearest ones.
    """
    from . import config_scheme

    return config_scheme.resolve(name)


def __getattr__(name):
    """``load``, which needs all of the package, at its first use."""
    if name == 'load':
        from .prediction import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def _imported_for_a_part():
    """Whether this runs on the way to ``mmhybrid.something``, which nobody tells a package.

    Python imports a package before its parts, so the calls that lead here tell: the import of a
    part is below that of the package, or ``python -m`` is.
    """
    frame = sys._getframe()
    while frame is not None and not _finds(frame, __name__):
        frame = frame.f_back
    while frame is not None and frame.f_code.co_filename.startswith('<frozen importlib._bootstrap'):
        if _finds(frame, f'{__name__}.'):
            return True
        frame = frame.f_back
    return frame is not None and frame.f_globals.get('__name__') in ('runpy', 'importlib.util')


def _finds(frame, start):
    return frame.f_code.co_name == '_find_and_load' and str(
        frame.f_locals.get('name')).startswith(start)


if not _imported_for_a_part() and find_spec('mmengine') is not None:
    from . import plugin  # noqa: F401
