"""The command ``mmhybrid``. Each module here without a leading underscore is a subcommand.

Such a module has

- a docstring, whose first line stands in ``mmhybrid --help`` and all of it in its own help;
- ``EXAMPLE``, a command line that works;
- ``add_arguments(parser)``, without torch, so that its help is quick;
- ``run(args)``, which does the work and returns an exit status (None: 0);
- ``LIGHT = True`` if it has to do without mmengine and torch, or a function of the arguments that
  says so of this call.

Its top level imports nothing but the standard library, so that ``mmhybrid --help`` is quick; what
needs torch and mmengine stands in ``actions/`` or in other rooms.

Exit statuses are the same everywhere: 0 done; 1 failed, or the answer is no (``doctor``,
``memory``); 2 wrong usage; 128 + n stopped by signal n, so 130 by Ctrl-C.
"""

import argparse
import contextlib
import importlib
import os
import pkgutil
import sys
import traceback

from mmhybrid import compat
from mmhybrid.errors import UserError

from ._common import finish_parser

STATUSES = 'exit status: 0 done, 1 failed or "no", 2 wrong usage, 128 + n stopped by signal n'


def main(arguments=None):
    """Run the command ``mmhybrid``.

    Args:
        arguments (list[str] | None): without the program's name; None takes ``sys.argv``.

    Returns:
        int: exit status.

    Raises:
        SystemExit: after help, and with status 2 for wrong usage.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else ''
    if name not in names():
        _overview().parse_args(arguments)  # shows help or what is wrong, and ends
    return run_subcommand(name, arguments[1:], f'mmhybrid {name}')


def tool(name):
    """Run a subcommand as a script of ``tools/``; returns the exit status."""
    return run_subcommand(name, sys.argv[1:], os.path.basename(sys.argv[0]))


def names():
    """Return the names of all subcommands."""
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return sorted(name.replace('_', '-') for name in found if not name.startswith('_'))


def command(name):
    """Return the module of a subcommand."""
    return importlib.import_module(f'{__name__}.{name.replace("-", "_")}')


def run_subcommand(name, arguments, prog):
    """Run one subcommand.

    Args:
        name (str): one of :func:`names`.
        arguments (list[str]): what follows the name.
        prog (str): how the help calls the program.

    Returns:
        int: exit status.
    """
    module, status = command(name), []
    light = getattr(module, 'LIGHT', False)
    light = light(arguments) if callable(light) else light

    def read(arguments):
        if not light:
            _check_environment()
        parser = argparse.ArgumentParser(
            prog=prog, description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(parser)
        finish_parser(parser, module.EXAMPLE)
        status.append(parser.parse_args(arguments))

    def work(arguments):
        status.append(module.run(status.pop()) or 0)

    failed = _run_light(read, arguments)
    if failed:
        return failed
    if light:
        return _run_light(work, arguments) or status[0]
    with contextlib.redirect_stdout(sys.stderr):  # what importing logs is not part of an answer
        from mmhybrid.cli.actions.running import run_command
    return run_command(work, arguments) or status[0]


def _check_environment():
    """Before the import that follows these settings, where an error would be a traceback."""
    try:
        compat.switched_off()
    except ValueError as error:
        raise UserError(error) from error


def _overview():
    from mmhybrid import __version__

    parser = argparse.ArgumentParser(
        prog='mmhybrid', epilog=f'mmhybrid COMMAND --help tells more.\n{STATUSES}',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--version', action='version', version=f'mmhybrid {__version__}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for name in names():
        commands.add_parser(name, help=command(name).__doc__.splitlines()[0].rstrip('.'))
    return parser


def _run_light(work, arguments):
    """What ``actions.running.run_command`` does, where nothing heavy is imported yet."""
    try:
        work(arguments)
    except KeyboardInterrupt:
        print('\nStopped.', file=sys.stderr)
        return 130
    except UserError as failure:
        if '--traceback' in arguments or os.environ.get('MMHYBRID_TRACEBACK', '0') not in ('', '0'):
            traceback.print_exc()
        print(f'\nERROR: {failure}\n', file=sys.stderr, flush=True)
        return 1
    return 0
