"""torchrun, without its own traceback below the message of the process that failed.

Same arguments as torchrun; called by dist_train.sh, dist_test.sh and dist_search.sh. A signal goes
to all processes, which have 30 seconds to save (torchrun's limit); the exit code is theirs.

A process that is lost ends all others, and every machine names it in one line. With --max_restarts
they start again, and a training goes on from its newest checkpoint.
"""
import os
import signal
import sys
import time
from datetime import timedelta

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main, parse_args

ALONE = 75  # exit code of a process whose connection to another one broke
KEY, WAIT = 'mmhybrid/lost', 10  # seconds


def stop(number, frame):
    """What torchrun does at SIGTERM; SIGUSR1, Slurm's before a limit, would kill it alone."""
    raise SignalException('', signal.Signals(number))


def cause(error):
    """Rank and failure of the first process that ended by itself, else (None, None)."""
    found = sorted((failure.timestamp, rank, failure) for rank, failure in error.failures.items()
                   if failure.exitcode != ALONE)
    # Processes that torchrun stops after the first one are listed too.
    own = [each for each in found if each[2].exitcode not in (143, -signal.SIGTERM)]
    return (own or found or [(0, None, None)])[0][1:]


def described(rank, failure):
    """One line about it."""
    if failure.exitcode < 0:
        return f'Process {rank} was killed by {signal.Signals(-failure.exitcode).name}'
    return f'Process {rank} ended with code {failure.exitcode}'


def board(args):
    """Where machines leave notes for each other, or None."""
    if args.standalone or args.nnodes in ('1', '1:1'):
        return None
    host, _, port = (args.rdzv_endpoint or f'{args.master_addr}:{args.master_port}').rpartition(':')
    try:
        return TCPStore(host, int(port), is_master=False, wait_for_workers=False,
                        timeout=timedelta(seconds=WAIT))
    except (RuntimeError, ValueError):
        return None  # the first machine is gone


def told_by_another(store):
    """What another machine says of the process that was lost."""
    try:
        return store.get(KEY).decode()
    except RuntimeError:  # no answer in time
        return None


def report(error, args):
    """Say in one line what ended the processes of this machine; returns the exit code."""
    (rank, failure), store = cause(error), board(args)
    if failure is None:
        told = told_by_another(store) if store is not None else None
        print(f'{told} on another machine, so all others end.' if told else
              'The connection to a process on another machine broke; that one does not answer.',
              file=sys.stderr)
        return 1
    print(f'{described(rank, failure)}; what it said is above.', file=sys.stderr)
    if store is not None:
        store.set(KEY, described(rank, failure))
        time.sleep(WAIT)  # the notes are on the first machine, and this may be it
    return max(failure.exitcode, 1)  # a negative code: killed


if __name__ == '__main__':
    if hasattr(signal, 'SIGUSR1'):
        signal.signal(signal.SIGUSR1, stop)
    # Checkpoints that are older than this are of another job.
    os.environ['MMHYBRID_JOB_START'] = str(time.time())
    try:
        main(sys.argv[1:])
    except SignalException as error:
        print(f'Stopped by {error.sigval.name}; what the processes said is above.', file=sys.stderr)
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        sys.exit(report(error, parse_args(sys.argv[1:])))
