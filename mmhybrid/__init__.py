"""MambaVision and other hybrid backbones for mmdetection and mmsegmentation."""

import sys
from importlib.util import find_spec
from pathlib import Path

__version__ = '0.1.0'


def _started_as_doctor(argv):
    # `mmhybrid doctor` must start where mmengine is installed but broken. While `python -m`
    # looks for the package, argv[0] is '-m'.
    return Path(argv[0]).stem in ('-m', 'mmhybrid') and argv[1:2] == ['doctor'] if argv else False


if find_spec('mmengine') is not None and not _started_as_doctor(sys.argv):
    from . import config_scheme, mmcv_ops

    config_scheme.install()
    mmcv_ops.install()

    from . import engine, models  # noqa: F401  registers everything
