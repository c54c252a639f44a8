"""Evaluate a checkpoint of a detector, a segmentor or a classifier."""

from ._options import add_test_arguments

EXAMPLE = ('mmhybrid test configs/cascade_mambavision_mini_coco.py work_dirs/first/epoch_12.pth '
           '--show-dir shown')


def add_arguments(parser):
    """Add the options."""
    add_test_arguments(parser)


def run(args):
    """Evaluate."""
    from mmhybrid.cli.actions.training import run_test

    run_test(args)
