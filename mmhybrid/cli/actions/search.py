"""What ``mmhybrid search`` does."""
from __future__ import annotations

import argparse
import copy
import os
import os.path as osp
from collections.abc import Callable

from mmengine.config import Config
from mmengine.dist import get_rank

from mmhybrid.engine.checkpoint_check import check_checkpoint_file
from mmhybrid.engine.config import load_config
from mmhybrid.engine.search import (
    ALPHAS_FILE,
    alphas_table,
    check_finite,
    check_pick,
    checkpoint_alphas,
    choose_directions,
    direction_weights,
    make_supernet,
    model_alphas,
    searched_backbone,
    supernet_blocks,
    write_searched_config,
)
from mmhybrid.errors import UserError
from mmhybrid.ops.cross_scan import DIRECTIONS
from mmhybrid.visualization import draw_directions

from .._options import add_search_arguments
from .training import check_arguments, parse, run_training

__all__ = ['run_search', 'search']


def search(argv: list[str] | None = None) -> str | None:
    """Search directions; ``argv`` as on the command line of tools/search_directions.py.

    Returns:
        Path of the config with the directions; None in all processes but the first.
    """
    parser = argparse.ArgumentParser()
    add_search_arguments(parser)
    return run_search(parse(parser, argv))


def run_search(args: argparse.Namespace) -> str | None:
    """Search as the options say; returns what :func:`search` does."""
    check_arguments(args)
    _check(args)
    if args.source is not None:
        cfg, notes = load_config(args.config, args.cfg_options, args.data_root, args.work_dir)
        for text in notes:
            print(text)
        blocks, _ = supernet_blocks(cfg)
        _check_target(args, blocks)
        check_checkpoint_file(args.source)
        alphas = checkpoint_alphas(args.source, blocks)
        return _write(args, cfg, alphas, f'found in {osp.basename(args.source)}', print)

    given = []

    def change(cfg: Config) -> list[str]:
        _check_target(args, supernet_blocks(cfg)[0])
        given.append(copy.deepcopy(cfg))
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(
            type='mmhybrid.DirectionSearchHook', interval=args.interval, pick=args.pick)]
        return make_supernet(cfg)

    runner, path = run_training(args, change), None
    if get_rank() == 0:
        alphas = model_alphas(searched_backbone(runner))
        path = _write(args, given[0], alphas, f'searched for {runner.iter} iterations',
                      runner.logger.info)
    return path


def _check(args: argparse.Namespace) -> None:
    check_pick(args.pick)
    if args.interval < 1:
        raise UserError(f'--interval must be at least 1 iteration, got {args.interval}.')
    if args.out is not None and not args.out.endswith('.py'):
        raise UserError(f'--out must end with .py, got {args.out}.')
    if args.source is not None:
        training = [option for option, value in (
            ('--resume', args.resume), ('--pretrained', args.pretrained), ('--amp', args.amp),
            ('--auto-scale-lr', args.auto_scale_lr)) if value]
        if training:
            raise UserError(f'--from chooses by a checkpoint without training, and '
                            f'{" and ".join(training)} is for training. Leave one of them out.')
        if args.launcher != 'none':
            raise UserError('--from needs one process. Start it with python, without --launcher.')


def _check_target(args: argparse.Namespace, blocks: list[str]) -> None:
    """Refuse a config for other blocks before anything is trained."""
    if args.into is None:
        return
    other, _ = supernet_blocks(load_config(args.into)[0])
    if other != blocks:
        raise UserError(
            f'Directions belong to blocks: the backbone of {args.config} has {len(blocks)} '
            f'({blocks[0]} to {blocks[-1]}), that of --into {args.into} has {len(other)} '
            f'({other[0]} to {other[-1]}). Search in a network with the same blocks; widths may '
            'differ.')


def _write(args: argparse.Namespace, cfg: Config, alphas: dict, how: str,
           say: Callable[[str], None]) -> str:
    """Write config and picture, and say where they are; ``cfg``: the config, not yet changed."""
    check_finite(alphas)
    chosen = {block: choose_directions(values, args.pick) for block, values in alphas.items()}
    base = args.into or args.config
    name = osp.splitext(osp.basename(base))[0]
    os.makedirs(cfg.work_dir, exist_ok=True)
    path = args.out or osp.join(cfg.work_dir, f'{name}_searched.py')
    os.makedirs(osp.dirname(osp.abspath(path)), exist_ok=True)
    model = None
    if args.into is None and cfg.model != Config.fromfile(base).model:
        model = cfg.model.to_dict()
    remark = f'{how} with {osp.basename(args.config)}'
    write_searched_config(path, base, chosen, model=model, remark=remark)
    picture = osp.join(cfg.work_dir, 'directions.png')
    weights = {block: direction_weights(values) for block, values in alphas.items()}
    draw_directions(weights, DIRECTIONS, chosen, title=remark).save(picture)
    say(f'Shares of the scan directions in %, * = the {args.pick} chosen\n'
        + alphas_table(alphas, args.pick))
    record = osp.join(cfg.work_dir, ALPHAS_FILE)
    same_data = args.data_root and args.into is None
    data = f' --data-root {args.data_root}' if same_data else ''
    say(f'Picture of the shares:   {picture}\n'
        + (f'Record of the alphas:    {record}\n' if osp.isfile(record) else '')
        + f'Config with the choice:  {path}\n'
        f'Train with it:           python tools/train.py {path}{data}')
    return path
