"""Train a detector, a segmentor or a classifier."""

EXAMPLE = 'mmhybrid train configs/cascade_mambavision_mini_coco.py --work-dir work_dirs/first'


def add_arguments(parser):
    """Add the options."""
    from mmhybrid.engine.tools import add_training_arguments

    add_training_arguments(parser)


def run(args):
    """Train."""
    from mmhybrid.engine.tools import run_training

    run_training(args)
