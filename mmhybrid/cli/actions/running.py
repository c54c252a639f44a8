"""From the main function of a tool to its exit code."""
from __future__ import annotations

import os
import sys
import time
import traceback

import torch

from mmhybrid.engine.distributed import end_if_alone, launched_rank, leave_process_group
from mmhybrid.engine.explanations import explain
from mmhybrid.engine.stop_signals import Stopped

__all__ = ['run_command']

WAIT_FOR_RANK_0 = 20  # seconds


def run_command(main, argv=None) -> int:
    """Run the main function of a tool and return its exit code.

    Known errors become one block of text on stderr; everything else keeps its traceback, and so
    do known errors with ``--traceback`` or the environment variable ``MMHYBRID_TRACEBACK=1``.
    After success the process leaves its process group.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    full = '--traceback' in argv or os.environ.get('MMHYBRID_TRACEBACK', '0') not in ('', '0')
    rank, stopped = launched_rank(), None
    try:
        main(argv)
        leave_process_group()
    except Stopped as stop:
        stopped = stop.code  # without its traceback, which would hold what has to go
    except KeyboardInterrupt:
        print('\nStopped.', file=sys.stderr)
        return 130
    except Exception as error:
        if not full:
            end_if_alone(error)
        text = explain(error)
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if text is None or full:
            traceback.print_exc()
        if text is not None:
            if rank and not together:
                # Usually rank 0 has found the same. It tells, and then the launcher stops us.
                time.sleep(WAIT_FOR_RANK_0)
            where = f' (process {rank})' if rank else ''
            print(f'\nERROR{where}: {text}\n', file=sys.stderr, flush=True)
        return 1
    if stopped is not None:
        leave_process_group()
    return stopped or 0
