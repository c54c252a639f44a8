"""What ``mmhybrid train`` and ``mmhybrid test`` do; one entry for all tasks."""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import closing

import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner

from mmhybrid.datasets.loading.checks import check_classes, check_data
from mmhybrid.datasets.loading.pipeline_guard import guard_image_files
from mmhybrid.engine.amp import has_accelerator
from mmhybrid.engine.building import LATE, building, prepare_training
from mmhybrid.engine.checkpoint_check import check_checkpoint_file
from mmhybrid.engine.config import (
    apply_amp,
    apply_auto_scale_lr,
    apply_out,
    apply_pretrained,
    apply_resume,
    apply_show,
    apply_tta,
    ensure_finite_loss,
    ensure_hooks,
    load_config,
)
from mmhybrid.engine.distributed import launched_rank, prepare_launch
from mmhybrid.engine.faster import apply_faster
from mmhybrid.engine.loop_check import check_loops
from mmhybrid.engine.resume import NothingLeft
from mmhybrid.engine.run_report import tell_end
from mmhybrid.engine.settings import check_custom_keys
from mmhybrid.engine.sharding import apply_fsdp
from mmhybrid.engine.small_batches import (
    check_pairs,
    check_single_images,
    few_images_note,
    out_of_memory_advice,
)
from mmhybrid.engine.small_gpu import apply_eight_bit, apply_lora, check_lora_start, describe_lora
from mmhybrid.engine.stop_signals import stop_signals
from mmhybrid.engine.stop_signals import train as train_until_stopped
from mmhybrid.engine.work_dir_lock import WorkDirLock
from mmhybrid.errors import UserError, check_given

from .._options import add_test_arguments, add_training_arguments
from .train_options import apply_options
from .train_options import check_arguments as check_train_options
from .train_options import given as given_options

__all__ = ['parse', 'run_test', 'run_training', 'test', 'train', 'training_parser']

NO_GPUS = ('', 'NoDevFiles', 'none', 'void')  # what Slurm and containers write
HOOKS = ('mmhybrid.RandomStateHook', 'mmhybrid.ProgressHook', 'mmhybrid.CheckpointCheckHook')
TRAINING_HOOKS = ('mmhybrid.StopSignalHook', 'mmhybrid.RunReportHook')


def train(argv: list[str] | None = None) -> None:
    """Train a model; ``argv`` as on the command line of tools/train.py."""
    run_training(parse(training_parser(), argv))


def training_parser(description: str = '') -> argparse.ArgumentParser:
    """Parser with the options of everything that trains."""
    return _parser(add_training_arguments, description)


def run_training(args: argparse.Namespace,
                 change: Callable[[Config], list[str]] | None = None) -> Runner:
    """Train as ``args`` say.

    Args:
        args: the parsed command line, see :func:`mmhybrid.cli._options.add_training_arguments`.
        change: changes the config once it has the options of the command line, before anything is
            checked or built; returns warnings for the log.

    Returns:
        The runner, after training.

    Raises:
        UserError: for everything that the user can put right.
    """
    check_arguments(args)
    check_train_options(args)
    with stop_signals():
        return _run_training(args, change)


def _run_training(args, change) -> Runner:
    notes = _set_up_process()
    cfg, warnings = load_config(args.config, args.cfg_options, args.data_root, args.work_dir)
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not cfg.get(key):
            raise UserError(f'{args.config} has no {key}, so it cannot be trained.')
    apply_lora(cfg, args.lora)
    notes += apply_eight_bit(cfg, args.optimizer_8bit)
    if change is not None:
        warnings += change(cfg)
    warnings += apply_amp(cfg, args.amp)
    if args.auto_scale_lr:
        apply_auto_scale_lr(cfg)
    apply_faster(cfg, args.cuda_graphs, args.compile)
    _apply_resume_settings(cfg, args)
    warnings += apply_resume(cfg, args.resume)
    warnings += apply_pretrained(cfg, args.pretrained)
    check_lora_start(cfg)
    apply_fsdp(cfg, args.fsdp, _launcher(args))  # knows what it does not go together with
    if cfg.get('load_from'):
        check_checkpoint_file(cfg.load_from)
    elif cfg.get('pretrained'):
        check_checkpoint_file(cfg.pretrained, 'pretrained checkpoint')
    splits = ['train', 'val'] if cfg.get('val_cfg') is not None else ['train']
    ensure_hooks(cfg, *TRAINING_HOOKS)
    ensure_finite_loss(cfg)
    # Several that were started without --launcher work alone: each needs a folder of its own.
    alone = _launcher(args) == 'none' and 'RANK' not in os.environ
    with closing(WorkDirLock(cfg.work_dir, 0 if alone else launched_rank())) as lock:
        runner = _build(cfg, args, splits, notes, warnings, lock)
        adapters = describe_lora(runner.model) if isinstance(runner, Runner) else None
        if adapters:
            runner.logger.info(adapters)
        loader = runner.train_loop.dataloader
        if not len(loader):
            raise UserError(
                f'{len(loader.dataset)} training images make no batch of {loader.batch_size}, and '
                'train_dataloader.drop_last leaves incomplete batches out. Use --cfg-options '
                'train_dataloader.batch_size=N, or train_dataloader.drop_last=False.')
        if isinstance(runner, Runner):
            check_single_images(runner)
            check_pairs(runner)
            note = few_images_note(runner)
            if note:
                runner.logger.info(note)
        try:
            with building(args.config, cfg, LATE):
                train_until_stopped(runner)
        except NothingLeft as end:
            runner.logger.info(str(end))
            runner.call_hook('after_run')
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(out_of_memory_advice(error, runner)) from error
        else:
            tell_end(runner, args)
    return runner


def _apply_resume_settings(cfg: Config, args: argparse.Namespace) -> None:
    """Let ResumeSettingsHook know whose settings count."""
    if args.resume_settings and not args.resume and not cfg.get('resume'):
        raise UserError(f'--resume-settings {args.resume_settings} is for a run that goes on: add '
                        '--resume.')
    ensure_hooks(cfg, 'mmhybrid.ResumeSettingsHook')
    hook = next(hook for hook in cfg.custom_hooks if isinstance(hook, dict)
                and 'ResumeSettingsHook' in str(hook.get('type')))  # text or the class
    if args.resume_settings:
        hook['settings'] = args.resume_settings
    options = given_options(args)
    if options:
        hook['options'] = options


def test(argv: list[str] | None = None) -> dict:
    """Evaluate a checkpoint; ``argv`` as on the command line of tools/test.py.

    Returns:
        The metrics.
    """
    return run_test(parse(_parser(add_test_arguments), argv))


def run_test(args: argparse.Namespace) -> dict:
    """Evaluate as the options say; returns the metrics."""
    check_arguments(args)
    notes = _set_up_process()
    cfg, warnings = load_config(args.config, args.cfg_options, args.data_root, args.work_dir)
    for key in ('test_dataloader', 'test_cfg', 'test_evaluator'):
        if cfg.get(key) is None:
            raise UserError(f'{args.config} has no {key}, so it cannot be tested.')
    apply_faster(cfg, args.cuda_graphs, args.compile)
    check_checkpoint_file(args.checkpoint)
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show or args.show_dir:
        notes += apply_show(cfg, args.show, args.show_dir, args.wait_time)
    if args.out:
        apply_out(cfg, args.out)
    runner = _build(cfg, args, ['test'], notes, warnings)
    metrics = runner.test()
    if args.out:
        runner.logger.info(f'Predictions are in {args.out}')
    return metrics


def _parser(add_arguments: Callable[[argparse.ArgumentParser], None],
            description: str = '') -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    parser.add_argument('--traceback', action='store_true')
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    check_given(args, 'config', 'checkpoint', 'work_dir', 'data_root', 'resume', 'pretrained',
                'out', 'show_dir')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))


def _set_up_process() -> list[str]:
    """Before anything computes: threads take over this setting when they start."""
    if has_accelerator():
        return []
    notes = []
    wanted = os.environ.get('CUDA_VISIBLE_DEVICES', '')
    if wanted not in NO_GPUS and not wanted.startswith('-'):
        notes.append(f'CUDA_VISIBLE_DEVICES={wanted} names no GPU that PyTorch finds, so this runs '
                     'on the CPU.')
    if torch.set_flush_denormal(True):
        notes.append('Running on the CPU; denormal numbers are rounded to zero, because they slow '
                     'it down as training goes on.')
    return notes


def _launcher(args: argparse.Namespace) -> str:
    """What --launcher or --cfg-options launcher= says. That of a config belongs to another run."""
    option = (args.cfg_options or {}).get('launcher')
    if option is None:
        return args.launcher
    if args.launcher not in ('none', option):
        raise UserError(f'--launcher says {args.launcher}, --cfg-options launcher= says {option}. '
                        'Give one of them.')
    return str(option)


def _build(cfg, args, splits, notes, warnings, lock=None) -> Runner:
    """Check everything that can be checked, then build the runner."""
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    notes += check_loops(cfg, splits)
    check_data(cfg, splits)
    warnings += check_classes(cfg, splits, notes)
    if getattr(args, 'tta', False):
        notes += apply_tta(cfg)
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f'The work directory {cfg.work_dir} cannot be made: {error.strerror}. '
                        'Give another one with --work-dir.') from error
    if lock is not None:
        warnings += lock.acquire()
    guard_image_files()
    ensure_hooks(cfg, *HOOKS)
    launcher = _launcher(args)
    notes += prepare_launch(cfg, launcher)
    with building(args.config, cfg):
        if 'train' in splits:
            processes = 1 if launcher == 'none' else int(os.environ['WORLD_SIZE'])
            notes += apply_options(cfg, args, processes)
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        if isinstance(runner, Runner):  # its other forms build in an order of their own
            if 'train' in splits:
                warnings += check_custom_keys(
                    cfg, args.config, (name for name, _ in runner.model.named_parameters()))
                prepare_training(runner)
            else:
                runner._test_loop = runner.build_test_loop(runner._test_loop)
    for text in notes:
        runner.logger.info(text)
    for text in warnings:
        runner.logger.warning(text)
    return runner
