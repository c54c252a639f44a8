"""The command ``mmhybrid``."""

import argparse


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
    options = parser.parse_args(arguments)

    from . import doctor

    return doctor.main((options.only,) if options.only else doctor.TASKS)
