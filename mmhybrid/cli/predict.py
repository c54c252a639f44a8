"""Find objects or regions in pictures and videos.

The weights are enough: a checkpoint of training holds its config. Writes pictures (or a video) with
what was found, and predictions.json in COCO's format.
"""

from ._common import add_cfg_options, is_onnx

#: An ONNX file needs no PyTorch.
LIGHT = is_onnx

EXAMPLE = 'mmhybrid predict photos/ --weights work_dirs/mini --score 0.5'


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('source', nargs='+', metavar='SOURCE',
                        help='picture, folder, pattern such as "*/*.jpg", list of paths (.txt), '
                             'http(s) address, video, or the number of a camera')
    parser.add_argument('--weights', required=True, metavar='RUN_OR_CHECKPOINT',
                        help='work directory of a training (its best checkpoint, else its last), '
                             'a checkpoint, its address, or a file of `mmhybrid export` (.onnx), '
                             'which needs no PyTorch')
    parser.add_argument('--config', help='config file, if the checkpoint holds none or yours needs '
                                         'modules of your own')
    parser.add_argument('--out', metavar='FOLDER',
                        help='where results go (default: predictions, then predictions-2, ...)')
    parser.add_argument('--overwrite', action='store_true',
                        help='--out may hold files; those of the same names are replaced')
    parser.add_argument('--write', nargs='+', metavar='KIND',
                        help='some of pictures, masks (class numbers as PNG), yolo, labelme; or '
                             'json for nothing but predictions.json, which is always there '
                             '(default: pictures; masks too for a segmentor)')
    parser.add_argument('--score', type=float, metavar='S',
                        help='detectors: lowest score of an object (default: 0.3)')
    parser.add_argument('--classes', nargs='+', metavar='NAME', help='leave out all other classes')
    parser.add_argument('--tile', type=int, metavar='PIXELS',
                        help='cut larger pictures into tiles of this side, and merge what is found')
    parser.add_argument('--overlap', type=float, default=0.2, metavar='PART',
                        help='least part of a tile that its neighbours show too (default: 0.2)')
    parser.add_argument('--batch', type=int, default=1, metavar='N',
                        help='pictures or tiles that go through the model at once, if they are of '
                             'one size (default: 1)')
    parser.add_argument('--tta', action='store_true',
                        help='test-time augmentation (detectors: boxes only)')
    parser.add_argument('--device', help='such as cuda:1 or cpu (default: a GPU if there is one)')
    parser.add_argument('--trust', action='store_true',
                        help='follow all that the checkpoint says, also what could run code')
    add_cfg_options(parser)


def run(args):
    """Do the work; returns the exit status."""
    from mmhybrid.cli.actions.predict import predict

    return predict(args)
