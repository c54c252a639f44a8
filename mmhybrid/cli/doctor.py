"""Show what is installed, which implementations will be used, and what to repair.

Exit status 0 only if training would work.
"""

EXAMPLE = 'mmhybrid doctor --only segmentation'
LIGHT = True  # it has to start where mmengine or torch is broken


def add_arguments(parser):
    """Add the options."""
    parser.add_argument(
        '--only',
        choices=('detection', 'segmentation'),
        help='do not ask for what only the other task needs',
    )


def run(args):
    """Print the table; returns 0 if training would work, else 1."""
    from mmhybrid import doctor

    return doctor.main((args.only,) if args.only else doctor.TASKS)
