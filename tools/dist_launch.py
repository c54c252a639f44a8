"""torchrun, without its own traceback below the message of the process that failed.

Same arguments as torchrun; called by dist_train.sh, dist_test.sh and dist_search.sh. A signal goes
to all processes, which have 30 seconds to save (torchrun's limit); the exit code is theirs.
"""
import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def stop(number, frame):
    """What torchrun does at SIGTERM; SIGUSR1, Slurm's before a limit, would kill it alone."""
    raise SignalException('', signal.Signals(number))


if __name__ == '__main__':
    if hasattr(signal, 'SIGUSR1'):
        signal.signal(signal.SIGUSR1, stop)
    try:
        main(sys.argv[1:])
    except SignalException as error:
        print(f'Stopped by {error.sigval.name}; what the processes said is above.', file=sys.stderr)
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f'Process {rank} ended with code {failure.exitcode}; what it said is above.',
              file=sys.stderr)
        sys.exit(max(failure.exitcode, 1))  # a negative code: killed
