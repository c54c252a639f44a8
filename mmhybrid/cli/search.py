"""Search scan directions of a LocalMamba model, and write a config with them.

Trains the model with all eight scan directions in learned shares, and chooses the best of each
block.
"""

from ._options import add_search_arguments

EXAMPLE = ('mmhybrid search configs/upernet_localvmamba_mini_ade20k.py --work-dir '
           'work_dirs/search')


def add_arguments(parser):
    """Add the options."""
    add_search_arguments(parser)


def run(args):
    """Search."""
    from mmhybrid.cli.actions.search import run_search

    run_search(args)
