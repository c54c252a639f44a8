"""Teach every start of this Python the config prefix 'mmhybrid::', for stock tools.

Tools of mmdet and mmseg then read configs that say _base_ = 'mmhybrid::...'. It writes one file
with one line into the site-packages folder of this Python, which waits for mmengine to be imported;
`mmhybrid uninstall-hook` removes it. `mmhybrid run` and our own commands need no hook.
"""

from mmhybrid.errors import UserError

EXAMPLE = 'mmhybrid install-hook'
LIGHT = True


def add_arguments(parser):
    """There are no options."""


def run(args):
    """Write the hook."""
    from mmhybrid import hook_file

    try:
        print(f'wrote {hook_file.install()}')
    except OSError as error:
        raise UserError(f'The hook cannot be written: {error}. Use the Python of a virtual '
                      'environment, or `mmhybrid run`, which needs none.') from error
