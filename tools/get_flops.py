"""Count parameters and multiply-accumulates: python tools/get_flops.py CONFIG [--help]."""
import argparse
import contextlib
import os.path as osp
import sys
from pathlib import Path

# In a clone that is not installed the package is beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

with contextlib.redirect_stdout(sys.stderr):  # what this logs is no part of a CSV or JSON
    import mmhybrid  # noqa: F401
from mmhybrid.analysis import CONVENTIONS, format_cost  # noqa: E402
from mmhybrid.engine.complexity import measure  # noqa: E402
from mmhybrid.engine.errors import UserError, run_command  # noqa: E402
from mmhybrid.engine.options import OptionsAction  # noqa: E402
from mmhybrid.engine.published import compare, markdown, read_published  # noqa: E402
from mmhybrid.engine.whole_models import checked_shape, find_model  # noqa: E402


def parse_args(argv=None):
    """Read the command line."""
    listed = '\n'.join(f'  {name:<18} {rule.text}' for name, rule in CONVENTIONS.items())
    parser = argparse.ArgumentParser(
        description='Count parameters and multiply-accumulates (papers say FLOPs) of one image. '
                    'Needs no data, no weights and no memory.',
        epilog=f'conventions:\n{listed}', formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file of this or another mm project; a class and its '
                                       'variant such as VMambaClassifier:tiny_s1l8; or a table of '
                                       'published numbers such as configs/complexity.yml')
    parser.add_argument('--shape', type=int, nargs='+', metavar='PIXELS',
                        help='height and width of the image (default: 800 1280)')
    parser.add_argument('--convention', default='all', help='what counts, see below')
    parser.add_argument('--format', choices=['text', 'csv', 'json'], default='text')
    parser.add_argument('--depth', type=int, default=2, metavar='N',
                        help='levels of modules in the table; -1 for all (default: 2)')
    parser.add_argument('--backbone-only', action='store_true')
    parser.add_argument('--cfg-options', nargs='+', action=OptionsAction, metavar='KEY=VALUE',
                        help='change the config')
    parser.add_argument('--traceback', action='store_true', help='show full tracebacks')
    return parser.parse_args(argv)


def published_table(path):
    """Markdown of published numbers beside counted ones."""
    folder = osp.dirname(path)
    return markdown({title: [compare(row, folder) for row in rows]
                     for title, rows in read_published(path).items()}, path)


def main(argv=None):
    """Run the command."""
    args = parse_args(argv)
    if args.config.endswith(('.yml', '.yaml')):
        if args.shape or args.cfg_options or args.backbone_only:
            raise UserError('The rows of a table of published numbers say themselves what is '
                            'counted; leave out --shape, --cfg-options and --backbone-only.')
        print(published_table(args.config))
        return
    source = find_model(args.config, args.cfg_options, args.backbone_only)
    depth = None if args.depth < 0 else args.depth
    print(format_cost(measure(source, checked_shape(args.shape or (800, 1280)),
                              args.convention, depth),
                      args.format))


if __name__ == '__main__':
    sys.exit(run_command(main))
