"""Make a config that trains from a folder of pictures and annotations.

Reads COCO (also of CVAT, Label Studio and Roboflow), YOLO, Pascal VOC, LabelMe, and images with
label images. Writes converted annotations, a split, a report and a config into a new folder; what
was there before stays as it is. What the data leave open is asked, or named with its option.
"""

EXAMPLE = 'mmhybrid init data/parts --model mambavision-t --weights mambavision-t-1k'


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('data', metavar='DATA', help='folder with images and annotations')
    parser.add_argument('--task', choices=('detect', 'instance', 'semantic'),
                        help='boxes, boxes with masks, or a class for each pixel (default: what '
                             'the annotations have)')
    parser.add_argument('--out', metavar='FOLDER', help='new folder to write (default: '
                                                        'DATA/mmhybrid)')
    parser.add_argument('--model', metavar='NAME',
                        help='backbone, such as mambavision-t, vmamba-s, vim-t, localvmamba-t or '
                             'timm:convnext_tiny (default: that of the weights, else by the '
                             'images)')
    parser.add_argument('--head', metavar='NAME',
                        help='mask-rcnn, cascade, faster, retinanet, rtmdet, dino, mask2former, '
                             'upernet or segformer (default: by the task)')
    parser.add_argument('--weights', metavar='NAME',
                        help='what the backbone starts from: a file, an address or a short name '
                             'such as mambavision-t-1k')
    parser.add_argument('--val-fraction', type=float, default=0.2, metavar='PART',
                        help='of the pictures for validation, where the data have no split '
                             '(default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, metavar='N',
                        help='of this split (default: 0)')
    parser.add_argument('--group', metavar='PATTERN',
                        help='regular expression; pictures for which it finds the same text stay '
                             "together, e.g. '(.*)_frame' for frames of one video")
    parser.add_argument('--format', choices=('coco', 'yolo', 'voc', 'labelme', 'masks'),
                        help='of the annotations, where there are several')
    parser.add_argument('--annotations', metavar='NAME',
                        help='only annotation files of this name or pattern (COCO)')
    parser.add_argument('--classes', metavar='A,B,...',
                        help='names of the classes, where the data have none')
    parser.add_argument('--crowd', choices=('objects', 'crowds'),
                        help='what iscrowd=1 means (COCO)')
    parser.add_argument('--ignore', choices=('255', 'none'),
                        help='whether 255 in label images is left out or a class')
    parser.add_argument('--yes', action='store_true', help='take what is suggested and ask nothing')


def run(args):
    """Write the folder."""
    from mmhybrid.cli.actions.init import main

    main(args)
