"""Train a detector, a segmentor or a classifier."""

from ._options import add_training_arguments

EXAMPLE = 'mmhybrid train configs/cascade_mambavision_mini_coco.py --work-dir work_dirs/first'


def add_arguments(parser):
    """Add the options."""
    add_training_arguments(parser)


def run(args):
    """Train."""
    from mmhybrid.cli.actions.training import run_training

    run_training(args)
