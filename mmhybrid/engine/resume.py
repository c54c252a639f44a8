"""Whose settings a resumed run follows.

mmengine takes the hyperparameters of the optimizer and the whole state of the schedules from the
checkpoint, and loops, data and hooks from the config. So a learning rate that was changed in the
config has no effect, and nothing says so.
"""
from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop

from ..errors import UserError
from ..registry import HOOKS
from .random_state import KEY as RANDOM_STATE
from .stop_signals import VALIDATING

__all__ = ['NothingLeft', 'ResumeSettingsHook']

KEY = 'run_settings'  # in a checkpoint
# What a schedule changes while it runs, or derives from other settings.
MOVING = {'_global_step', 'last_step', '_last_value', 'best', 'num_bad_epochs', 'cooldown_counter',
          'base_values', 'verbose', 'total_iters', 'param_name', 'min_values', 'rule_worse'}
SETTINGS = (int, float, str, list, tuple, Mapping)
# Options that have their effect through the rate and the schedules.
OF_SETTINGS = ('epochs', 'batch', 'accumulate', 'lr')
# Hyperparameters that one kind of optimizer has and another has not.
MARKS = ('betas', 'momentum', 'rho', 'alpha', 'etas', 'lambd')


class NothingLeft(Exception):
    """A resumed run has reached its end before it began."""


@HOOKS.register_module()
class ResumeSettingsHook(Hook):
    """Says which settings of a resumed run differ between checkpoint and config, and which count.

    Args:
        settings: whose learning rate, other hyperparameters of the optimizer and schedules a
            resumed run goes on with, "checkpoint" or "config". With "config" it has, at each
            iteration, the learning rate that it would have had under this config from the start;
            what the optimizer has learned about the gradients is kept.
        options: what the command line of this run said about its length, batch, rate and so on. A
            resumed run that says something else says so, and one whose new rate or schedule would
            have no effect is refused.

    Raises:
        UserError: on resume, if the checkpoint holds no state of a run, or one of another optimizer
            or of other schedules, or of averaged weights where this run averages none.
        NothingLeft: if the checkpoint is that of the last epoch or iteration, unless a signal cut
            the last validation short.
    """

    priority = 'BELOW_NORMAL'  # after CheckpointCheckHook, before RandomStateHook

    def __init__(self, settings: str = 'checkpoint', options: dict | None = None):
        if settings not in ('checkpoint', 'config'):
            raise ValueError(f'settings must be "checkpoint" or "config", got {settings!r}.')
        self.settings = settings
        self.options = dict(options or {})
        self._resumed = False
        self._replay: tuple[int, int, int | None] | None = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add what the states themselves do not tell."""
        checkpoint[KEY] = dict(_settings(runner), options=self.options)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compare, and let the one or the other win."""
        saved = checkpoint.pop(KEY, None) or {}
        if not runner._resume:
            return
        self._resumed = True
        path = runner._load_from
        _check_is_of_a_run(checkpoint, path)
        _check_optimizers(runner, checkpoint, saved, path)
        _check_averages(runner, checkpoint, path)
        if self.settings == 'checkpoint':
            _check_schedules(runner, checkpoint, saved)
        changed = [*_optimizer_changes(runner, checkpoint), *_schedule_changes(runner, checkpoint)]
        if changed and self.settings == 'checkpoint':
            _check_options(self.options, saved, changed)
        if changed:
            _say(runner, changed, self.settings)
        _say_sizes(runner, saved)
        _say_options(runner, saved, self.options)
        if self.settings == 'config':
            per_epoch = (checkpoint.get(RANDOM_STATE) or {}).get('batches_per_epoch')
            self._replay = checkpoint['meta']['epoch'], checkpoint['meta']['iter'], per_epoch
            _take_settings_of_config(runner, checkpoint)

    def before_train(self, runner) -> None:
        """Bring the config's schedules to where the run is."""
        if not self._resumed:
            return
        loop = runner.train_loop
        whole = isinstance(loop, EpochBasedTrainLoop)
        ended = loop.epoch >= loop.max_epochs or not whole and loop.iter >= loop.max_iters
        if ended and not runner.message_hub.runtime_info.get(VALIDATING):
            raise NothingLeft(_nothing_left(runner._load_from, loop, whole))
        if self._replay is not None:
            epochs, iterations, per_epoch = self._replay
            self._replay = None
            _advance(list(_flat(runner.param_schedulers).values()), epochs, iterations,
                     per_epoch or len(loop.dataloader))


def _nothing_left(path, loop, by_epoch: bool) -> str:
    done, total, key = ((loop.epoch, loop.max_epochs, 'epoch') if by_epoch else
                        (loop.iter, loop.max_iters, 'iteration'))
    name = 'max_epochs' if by_epoch else 'max_iters'
    return (f'Nothing is left to train: {path} was written after {key} {done}, and '
            f'train_cfg.{name} is {total}. To train longer, add --epochs N '
            '--resume-settings config.')


# --- what belongs together ----------------------------------------------------------------------

def _optimizers(runner) -> dict[str, object]:
    """Optimizer wrappers by the name of their setting."""
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return {f'optim_wrapper.{name}': each for name, each in wrapper.items()}
    return {'optim_wrapper': wrapper}


def _optimizer_state(checkpoint: dict, name: str) -> dict:
    state = checkpoint['optimizer']
    return state if name == 'optim_wrapper' else state[name.partition('.')[2]]


def _flat(schedules) -> dict[str, object]:
    """Schedules, or their states, by the name of their setting."""
    if isinstance(schedules, Mapping):
        return {f'param_scheduler.{name}.{index}': each for name, group in schedules.items()
                for index, each in enumerate(group)}
    return {f'param_scheduler.{index}': each for index, each in enumerate(schedules or [])}


def _settings(runner) -> dict:
    loader = runner.train_loop.dataloader
    return dict(
        optimizers={name: type(wrapper.optimizer).__name__
                    for name, wrapper in _optimizers(runner).items()},
        schedules={name: type(schedule).__name__
                   for name, schedule in _flat(runner.param_schedulers).items()},
        batch_size=getattr(loader.batch_sampler, 'batch_size', None) or loader.batch_size,
        processes=get_world_size())


# --- what cannot go on --------------------------------------------------------------------------

def _start_anew(path) -> str:
    return (f'or start a new training from its weights: --cfg-options load_from={path} , without '
            '--resume.')


def _check_is_of_a_run(checkpoint: dict, path) -> None:
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    missing = [f'meta.{key}' for key in ('epoch', 'iter')
               if not isinstance(meta.get(key), int) or meta[key] < 0]
    if not isinstance(checkpoint.get('message_hub'), Mapping):
        missing.append('message_hub')
    if missing:
        raise UserError(f'{path} holds weights, but not the state of a training run (no '
                        f'{", ".join(missing)}), so it cannot be resumed. Resume from a checkpoint '
                        f'that tools/train.py wrote, {_start_anew(path)}')


def _check_averages(runner, checkpoint: dict, path) -> None:
    """Of averaged weights, a run that averages none would go on from the average."""
    if 'ema_state_dict' in checkpoint and not any(
            isinstance(hook, EMAHook) for hook in runner._hooks):
        raise UserError(f'{path} was written by a run that averages its weights, and this one does '
                        f'not: it would go on from the average. Add --ema (or the EMAHook of that '
                        f'run), {_start_anew(path)}')


def _check_options(options: dict, saved: dict, changed: list[str]) -> None:
    """Options of this run that the settings of the checkpoint would overrule."""
    before = saved.get('options') or {}
    idle = [f'--{name} {options[name]}' for name in OF_SETTINGS
            if name in options and options[name] != before.get(name)]
    if idle:
        listed = '\n'.join(f'  {line}' for line in sorted(changed))
        raise UserError(
            f'{" ".join(idle)} would have no effect: the resumed run goes on with the learning '
            f'rate and the schedules of its checkpoint, which differ (checkpoint and now):\n'
            f'{listed}\nAdd --resume-settings config to go on with the new ones, or leave the '
            'option out.')


def _check_optimizers(runner, checkpoint: dict, saved: dict, path) -> None:
    """The state of another optimizer, or of other groups, means nothing to this one."""
    if 'optimizer' not in checkpoint:
        runner.logger.warning(f'{path} was written without the state of the optimizer '
                              '(save_optimizer=False), which starts afresh.')
        return
    for name, wrapper in _optimizers(runner).items():
        optimizer, kind = wrapper.optimizer, type(wrapper.optimizer).__name__
        state = _optimizer_state(checkpoint, name)
        before = (saved.get('optimizers') or {}).get(name, kind)
        sizes = [[len(group['params']) for group in groups]
                 for groups in (state['param_groups'], optimizer.param_groups)]
        marks = [{mark for mark in MARKS for group in groups if mark in group}
                 for groups in (state['param_groups'], optimizer.param_groups)]
        if before != kind or marks[0] != marks[1]:
            was = before if before != kind else f'one with {", ".join(sorted(marks[0])) or "none"}'
            raise UserError(
                f'{name}.optimizer.type is {kind}, but the optimizer of {path} was {was}: its '
                f'state is of no use here. Set the type back, {_start_anew(path)}')
        if sizes[0] != sizes[1]:
            raise UserError(
                f'{name} makes {len(sizes[1])} groups of {sum(sizes[1])} parameters, but {path} '
                f'was written with {len(sizes[0])} groups of {sum(sizes[0])}, so the state of its '
                'optimizer does not fit. Set paramwise_cfg, and what is frozen, back to what they '
                f'were, {_start_anew(path)}')


def _check_schedules(runner, checkpoint: dict, saved: dict) -> None:
    """mmengine would mix the states of two kinds of schedules."""
    if 'param_schedulers' not in checkpoint:
        if runner.param_schedulers:
            runner.logger.warning('The checkpoint was written without the state of the schedules '
                                  '(save_param_scheduler=False), which start afresh.')
        return
    before, now = _flat(checkpoint['param_schedulers']), _flat(runner.param_schedulers)
    kinds = saved.get('schedules') or {}
    described = [[kinds.get(name, 'a schedule') for name in before],
                 [type(each).__name__ for each in now.values()]]
    if list(before) != list(now) or any(
            kinds.get(name, type(each).__name__) != type(each).__name__
            or _of_two_kinds(_fixed(before[name]), _fixed(each.state_dict()))
            for name, each in now.items()):
        raise UserError(
            f'param_scheduler is {", ".join(described[1]) or "empty"}, but the checkpoint was '
            f'written with {", ".join(described[0]) or "none"}, and the states of other schedules '
            'mean nothing here. Set param_scheduler back, or go on with that of the config: '
            '--resume-settings config.')


def _of_two_kinds(old: Mapping, new: Mapping) -> bool:
    """Whether each has settings of its own. (A new version of a class may add some.)"""
    return bool(old.keys() - new.keys()) and bool(new.keys() - old.keys())


# --- what differs -------------------------------------------------------------------------------

def _plain(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):  # MultiStepLR counts its milestones
        return sorted(value.items()) if any(v != 1 for v in value.values()) else sorted(value)
    return list(value) if isinstance(value, (list, tuple)) else value


def _fixed(state: Mapping) -> dict:
    """The settings in the state of a schedule."""
    return {key: _plain(value) for key, value in state.items()
            if key not in MOVING and (value is None or isinstance(value, SETTINGS))}


def _hyperparameters(group: Mapping, scheduled: set[str]) -> dict:
    """The settings of a group; of what schedules change, the value that they start from."""
    values = {key: group.get(f'initial_{key}', value) for key, value in group.items()
              if not key.startswith(('initial_', 'param'))
              and (key not in scheduled or f'initial_{key}' in group or key == 'lr')}
    if 'momentum' in scheduled:
        values.pop('betas', None)
    return {key: _plain(value) for key, value in values.items()
            if isinstance(value, (int, float, list, tuple, torch.Tensor))}


def _optimizer_changes(runner, checkpoint: dict) -> Iterator[str]:
    if 'optimizer' not in checkpoint:
        return
    scheduled = {getattr(each, 'param_name', 'lr')
                 for each in _flat(runner.param_schedulers).values()}
    for name, wrapper in _optimizers(runner).items():
        told = set()
        groups = _optimizer_state(checkpoint, name)['param_groups']
        for old, new in zip(groups, wrapper.optimizer.param_groups, strict=True):
            before, now = _hyperparameters(old, scheduled), _hyperparameters(new, scheduled)
            for key in before.keys() & now.keys() - told:
                if before[key] != now[key]:
                    told.add(key)
                    yield f'{name}.optimizer.{key}: {before[key]} and {now[key]}'


def _schedule_changes(runner, checkpoint: dict) -> Iterator[str]:
    before = _flat(checkpoint.get('param_schedulers'))
    now = _flat(runner.param_schedulers)
    if len(before) != len(now):
        yield f'param_scheduler: {len(before)} and {len(now)} schedule(s)'
    for name in before.keys() & now.keys():
        old, new = _fixed(before[name]), _fixed(now[name].state_dict())
        if _of_two_kinds(old, new):
            yield f'{name}: of another type, and {type(now[name]).__name__}'
            continue
        for key in old.keys() & new.keys():
            if old[key] != new[key]:
                yield f'{name} ({type(now[name]).__name__}) {key}: {old[key]} and {new[key]}'


def _say(runner, changed: list[str], winner: str) -> None:
    listed = '\n'.join(f'  {line}' for line in sorted(changed))
    if winner == 'config':
        runner.logger.info('These settings differ (checkpoint and config); this run goes on with '
                           f"the config's:\n{listed}")
    else:
        runner.logger.warning('These settings differ (checkpoint and config); this run goes on '
                              f"with the checkpoint's, and the config's have no effect:\n{listed}\n"
                              "For the config's, add --resume-settings config.")


def _say_sizes(runner, saved: dict) -> None:
    now = _settings(runner)
    names = dict(batch_size='images per process', processes='processes')
    changed = [f'{saved[key]} {what} before, {now[key]} now' for key, what in names.items()
               if saved.get(key) not in (None, now[key])]
    if changed:
        runner.logger.warning(
            f"The batch changed: {'; '.join(changed)}. The config's counts; the learning rate does "
            'not change with it, and an epoch that was interrupted starts again.')


def _say_options(runner, saved: dict, options: dict) -> None:
    before = saved.get('options')
    if not isinstance(before, Mapping) or before == options:
        return
    changed = [f'{_option(name, before)} before, {_option(name, options)} now'
               for name in {**before, **options} if before.get(name) != options.get(name)]
    runner.logger.warning(f'Other options than before the break: {"; ".join(changed)}.')


def _option(name: str, options: Mapping) -> str:
    if name not in options:
        return f'no --{name.replace("_", "-")}'
    value = options[name]
    return f'--{name.replace("_", "-")}' + ('' if value is True else f' {value}')


# --- the config wins ----------------------------------------------------------------------------

def _take_settings_of_config(runner, checkpoint: dict) -> None:
    checkpoint.pop('param_schedulers', None)
    if 'optimizer' not in checkpoint:
        return
    for name, wrapper in _optimizers(runner).items():
        state = _optimizer_state(checkpoint, name)
        state['param_groups'] = [
            dict(new, params=old['params'])
            for old, new in zip(state['param_groups'], wrapper.optimizer.param_groups, strict=True)]
        fresh = wrapper.state_dict().get('base_param_settings')
        if fresh is not None:
            state['base_param_settings'] = fresh


def _advance(schedules: list, epochs: int, iterations: int, per_epoch: int) -> None:
    """Let schedules go through what was trained, in the order of a training."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # "scheduler.step() before optimizer.step()"
        done = 0
        for iteration in range(1, iterations + 1):
            for schedule in schedules:
                if not schedule.by_epoch:
                    schedule.step()
            if iteration % per_epoch == 0 and done < epochs:
                _step_epoch(schedules)
                done += 1
        for _ in range(epochs - done):
            _step_epoch(schedules)


def _step_epoch(schedules: list) -> None:
    for schedule in schedules:
        if schedule.by_epoch:
            schedule.step()
