"""Make ``_base_ = 'mmhybrid::cascade_mambavision_t_coco.py'`` work in any project's config.

mmengine knows a fixed list of packages and demands a folder after ``::``; ours are flat. So the
one function in which it resolves a base path is wrapped, for our prefix only.

``import mmhybrid`` applies the wrapper. In a stock tool, however, a config is parsed before its
``custom_imports`` run. There, ``_base_ = __import__('mmhybrid').config_path(...)`` does without the
prefix, and ``mmhybrid install-hook`` makes every start of Python apply the wrapper when
``mmengine.config.config`` is imported (``_startup_hook.py``).
"""

import functools
from pathlib import Path

PREFIX = 'mmhybrid::'
_PACKAGE = Path(__file__).resolve().parent


def config_dir():
    """Return the folder with our configs: ``mmhybrid/.mim`` when installed, else the checkout's.

    Raises:
        FileNotFoundError: neither exists.
    """
    candidates = (_PACKAGE / '.mim' / 'configs', _PACKAGE.parent / 'configs')
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        'The configs of mmhybrid are neither in '
        + ' nor in '.join(str(folder) for folder in candidates)
        + '. The installation is incomplete: install mmhybrid again with pip.'
    )


def resolve(reference):
    """Turn ``'mmhybrid::name.py'`` into the path of that config.

    Args:
        reference (str): starts with ``mmhybrid::``; a path relative to the configs folder follows,
            with or without a leading ``configs/``.

    Returns:
        str: absolute path.

    Raises:
        FileNotFoundError: there is no such config; the message names the nearest ones.
    """
    name = reference.removeprefix(PREFIX).removeprefix('configs/')
    folder = config_dir()
    path = folder / name
    if path.is_file():
        return str(path)

    from mmhybrid.spelling import did_you_mean, nearest_few

    known = sorted(str(p.relative_to(folder).as_posix()) for p in folder.rglob('*.py'))
    near = nearest_few(name, known, cutoff=0.4) or known
    raise FileNotFoundError(
        f"'{reference}' names no config of mmhybrid (looked in {folder})."
        + did_you_mean(*(PREFIX + each for each in near))
    )


def wrap(config_class):
    """Let ``config_class._get_cfg_path`` resolve our prefix. Does nothing the second time.

    Args:
        config_class (type): ``mmengine.config.Config``.
    """
    original = config_class._get_cfg_path
    if _is_wrapped(original):
        return

    @functools.wraps(original)
    def get_cfg_path(cfg_path, filename):
        if cfg_path.startswith(PREFIX):
            # No scope: our configs name their own default_scope.
            return resolve(cfg_path), None
        return original(cfg_path, filename)

    get_cfg_path.resolves_mmhybrid = True
    config_class._get_cfg_path = staticmethod(get_cfg_path)


def install():
    """Apply :func:`wrap` to mmengine's ``Config``."""
    from mmengine.config import Config

    wrap(Config)


def is_installed():
    """Whether mmengine's ``Config`` knows our prefix, from here or from the start-up hook."""
    from mmengine.config import Config

    return _is_wrapped(Config._get_cfg_path)


def _is_wrapped(function):
    return getattr(function, 'resolves_mmhybrid', False)
