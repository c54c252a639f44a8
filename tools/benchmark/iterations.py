"""Time iterations of tools/train.py as a user runs it: data, losses, optimizer and logs included.

    python tools/benchmark/iterations.py --csv tools/benchmark/results/iterations_gpu.csv
    python tools/benchmark/iterations.py configs/upernet_vmamba_t_ade20k.py --ways eager compile

Every way of training (eager, with --cuda-graphs, with --compile) is a run of its own, one after the
other, on the generated data sets, from random weights, for --seconds at most. The median is of the
iterations behind the first fifth of a run, in which kernels are compiled and graphs recorded;
'graphs' is what the run itself says of its graphs. Runs of one config have the same random seed,
so they see the same images.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import ENVIRONMENT, PERCENTILES, Failures, append_rows, environment, percentiles

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ('configs/cascade_mambavision_t_coco.py', 'configs/cascade_mambavision_t_tight_coco.py',
           'configs/upernet_mambavision_t_ade20k.py')
WAYS = {'eager': (), 'graphs': ('--cuda-graphs',), 'compile': ('--compile',)}
COLUMNS = (*ENVIRONMENT, 'config', 'way', 'batch', 'amp', *PERCENTILES, 'data_ms', 'peak_MB',
           'eager_over_this', 'graphs', 'end')
_ENOUGH = 5  # iterations of which a median is told


def prepare(task: str, folder: Path, small: bool) -> Path:
    """Generate the data of a task, once; the folder that tools/train.py takes as --data-root."""
    from mmhybrid.datasets.mini_ade20k import write_mini_ade20k
    from mmhybrid.datasets.mini_coco import write_mini_coco

    name, write = {
        'coco': ('mini_coco', write_mini_coco),
        'ade20k': ('mini_ade20k/ADEChallengeData2016', write_mini_ade20k),
    }[task]
    target = folder / name
    if not target.exists():
        write(target, **(dict(train=16, val=2) if small else {}))
    return target


def command_of(config: Path, way: str, data: Path, work: Path, args) -> list[str]:
    """The training of one way."""
    options = [
        'randomness.seed=0', 'default_hooks.logger.interval=1', 'log_processor.window_size=1',
        f'train_dataloader.batch_size={args.batch}', *args.cfg_options,
    ]
    return [
        sys.executable, str(ROOT / 'tools' / 'train.py'), str(config), '--data-root', f'{data}/',
        '--work-dir', str(work), *WAYS[way], *(['--amp'] if args.amp else []),
        '--cfg-options', *options,
    ]


def run(command: list[str], seconds: float, log: Path) -> str:
    """Train until the end or for so many seconds; 'finished', 'stopped' or what went wrong."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    with open(log, 'w') as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT,
                                   env=os.environ | {'PYTHONPATH': path}, start_new_session=True)
        try:
            code = process.wait(seconds)
            return 'finished' if code == 0 else f'failed, exit code {code}'
        except subprocess.TimeoutExpired:
            return 'stopped'
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # nothing of it is needed any more
            except ProcessLookupError:
                pass
            process.wait()


def iterations(work: Path) -> list[dict]:
    """What the run logged of its training iterations, without the first fifth."""
    rows = []
    for path in sorted(work.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off
            if 'time' in row and 'lr' in row:
                rows.append(row)
    return rows[len(rows) // 5 :]


def row_of(rows: list[dict], said: str) -> dict[str, str]:
    """The columns that a run fills."""
    graphs = re.findall(r'CUDA graphs: (.*)', said)
    found = percentiles([row['time'] for row in rows])
    data = percentiles([row['data_time'] for row in rows])['p50_ms']
    peak = max((row.get('memory', 0) for row in rows), default=0)
    return found | {'data_ms': data, 'peak_MB': str(peak or ''),
                    'graphs': graphs[-1].strip() if graphs else ''}


def measure(config: Path, args, failures: Failures):
    """The rows of a config, one for each way."""
    data = prepare('coco' if 'coco' in config.stem else 'ade20k', args.data, args.small)
    common = environment(args.device, 'wall') | {
        'config': config.stem, 'batch': str(args.batch), 'amp': str(args.amp)}
    eager = None
    for way in args.ways:
        with failures.noted(f'{config.stem}: {way}'), tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / 'log'
            end = run(command_of(config, way, data, Path(folder) / 'work', args), args.seconds, log)
            said, rows = log.read_text(errors='replace'), iterations(Path(folder) / 'work')
            if end.startswith('failed') or len(rows) < _ENOUGH:
                print(said[-3000:], flush=True)
                raise RuntimeError(f'{end}, {len(rows)} iterations after the first fifth; expected '
                                   f'at least {_ENOUGH}: give it more --seconds, or see above')
            row = common | row_of(rows, said) | {'way': way, 'end': end}
            if way == 'eager':
                eager = float(row['p50_ms'])
            if eager is not None:
                row['eager_over_this'] = f'{eager / float(row["p50_ms"]):.2f}'
            yield row


def parse_args(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='*', type=Path, metavar='CONFIG',
                        default=[ROOT / config for config in CONFIGS],
                        help=f'default: {", ".join(CONFIGS)}')
    parser.add_argument('--ways', nargs='+', choices=WAYS, help='default: all that can run here')
    parser.add_argument('--batch', type=int, default=2, help='images of an iteration (default: 2)')
    parser.add_argument('--no-amp', dest='amp', action='store_false', help='train in float32')
    parser.add_argument('--seconds', type=float, default=120, metavar='S',
                        help='stop a run after these (default: 120)')
    parser.add_argument('--data', type=Path, default=ROOT / 'data', metavar='FOLDER',
                        help='where the generated data sets are, or will be (default: data)')
    parser.add_argument('--small', action='store_true', help='16 images, to try the script')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='for tools/train.py')
    parser.add_argument('--csv', metavar='PATH', help='append the rows to this file')
    args = parser.parse_args(arguments)
    import torch

    args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    args.ways = args.ways or (list(WAYS) if args.device == 'cuda' else ['eager'])
    for config in args.configs:
        if not config.exists():
            parser.error(f'there is no {config}')
    return args


def main(arguments=None) -> int:
    """Print the rows and keep them; return 1 when a run fails."""
    args = parse_args(arguments)
    if args.csv:
        append_rows(args.csv, COLUMNS, [])  # complains before anything is measured
    failures = Failures()
    for config in args.configs:
        for row in measure(config.resolve(), args, failures):
            shown = ('config', 'way', 'turns', 'p50_ms', 'data_ms', 'peak_MB', 'eager_over_this',
                     'graphs', 'end')
            print('  '.join(f'{key} {row[key]}' for key in shown if row.get(key)), flush=True)
            if args.csv:
                append_rows(args.csv, COLUMNS, [row])
    return int(bool(failures))


if __name__ == '__main__':
    sys.exit(main())
