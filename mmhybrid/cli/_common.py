"""What the subcommands share; imports nothing but the standard library."""

import argparse
import contextlib
import sys
import textwrap


class CfgOptions(argparse.Action):
    """``--cfg-options KEY=VALUE ...`` as mmengine reads them, once there are some."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Parse ``values``; UserError names the one that cannot be read."""
        with contextlib.redirect_stdout(sys.stderr):  # what importing logs is not part of an answer
            from mmhybrid.engine.options import OptionsAction

        OptionsAction(self.option_strings, self.dest, nargs='+')(parser, namespace, values,
                                                                 option_string)


def is_onnx(arguments):
    """Whether ``--weights`` names an ONNX file."""
    weights = ''
    for before, argument in zip(['', *arguments], arguments, strict=False):
        name, is_set, value = argument.partition('=')
        if name == '--weights' and is_set or before == '--weights':
            weights = value if is_set else argument
    return weights.lower().endswith('.onnx')


def add_cfg_options(parser):
    """Add ``--cfg-options``."""
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE',
                        help='change the config, e.g. train_cfg.max_epochs=1 '
                             'or key="[(1,2),(3,4)]"')


def finish_parser(parser, example):
    """Add what every subcommand has: ``--traceback`` and an example."""
    parser.add_argument('--traceback', action='store_true',
                        help='show full tracebacks (MMHYBRID_TRACEBACK=1 does so too)')
    example = textwrap.indent(example.strip(), '  ')
    parser.epilog = '\n\n'.join(filter(None, [parser.epilog, f'example:\n{example}']))
