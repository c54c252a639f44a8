"""Predict the GPU memory that training a config takes, and what fits.

Follows one training step in shapes; needs no GPU, no data and no weights. Exit status 0 only if
the step fits as it is configured.
"""

from ._common import add_cfg_options

EXAMPLE = 'mmhybrid memory configs/upernet_vmamba_t_ade20k.py --gpu 24 --batch 8'


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('config', help='config file, or a backbone such as VMamba:tiny with '
                                       '--batch and --size')
    parser.add_argument('--gpu', type=float, required=True, metavar='GIB', help='memory of the GPU')
    parser.add_argument('--batch', type=int, metavar='N',
                        help="images on the GPU (default: the config's)")
    parser.add_argument('--size', type=int, nargs='+', metavar='PIXELS',
                        help='height and width of the padded images (default: the largest of the '
                             'training pipeline)')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'),
                        help="of mixed precision (default: the config's)")
    parser.add_argument('--fsdp', type=int, metavar='PROCESSES',
                        help='GPUs that divide the model among themselves (train --fsdp); '
                             'the prediction is for each of them')
    add_cfg_options(parser)


def run(args):
    """Print the prediction; returns 0 if the step fits, else 1."""
    from mmhybrid.cli.actions.memory import predict_memory

    return predict_memory(args)
