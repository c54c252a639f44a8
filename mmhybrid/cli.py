"""The command ``mmhybrid``."""

import argparse
import contextlib
import sys


def main(arguments=None):
    """Run the command.

    Args:
        arguments (list[str] | None): without the program's name; None takes ``sys.argv``.

    Returns:
        int: exit status.
    """
    parser = argparse.ArgumentParser(prog='mmhybrid')
    commands = parser.add_subparsers(dest='command', required=True)
    doctor = commands.add_parser(
        'doctor',
        help='show what is installed, which implementations will be used, and what to repair',
        description='Exit status 0 only if training would work.',
    )
    doctor.add_argument(
        '--only',
        choices=('detection', 'segmentation'),
        help='do not ask for what only the other task needs',
    )
    _add_memory(commands)
    options = parser.parse_args(arguments)

    if options.command == 'memory':
        return _memory(options)

    from . import doctor

    return doctor.main((options.only,) if options.only else doctor.TASKS)


def _add_memory(commands):
    memory = commands.add_parser(
        'memory',
        help='predict the GPU memory that training a config takes, and what fits',
        description='Follows one training step in shapes; needs no GPU, no data and no weights. '
        'Exit status 0 only if the step fits as it is configured.',
        epilog='example: mmhybrid memory configs/upernet_vmamba_t_ade20k.py --gpu 24 --batch 8',
    )
    memory.add_argument('config', help='config file, or a backbone such as VMamba:tiny with '
                                       '--batch and --size')  # fmt: skip
    memory.add_argument('--gpu', type=float, required=True, metavar='GIB', help='memory of the GPU')
    memory.add_argument('--batch', type=int, metavar='N',
                        help="images on the GPU (default: the config's)")  # fmt: skip
    memory.add_argument('--size', type=int, nargs='+', metavar='PIXELS',
                        help='height and width of the padded images (default: the largest of the '
                             'training pipeline)')  # fmt: skip
    memory.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'),
                        help="of mixed precision (default: the config's)")  # fmt: skip
    memory.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='change the config')
    memory.add_argument('--traceback', action='store_true', help='show full tracebacks')


def _memory(options):
    with contextlib.redirect_stdout(sys.stderr):  # what importing logs is no part of the answer
        from .engine import memory
        from .engine.errors import run_command

    status = []
    return run_command(lambda _: status.append(memory.main(options))) or status[0]
