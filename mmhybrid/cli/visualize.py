"""Draw predictions next to ground truth for images of the test set.

With --receptive-field, draw instead which pixels the middle of a backbone's last map depends on
(the effective receptive fields of the papers), for one network after the other.
"""

from ._common import add_cfg_options

EXAMPLE = ('mmhybrid visualize configs/cascade_mambavision_mini_coco.py '
           'work_dirs/first/epoch_12.pth --num 8')  # fmt: skip


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('config', nargs='?', help='config file')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file')
    parser.add_argument('--out-dir', help='folder for the pictures '
                                          '(default: pictures/ beside the checkpoint)')  # fmt: skip
    parser.add_argument('--num', type=int, default=12, help='images, evenly spread over the set')
    parser.add_argument('--score-thr', type=float, default=0.5,
                        help='detection: lowest score that is drawn')  # fmt: skip
    parser.add_argument('--data-root', metavar='FOLDER',
                        help="read all data from here instead of "
                             "the config's data_root")  # fmt: skip
    fields = parser.add_argument_group('effective receptive fields')
    fields.add_argument('--receptive-field', nargs='*', metavar='BACKBONE',
                        help='backbones such as VMamba:tiny, or configs; '
                             'without any one of each family')  # fmt: skip
    fields.add_argument('--weights', nargs='+', metavar='FILE',
                        help='one for each backbone: path, address or short name, '
                             'or - for random weights (default)')  # fmt: skip
    fields.add_argument('--images', metavar='FOLDER', help='pictures to average over '
                                                           '(default: noise)')  # fmt: skip
    fields.add_argument('--size', type=int, default=224, help='side of the images in pixels')
    add_cfg_options(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args):
    """Draw."""
    if args.receptive_field is not None:
        if args.config or args.checkpoint:
            args.usage_error('--receptive-field takes backbones, and no CONFIG CHECKPOINT before '
                             'it; weights come from --weights')
        from mmhybrid.cli.actions.receptive_fields import FAMILIES, draw_fields

        args.receptive_field = args.receptive_field or FAMILIES
        return draw_fields(args)
    if not args.checkpoint:
        args.usage_error('the following arguments are required: config, checkpoint '
                         '(or --receptive-field)')
    from mmhybrid.cli.actions.visualize import draw_test_set

    draw_test_set(args)
