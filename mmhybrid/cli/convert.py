"""Bring weights into another container.

Writes weights cleanly, with where they are from; or slims a checkpoint of training; or merges the
adapters of one; or restores original names.
"""

import os

EXAMPLE = 'mmhybrid convert mambavision-t-1k mambavision_t.safetensors'


def add_arguments(parser):
    """Add the options."""
    parser.add_argument('source', help='file, http(s) address, hf://organisation/repository[/file]'
                                       '[@revision], or short name such as '
                                       'mambavision-t-1k')
    parser.add_argument('target', help='file to write: .safetensors, or .pth as mmengine has it')
    way = parser.add_mutually_exclusive_group()
    way.add_argument('--publish', action='store_true',
                     help='slim a checkpoint of training; its checksum is added '
                          'to the name')
    way.add_argument('--merge-lora', action='store_true',
                     help='merge the adapters of a training with --lora into the weights, and '
                          'slim the file')
    way.add_argument('--restore', action='store_true',
                     help='bring a converted file back to the names and entry '
                          'of its original')
    parser.add_argument('--key', help='entry of the checkpoint to take, e.g. state_dict_ema')
    parser.add_argument('--licence', help='of the weights; known for published files')
    parser.add_argument('--trust', action='store_true',
                        help='read a pickle that may run code; '
                             'only for files of your own')
    parser.set_defaults(wrong_usage=parser.error)


def run(args):
    """Convert, publish or restore."""
    from mmhybrid.errors import UserError
    from mmhybrid.weights.conversion import convert, join, merge_lora, publish, restore
    from mmhybrid.weights.shards import is_folder_of_pieces

    if is_folder_of_pieces(args.source) and (
            args.publish or args.merge_lora or args.restore or args.key):
        args.wrong_usage('put the pieces together first, with mmhybrid convert FOLDER FILE.pth')
    if (args.publish or args.merge_lora or args.restore) and (args.key or args.licence):
        args.wrong_usage('--key and --licence belong to a plain conversion')
    folder = os.path.dirname(args.target) or '.'
    if not os.path.isdir(folder):
        raise UserError(f'The folder {folder} of the target does not exist.')
    try:
        if is_folder_of_pieces(args.source):
            join(args.source, args.target)
            print(f'wrote {args.target}, one file of all pieces')
        elif args.restore:
            restore(args.source, args.target)
            print(f'{args.target} has the original names')
        elif args.merge_lora:
            count = merge_lora(args.source, args.target, trust=args.trust)
            print(f'wrote {args.target}, with the adapters of {count} weights merged')
        elif args.publish:
            print(f'wrote {publish(args.source, args.target, trust=args.trust)}')
        else:
            facts = convert(
                args.source, args.target, key=args.key, licence=args.licence, trust=args.trust
            )
            print(f'wrote {args.target}')
            print('\n'.join(f'    {name:<10}  {value}' for name, value in facts.items()))
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
