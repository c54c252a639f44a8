"""Options of the commands that run a config; imports nothing but the standard library."""

from ._common import add_cfg_options
from ._train_options import add_arguments as add_train_options

__all__ = ['add_search_arguments', 'add_test_arguments', 'add_training_arguments']


def add_training_arguments(parser):
    """Add the options of everything that trains."""
    _add_arguments(parser)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='continue the latest checkpoint of the work directory, or this one')
    parser.add_argument('--resume-settings', choices=['checkpoint', 'config'],
                        help='whose learning rate, optimizer settings and schedules --resume goes '
                             'on with (default: checkpoint)')
    parser.add_argument('--pretrained', metavar='PATH', help='weights the backbone starts from')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--fsdp', nargs='?', const='full', choices=['full', 'sharded'],
                        help='divide weights, gradients and optimizer states among the processes; '
                             'checkpoints are full files (default), or folders of sharded ones')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the batch size of all processes')
    parser.add_argument('--lora', type=int, metavar='RANK',
                        help='train low-rank adapters of this rank in place of the weights of the '
                             'backbone (see docs/small_gpus.md)')
    parser.add_argument('--optimizer-8bit', nargs='?', const='resident',
                        choices=['resident', 'paged'],
                        help="keep the optimizer's states in eight bits (needs bitsandbytes); "
                             "paged: and in the CPU's memory when the GPU is full")
    add_train_options(parser)


def add_search_arguments(parser):
    """Add the options of a search, which are those of a training and its own."""
    add_training_arguments(parser)
    parser.add_argument('--from', dest='source', metavar='CHECKPOINT',
                        help='choose by this checkpoint of a search instead of training')
    parser.add_argument('--pick', type=int, default=4, metavar='K',
                        help='directions per block (default: 4)')
    parser.add_argument('--into', metavar='CONFIG',
                        help='the config that gets the directions (default: the searched one); '
                             'its backbone must have the same blocks')
    parser.add_argument('--out', metavar='FILE.py',
                        help='the config to write (default: <name>_searched.py in the work '
                             'directory)')
    parser.add_argument('--interval', type=int, default=200, metavar='N',
                        help='iterations between two records of the alphas (default: 200)')


def add_test_arguments(parser):
    """Add the options of a test."""
    _add_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', metavar='FILE.pkl', help='write all predictions to this file')
    parser.add_argument('--show', action='store_true', help='show predictions on the screen')
    parser.add_argument('--show-dir', metavar='FOLDER', help='save drawn predictions here')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds per shown picture')
    parser.add_argument('--tta', action='store_true',
                        help='test-time augmentation (detection: boxes only)')


def _add_arguments(parser):
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints '
                                           '(default: work_dirs/<name of the config>)')
    parser.add_argument('--data-root', metavar='FOLDER',
                        help="read all data from here instead of the config's data_root")
    add_cfg_options(parser)
    parser.add_argument('--cuda-graphs', action='store_true',
                        help='record CUDA graphs of the backbone and replay them (needs a GPU)')
    parser.add_argument('--compile', action='store_true',
                        help='compile the backbone with torch.compile')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes the one or the other, depending on its version.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
