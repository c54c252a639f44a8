"""Print a config with everything it inherits, as one file that any tool reads.

The file needs no _base_, so it works in tools of mmdet and mmseg that do not know 'mmhybrid::...'.
"""

import os
import sys

from ._common import add_cfg_options

EXAMPLE = """mmhybrid config cascade_mambavision_t_coco > my.py
mmhybrid config cascade_mambavision_t_coco --path
mmhybrid config my.py --cfg-options train_cfg.max_epochs=12 > shorter.py"""


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('config', help='one of ours by its name, with or without mmhybrid:: and '
                                       '.py, or a config file')
    parser.add_argument('--path', action='store_true', help='print where the file is instead')
    add_cfg_options(parser)


def run(args):
    """Print the config."""
    path = _path(args.config)
    if args.path:
        print(path)
        return
    from mmhybrid.engine.config_file import read_config
    from mmhybrid.engine.options import check_options

    cfg = read_config(path)
    if args.cfg_options:
        check_options(cfg, args.cfg_options)
        cfg.merge_from_dict(args.cfg_options)
    sys.stdout.write(cfg.pretty_text.rstrip() + '\n')


def _path(name):
    """File of a config: as it is given, else one of ours."""
    from mmhybrid import config_path
    from mmhybrid.errors import UserError

    if os.path.isfile(name):
        return name
    file = name if name.endswith(('.py', '.json', '.yml', '.yaml')) else f'{name}.py'
    try:
        return config_path(file)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
