"""Images per second of a config's training data, by number of workers.

    python tools/benchmark/loading.py configs/cascade_mambavision_mini_coco.py --workers 0 1 2 4

Whole batches, as a training gets them, without a model. The first batches, in which workers start,
are left out.
"""
import argparse
import itertools
import time

from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner

import mmhybrid.plugin  # noqa: F401  registers what configs name
from mmhybrid.engine.config import load_config
from mmhybrid.engine.options import OptionsAction


def loader_of(cfg, dataset, workers: int):
    """The config's data loader with this number of workers."""
    options = dict(cfg.train_dataloader, dataset=dataset, num_workers=workers)
    if not workers:
        options = {key: value for key, value in options.items()
                   if key not in ('persistent_workers', 'prefetch_factor')}
    return Runner.build_dataloader(options, seed=0)


def images_per_second(loader, batches: int, warm_up: int) -> float:
    """Images per second after the first batches."""
    stream = itertools.chain.from_iterable(itertools.repeat(loader))
    for _ in range(warm_up):
        next(stream)
    images, start = 0, time.perf_counter()
    for _ in range(batches):
        batch = next(stream)
        images += len(batch['inputs'])
    return images / (time.perf_counter() - start)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2, 4])
    parser.add_argument('--batches', type=int, default=20, help='that are timed')
    parser.add_argument('--warm-up', type=int, default=4, help='batches before them')
    parser.add_argument('--data-root')
    parser.add_argument('--cfg-options', nargs='+', action=OptionsAction, metavar='KEY=VALUE')
    args = parser.parse_args()
    cfg, _ = load_config(args.config, args.cfg_options, args.data_root)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    print('workers  images/s')
    for workers in args.workers:
        speed = images_per_second(loader_of(cfg, dataset, workers), args.batches, args.warm_up)
        print(f'{workers:7}  {speed:8.1f}', flush=True)


if __name__ == '__main__':
    main()
