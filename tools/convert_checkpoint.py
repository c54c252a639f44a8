"""Bring weights into another container: python tools/convert_checkpoint.py SOURCE TARGET [--help].
"""
import argparse
import os
import sys
from pathlib import Path

# In a clone that is not installed the package is beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmhybrid.engine.errors import UserError, run_command  # noqa: E402
from mmhybrid.weights.conversion import convert, publish, restore  # noqa: E402


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Write weights cleanly, with where they are from; or slim a checkpoint of '
                    'training; or restore original names.')
    parser.add_argument('source', help='file, http(s) address, hf://organisation/repository[/file]'
                                       '[@revision], or short name such as mambavision-t-1k')
    parser.add_argument('target', help='file to write: .safetensors, or .pth as mmengine has it')
    way = parser.add_mutually_exclusive_group()
    way.add_argument('--publish', action='store_true',
                     help='slim a checkpoint of training; its checksum is added to the name')
    way.add_argument('--restore', action='store_true',
                     help='bring a converted file back to the names and entry of its original')
    parser.add_argument('--key', help='entry of the checkpoint to take, e.g. state_dict_ema')
    parser.add_argument('--licence', help='of the weights; known for published files')
    parser.add_argument('--trust', action='store_true',
                        help='read a pickle that may run code; only for files of your own')
    parser.add_argument('--traceback', action='store_true', help='show full tracebacks')
    args = parser.parse_args(argv)
    if (args.publish or args.restore) and (args.key or args.licence):
        parser.error('--key and --licence belong to a plain conversion')
    return args


def main(argv=None):
    """Do what the command line says."""
    args = parse_args(argv)
    folder = os.path.dirname(args.target) or '.'
    if not os.path.isdir(folder):
        raise UserError(f'The folder {folder} of the target does not exist.')
    try:
        if args.restore:
            restore(args.source, args.target)
            print(f'{args.target} has the original names')
        elif args.publish:
            print(f'wrote {publish(args.source, args.target, trust=args.trust)}')
        else:
            facts = convert(args.source, args.target, key=args.key, licence=args.licence,
                            trust=args.trust)
            print(f'wrote {args.target}')
            print('\n'.join(f'    {name:<10}  {value}' for name, value in facts.items()))
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


if __name__ == '__main__':
    sys.exit(run_command(main))
