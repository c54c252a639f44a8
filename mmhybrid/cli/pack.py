"""Write the images of a folder into one LMDB database.

For data on network drives and for copying to many machines. The database images.lmdb lies in the
folder and holds the files as they are; a config reads them with
backend_args=dict(backend='mmhybrid_lmdb') in LoadImageFromFile.
"""

EXAMPLE = 'mmhybrid pack data/coco/train2017 data/coco/val2017'
LIGHT = True


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('folders', nargs='+', metavar='FOLDER', help='of images, also deeper in it')
    parser.add_argument('--force', action='store_true', help='replace a database that is there')


def run(args):
    """Pack each folder."""
    from mmhybrid.datasets.packed import pack
    from mmhybrid.errors import UserError

    from .data import ProgressLine

    for folder in args.folders:
        try:
            count = pack(folder, args.force, ProgressLine(f'packing {folder}', 'images'))
        except (OSError, ValueError, ModuleNotFoundError) as error:
            raise UserError(error) from error
        print(f'{folder}: {count} images are in images.lmdb')
