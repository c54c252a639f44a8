"""Draw predictions next to ground truth, what a network looks at, and what it gets wrong.

The model is CONFIG CHECKPOINT, or a work directory or a checkpoint of training alone, which holds
its config. Without another option, images of the test set are drawn with ground truth and
predictions; the options below draw something else, for pictures of the test set or of --images:

--features: maps of layers, as colours and by channel
--cam: which parts of a picture the classes that are found in it rest on
--directions: what each scan direction of VMamba, LocalVMamba, Vim or LocalVim brings to a place
--errors: mistakes on the test set: of a detector by kind (TIDE) with examples, of a segmentor the
  classes taken for others and the worst images
--receptive-field: which pixels the middle of a backbone's last map depends on
"""

from ._common import add_cfg_options

EXAMPLE = """mmhybrid visualize configs/cascade_mambavision_mini_coco.py work_dirs/first/epoch_12.pth --num 8
mmhybrid visualize work_dirs/first --cam --images photos/"""  # noqa: E501

MODES = ('features', 'cam', 'directions', 'errors', 'receptive_field')
# Options that only some modes read (None: pictures of the test set), and their defaults.
BELONGS = {
    'score_thr': ((None, 'cam'), 0.5),
    'data_root': ((None, 'features', 'cam', 'directions', 'errors'), None),
    'images': (('features', 'cam', 'directions', 'receptive_field'), None),
    'layer': (('features', 'cam', 'directions'), None),
    'classes': (('cam',), None),
    'cam_method': (('cam',), 'hires-cam'),
    'at': (('directions',), None),
    'weights': (('receptive_field',), None),
    'size': (('receptive_field',), 224),
}


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('config', nargs='?',
                        help='config file; or a work directory or checkpoint alone')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file')
    parser.add_argument('--out-dir', help='folder for the pictures (default: beside the '
                                          'checkpoint, called after what is drawn)')
    parser.add_argument('--num', type=int, help='images, evenly spread over the set (default: 12); '
                                                'with --errors examples of each kind (default: 4)')
    parser.add_argument('--score-thr', type=float,
                        help='detection: lowest score that is drawn (default: 0.5)')
    parser.add_argument('--data-root', metavar='FOLDER',
                        help="read all data from here instead of "
                             "the config's data_root")
    modes = parser.add_argument_group('instead of predictions').add_mutually_exclusive_group()
    modes.add_argument('--features', action='store_true', help='maps of --layer')
    modes.add_argument('--cam', action='store_true', help='class activation maps')
    modes.add_argument('--directions', action='store_true', help='scan directions, at --at')
    modes.add_argument('--errors', action='store_true', help='mistakes on the test set')
    modes.add_argument('--receptive-field', nargs='*', metavar='BACKBONE',
                       help='backbones such as VMamba:tiny, configs, or work directories; '
                            'without any one of each family')
    more = parser.add_argument_group('for these')
    more.add_argument('--images', nargs='+', metavar='SOURCE',
                      help='pictures, folders, patterns or lists, instead of the test set '
                           '(--receptive-field: instead of noise)')
    more.add_argument('--layer', nargs='+', metavar='NAME',
                      help='parts of the model such as neck or backbone.levels.2 (default: '
                           'backbone; --directions: the last mixer of each stage)')
    more.add_argument('--classes', nargs='+', metavar='NAME',
                      help='--cam: of these classes (default: the three surest, or largest)')
    more.add_argument('--cam-method', choices=('hires-cam', 'grad-cam'),
                      help='--cam: how gradients weigh a map: place by place (default), or by '
                           'channel')
    more.add_argument('--at', nargs=2, type=int, metavar=('X', 'Y'),
                      help='--directions: the place, in pixels of the picture (default: middle)')
    more.add_argument('--weights', nargs='+', metavar='FILE',
                      help='--receptive-field: one for each backbone: path, address or short name, '
                           'or - for random weights (default)')
    more.add_argument('--size', type=int,
                      help='--receptive-field: side of the images in pixels (default: 224)')
    add_cfg_options(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args):
    """Draw."""
    mode = next((name for name in MODES if getattr(args, name) not in (None, False)), None)
    if args.num is None:
        args.num = 4 if mode == 'errors' else 12
    _settle(args, mode)
    if mode == 'receptive_field':
        if args.config or args.checkpoint:
            args.usage_error('--receptive-field takes backbones, and no CONFIG CHECKPOINT before '
                             'it; weights come from --weights')
        from mmhybrid.cli.actions.receptive_fields import draw_fields, one_of_each

        args.receptive_field = args.receptive_field or one_of_each()
        return draw_fields(args)
    if args.config and not args.checkpoint and not args.config.endswith('.py'):
        args.config, args.checkpoint = None, args.config
    if not args.checkpoint:
        args.usage_error('the following arguments are required: config, checkpoint '
                         '(or a work directory, or --receptive-field)')
    return _tool(mode)(args)


def _settle(args, mode):
    """Refuse options that would have no effect, and fill in defaults."""
    for name, (modes, default) in BELONGS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif mode not in modes:
            those = [f'--{each.replace("_", "-")}' for each in modes if each]
            args.usage_error(f'--{name.replace("_", "-")} belongs to {", ".join(those)}'
                             f'{" and pictures of the test set" if None in modes else ""}'
                             f'{f", not to --{mode}" if mode else ""}')


def _tool(mode):
    if mode == 'features':
        from mmhybrid.cli.actions.looking.features import draw_features as tool
    elif mode == 'cam':
        from mmhybrid.cli.actions.looking.activation import draw_activation as tool
    elif mode == 'directions':
        from mmhybrid.cli.actions.looking.directions import draw_responses as tool
    elif mode == 'errors':
        from mmhybrid.cli.actions.looking.mistakes import draw_mistakes as tool
    else:
        from mmhybrid.cli.actions.visualize import draw_test_set as tool
    return tool
