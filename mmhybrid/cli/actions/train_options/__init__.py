"""Options of ``mmhybrid train`` in place of a dozen lines of a config."""
from mmhybrid.cli._train_options import add_arguments, check_arguments, given

from .command import apply_options

__all__ = ['add_arguments', 'apply_options', 'check_arguments', 'given']
