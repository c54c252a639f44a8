"""Draw predictions next to ground truth for images of the test set."""

from ._common import add_cfg_options

EXAMPLE = ('mmhybrid visualize configs/cascade_mambavision_mini_coco.py '
           'work_dirs/first/epoch_7.pth --num 8')  # fmt: skip


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out-dir', help='folder for the pictures '
                                          '(default: pictures/ beside the checkpoint)')  # fmt: skip
    parser.add_argument('--num', type=int, default=12, help='images, evenly spread over the set')
    parser.add_argument('--score-thr', type=float, default=0.5,
                        help='detection: lowest score that is drawn')  # fmt: skip
    parser.add_argument('--data-root', metavar='FOLDER',
                        help="read all data from here instead of "
                             "the config's data_root")  # fmt: skip
    add_cfg_options(parser)


def run(args):
    """Draw."""
    from mmhybrid.engine.picture_tool import draw_test_set

    draw_test_set(args)
