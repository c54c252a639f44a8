"""torchrun, without its own traceback below the message of the process that failed.

Same arguments as torchrun; called by dist_train.sh and dist_test.sh.
"""
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f'Process {rank} ended with code {failure.exitcode}; what it said is above.',
              file=sys.stderr)
        sys.exit(1)
