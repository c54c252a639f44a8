"""Number the classes of label images that hold grey values or colours."""

from mmhybrid.errors import UserError

EXAMPLE = """mmhybrid map-labels masks/ labels/ 0=0 255=1
mmhybrid map-labels colours/ labels/ 0,0,0=255 128,0,0=0 0,128,0=1"""
LIGHT = True


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('source', help='folder of label images')
    parser.add_argument('target', help='new folder for the numbered ones, as PNG')
    parser.add_argument('mapping', nargs='+', metavar='VALUE=CLASS',
                        help='grey value, palette index or RED,GREEN,BLUE and its class; 255 is '
                             '"ignore"')


def run(args):
    """Write the numbered images."""
    from mmhybrid.datasets.label_mapping import map_labels, parse_mapping

    try:
        count = map_labels(args.source, args.target, parse_mapping(args.mapping))
    except (ValueError, OSError) as error:
        raise UserError(error) from error
    print(f'{count} label images are in {args.target}')
