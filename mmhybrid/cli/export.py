"""Write a model for runtimes without PyTorch (ONNX).

Compares the file with PyTorch in onnxruntime, where that is installed. A whole model then works
with `mmhybrid predict --weights FILE.onnx`.
"""

from ._common import add_cfg_options

EXAMPLE = 'mmhybrid export work_dirs/mini --to onnx --out mini.onnx'


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('source', metavar='CONFIG_OR_RUN',
                        help='config, work directory of a training, or a checkpoint')
    parser.add_argument('--to', choices=('onnx',), default='onnx', help='format (default: onnx)')
    parser.add_argument('--weights', metavar='CHECKPOINT',
                        help='weights of a config; without them the file has initial ones')
    parser.add_argument('--config', help='config of a run or checkpoint that holds none')
    parser.add_argument('--part', choices=('whole', 'neck', 'backbone'), default='whole',
                        help='the whole model (UPerNet and other segmentors of mmseg that test on '
                             'whole pictures; Mask R-CNN and Cascade Mask R-CNN), backbone and '
                             'neck, or the backbone (default: whole)')
    parser.add_argument('--size', type=int, nargs='+', metavar='PIXELS',
                        help='height and width of the input (default: those of the test pipeline, '
                             "or a segmentor's of training)")
    parser.add_argument('--batch', type=int, default=1, metavar='N',
                        help='images of the input (default: 1)')
    parser.add_argument('--dynamic', action='store_true',
                        help='any batch and size (backbone or neck of VMamba)')
    parser.add_argument('--half', action='store_true', help='also a file in float16')
    parser.add_argument('--int8', action='store_true',
                        help='also a file with linear layers of 8 bits')
    parser.add_argument('--out', metavar='FILE', help='where it goes (default: NAME.onnx)')
    parser.add_argument('--overwrite', action='store_true', help='replace the file')
    parser.add_argument('--trust', action='store_true',
                        help='follow all that a checkpoint says, also what could run code')
    add_cfg_options(parser)


def run(args):
    """Write the file; returns the exit status."""
    from mmhybrid.export.command import export

    return export(args)
