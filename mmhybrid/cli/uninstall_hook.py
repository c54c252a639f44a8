"""Remove what `mmhybrid install-hook` has written.

pip does not know of that file, so do this before `pip uninstall mmhybrid`.
"""

from mmhybrid.errors import UserError

EXAMPLE = 'mmhybrid uninstall-hook'
LIGHT = True


def add_arguments(parser):
    """There are no options."""


def run(args):
    """Remove the hook."""
    from mmhybrid import hook_file

    try:
        removed = hook_file.uninstall()
    except OSError as error:
        raise UserError(f'The hook cannot be removed: {error}.') from error
    print('\n'.join(f'removed {path}' for path in removed) or 'there is no hook')
