"""Count parameters and multiply-accumulates (papers say FLOPs) of one image.

Needs no data, no weights and no memory.
"""

import os.path as osp

from ._common import add_cfg_options

EXAMPLE = 'mmhybrid flops VMambaClassifier:tiny --shape 224 --convention conv-linear'


def add_arguments(parser):
    """Add the options."""
    from mmhybrid.analysis import CONVENTIONS

    listed = '\n'.join(f'  {name:<18} {rule.text}' for name, rule in CONVENTIONS.items())
    parser.epilog = f'conventions:\n{listed}'
    parser.add_argument('config', help='config file of this or another mm project; a class and its '
                                       'variant such as VMambaClassifier:tiny_s1l8; or a table of '
                                       'published numbers such as '
                                       'configs/complexity.yml')
    parser.add_argument('--shape', type=int, nargs='+', metavar='PIXELS',
                        help='height and width of the image (default: 800 1280)')
    parser.add_argument('--convention', default='all', help='what counts, see below')
    parser.add_argument('--format', choices=['text', 'csv', 'json'], default='text')
    parser.add_argument('--depth', type=int, default=2, metavar='N',
                        help='levels of modules in the table; '
                             '-1 for all (default: 2)')
    parser.add_argument('--backbone-only', action='store_true')
    add_cfg_options(parser)


def run(args):
    """Print the counts."""
    if args.config.endswith(('.yml', '.yaml')):
        print(_published_table(args))
        return
    from mmhybrid.analysis import format_cost
    from mmhybrid.analysis.models.complexity import measure
    from mmhybrid.analysis.models.source import checked_shape, find_model

    source = find_model(args.config, args.cfg_options, args.backbone_only)
    depth = None if args.depth < 0 else args.depth
    cost = measure(source, checked_shape(args.shape or (800, 1280)), args.convention, depth)
    print(format_cost(cost, args.format))


def _published_table(args):
    """Markdown of published numbers beside counted ones."""
    from mmhybrid.analysis.models.published import count_row, markdown, read_published
    from mmhybrid.errors import UserError

    if args.shape or args.cfg_options or args.backbone_only:
        raise UserError('The rows of a table of published numbers say themselves what is counted; '
                        'leave out --shape, --cfg-options and --backbone-only.')
    folder = osp.dirname(args.config)
    tables = {
        title: [count_row(row, folder) for row in rows]
        for title, rows in read_published(args.config).items()
    }
    return markdown(tables, args.config)
