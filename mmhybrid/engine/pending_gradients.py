"""Gradients that wait for the next optimizer step, kept in checkpoints.

With ``accumulative_counts`` above 1 a checkpoint may fall between two steps. mmengine saves neither
the gradients summed up so far nor how many there are, so a resumed run took a step with part of
them.
"""
from __future__ import annotations

import logging

import torch
from mmengine.dist import all_gather, all_gather_object, get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict

from .pieces import is_sharded, piece_like, whole_tensor

__all__ = ['KEY', 'collect', 'restore']

KEY = 'pending_gradients'  # in a checkpoint


def collect(runner) -> dict | None:
    """What a checkpoint needs of the gradients; to be called on all ranks.

    Returns:
        None where every iteration is a step. Else ``counts`` (iterations so far) and
        ``accumulative_counts`` of each optimizer, and ``ranks``: the gradients of each process by
        the parameter's name, on the CPU. They differ, because processes only add theirs up at the
        step. The list is empty just after a step, and on all ranks but 0.
    """
    wrappers = _wrappers(runner)
    if all(wrapper._accumulative_counts == 1 for wrapper in wrappers.values()):
        return None
    ranks = []
    if not all(wrapper.should_update() for wrapper in wrappers.values()):
        ranks = _gather({name: parameter.grad.detach()
                         for name, parameter in _parameters(runner).items()
                         if parameter.grad is not None})
    return dict(
        counts={name: wrapper.inner_count for name, wrapper in wrappers.items()},
        accumulative_counts={name: wrapper._accumulative_counts
                             for name, wrapper in wrappers.items()},
        ranks=ranks)


def restore(runner, saved: dict | None) -> None:
    """Set gradients and counts to what :func:`collect` returned, or say why that cannot be."""
    wrappers = _wrappers(runner)
    counts = {name: wrapper._accumulative_counts for name, wrapper in wrappers.items()}
    waiting = not all(wrapper.should_update() for wrapper in wrappers.values())
    if saved is None:
        if waiting:
            _say_lost('this checkpoint was written without them')
        return
    if saved['accumulative_counts'] != counts:
        if saved['ranks']:
            _say_lost(f'accumulative_counts is {_listed(counts)} and was '
                      f'{_listed(saved["accumulative_counts"])}')
        return
    parameters = _parameters(runner)
    divided = any(map(is_sharded, parameters.values()))
    if saved['ranks'] and len(saved['ranks']) != get_world_size() and not divided:
        _say_lost(f'they are those of {len(saved["ranks"])} process(es), and this run has '
                  f'{get_world_size()}')
        return
    for name, wrapper in wrappers.items():
        wrapper._inner_count = saved['counts'][name]
    if not saved['ranks']:
        return
    mine = _mean(saved['ranks']) if divided else saved['ranks'][get_rank()]
    for name, gradient in mine.items():
        parameter = parameters[name]
        parameter.grad = piece_like(gradient.to(parameter.device, parameter.dtype, copy=True),
                                    parameter)
    print_log('The gradients since the last optimizer step are restored, so none is lost.',
              logger='current')


def _say_lost(why: str) -> None:
    print_log(f'The gradients since the last optimizer step are not restored: {why}. The next step '
              'lacks them, so this run will differ slightly from one without a break.',
              logger='current', level=logging.WARNING)


def _listed(counts: dict) -> str:
    return ', '.join(str(count) for count in counts.values())


def _wrappers(runner) -> dict[str, OptimWrapper]:
    """Those that count; others (DeepSpeed's) keep their gradients to themselves."""
    wrapper = runner.optim_wrapper
    wrappers = dict(wrapper.items()) if isinstance(wrapper, OptimWrapperDict) else {'': wrapper}
    return {name: each for name, each in wrappers.items() if isinstance(each, OptimWrapper)}


def _parameters(runner) -> dict[str, torch.nn.Parameter]:
    """The parameters that an optimizer moves, by their name in the model."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    moved = {id(parameter) for wrapper in _wrappers(runner).values()
             for group in wrapper.optimizer.param_groups for parameter in group['params']}
    return {name: parameter for name, parameter in model.named_parameters()
            if id(parameter) in moved}


def _mean(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """What processes that divide the model hold together: they average in every iteration."""
    names = {name for each in ranks for name in each}
    return {name: sum(each[name] for each in ranks if name in each) / len(ranks) for name in names}


def _gather(gradients: dict[str, torch.Tensor]) -> list[dict]:
    """The gradients of all ranks, on rank 0; one tensor at a time, for they can be large."""
    if get_world_size() == 1:
        return [{name: gradient.cpu().clone() for name, gradient in gradients.items()}]
    if any(map(is_sharded, gradients.values())):
        means = {name: whole_tensor(gradient).cpu() for name, gradient in gradients.items()}
        return [means] * get_world_size() if get_rank() == 0 else []
    present = all_gather_object({name: tuple(g.shape) for name, g in gradients.items()})
    shapes = {name: shape for each in present for name, shape in each.items()}
    like = next(iter(gradients.values()), torch.zeros(()))
    ranks = [{} for _ in present]
    for name in sorted(shapes):
        mine = gradients.get(name)
        if mine is None:  # a part of the model that this rank's data did not reach
            mine = like.new_zeros(shapes[name])
        everyones = all_gather(mine.contiguous())
        if get_rank() == 0:
            for rank, gradient in enumerate(everyones):
                if name in present[rank]:
                    ranks[rank][name] = gradient.cpu()
    return ranks if get_rank() == 0 else []
