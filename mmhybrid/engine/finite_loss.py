"""A training whose numbers are no longer finite stops and says where it began."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.dist import all_gather_object, get_rank
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

from ..errors import UserError
from ..registry import HOOKS
from .checkpointing import recorded
from .pieces import is_sharded, local_part
from .random_state import get_random_state, set_random_state
from .stop_signals import any_rank

__all__ = ['FiniteLossHook']


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops a training that cannot become good any more, and keeps its checkpoints.

    - An optimizer step whose gradients are not finite is left out, in any precision, as the loss
      scaling of float16 does: it would ruin all weights, and with them every trace of the cause.
    - ``patience`` iterations in a row with a loss that is not finite stop the training. A finite
      loss whose gradients overflow does not count; it is usual while float16 finds its scale.
    - So do ``max_skipped`` steps in a row that were left out, and a dynamic loss scale below 1.
    - A checkpoint whose weights are not finite is never written, whatever ``stop`` says.

    The message names the first module and tensor that was not finite: the offending batch goes
    through the model once more, with the same random numbers, and leaves no trace.

    Args:
        patience: iterations in a row. Default 3.
        max_skipped: steps in a row. Default 20.
        stop: False only warns.
    """

    priority = 'LOW'  # before CheckpointHook; before_train_iter after all that change the model

    def __init__(self, patience: int = 3, max_skipped: int = 20, stop: bool = True):
        for name, value in (('patience', patience), ('max_skipped', max_skipped)):
            if type(value) is not int or value < 1:
                raise ValueError(f'{name} must be a positive integer, got {value!r}.')
        self.patience, self.max_skipped, self.stop = patience, max_skipped, stop
        self._bad = self._skipped = 0  # in a row
        self._stepped: set[int] = set()  # optimizers, in this iteration
        self._left_out: set[int] = set()
        self._counts: dict[str, int] = {}
        self._scales: dict[str, float] = {}
        self._exempt: set[str] = set()
        self._batch = self._random = None
        self._handles = []

    # --- watching -----------------------------------------------------------------------------

    def before_train(self, runner) -> None:
        """Watch the optimizers, and remember what is not finite on purpose (masks)."""
        model = _bare(runner.model)
        self._exempt = {name for name, _ in _not_finite(model.state_dict())}
        for wrapper in _wrappers(runner).values():
            scaled = _scaler(wrapper) is not None
            self._handles += [
                wrapper.optimizer.register_step_post_hook(self._count),
                *([] if scaled else [wrapper.optimizer.register_step_pre_hook(self._leave_out)])]
        if isinstance(getattr(model, 'data_preprocessor', None), nn.Module):
            self._handles.append(model.data_preprocessor.register_forward_hook(self._keep))
        self._scales = _dynamic_scales(runner)

    def after_train(self, runner) -> None:
        """Let go of the optimizers and the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Remember the random numbers of this iteration."""
        self._random, self._batch = get_random_state(), None
        self._stepped, self._left_out = set(), set()
        self._counts = {name: wrapper.inner_count for name, wrapper in _wrappers(runner).items()}

    def _keep(self, module, given, batch) -> None:
        if module.training:
            self._batch = batch

    def _count(self, optimizer, args, kwargs) -> None:
        self._stepped.add(id(optimizer))

    def _leave_out(self, optimizer, args, kwargs) -> None:
        """Take away gradients that are not finite: without any, a step changes nothing."""
        parameters = [p for group in optimizer.param_groups for p in group['params']
                      if p.grad is not None and p.grad.layout == torch.strided]
        if any(is_sharded(p.grad) for p in parameters):
            # A part may be empty, which has no largest value.
            parts = [part for p in parameters if (part := local_part(p.grad)).numel()]
            norm = nn.utils.get_total_norm(parts, norm_type=float('inf'))
            broken = any_rank(not bool(torch.isfinite(norm)))
        else:
            # With this limit the gradients stay what they are; the function is fast on a GPU.
            norm = nn.utils.clip_grad_norm_(parameters, float('inf'), norm_type=float('inf'))
            broken = not bool(torch.isfinite(norm))
        if broken:
            self._left_out.add(id(optimizer))
            for parameter in parameters:
                parameter.grad = None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Count, and stop where there is no hope."""
        outputs = {name: value for name, value in (outputs or {}).items() if 'loss' in name}
        # mmengine has read every loss back for its log already, so this waits for nothing. One that
        # is not finite in one process reaches all of them with the gradients.
        total = [outputs['loss']] if 'loss' in outputs else outputs.values()
        # A gradient need not, where each process holds a part of the model (FSDP).
        bad, skipped = any_rank(not all(map(_finite, total)),
                                bool(self._left_out) or self._scaler_skipped(runner))
        self._bad = self._bad + 1 if bad else 0
        if skipped or self._stepped:  # else gradients are being accumulated
            self._skipped = self._skipped + 1 if skipped else 0
        reason = self._reason(runner, bad)
        if reason and self.stop:
            self._end(runner, reason, outputs, data_batch)
        if self._bad == 1 or self._left_out and self._skipped == 1:
            what = 'loss is' if self._bad else 'gradients are'
            print_log(f'The {what} not finite in iteration {runner.iter + 1} ({_shown(outputs)} in '
                      f'process {get_rank()}); such a step is left out.{_images(data_batch)}',
                      logger='current', level=logging.WARNING)
        self._batch = None

    def _scaler_skipped(self, runner) -> bool:
        """Whether the loss scaling of float16 left out a step that was due."""
        return any(_scaler(wrapper) is not None and wrapper.inner_count != self._counts[name]
                   and wrapper.should_update() and id(wrapper.optimizer) not in self._stepped
                   for name, wrapper in _wrappers(runner).items())

    def _reason(self, runner, bad: bool) -> str | None:
        """Why there is no hope, if so; the same on all ranks."""
        at = runner.iter + 1
        if self._bad >= self.patience:
            return f'The loss was not finite in {self._bad} iterations in a row (up to {at})'
        if self._skipped >= self.max_skipped:
            return (f'The gradients were not finite in {self._skipped} steps in a row (up to '
                    f'iteration {at})')
        for name, scale in _dynamic_scales(runner).items():
            if scale < 1 and scale < self._scales.get(name, scale):
                return f'The loss scale of float16 fell to {scale:g} (iteration {at})'
        if bad and any_rank(bool(self._broken(_bare(runner.model).state_dict()))):
            return (f'The loss of iteration {at} was not finite and spoilt running statistics, '
                    'which no later batch mends')
        return None

    def _broken(self, state: dict) -> list[tuple[str, torch.Tensor]]:
        """Tensors that are no longer finite."""
        return [(name, tensor) for name, tensor in _not_finite(state)
                if name.removeprefix('module.') not in self._exempt]

    # --- saving -------------------------------------------------------------------------------

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Refuse weights that are not finite, before older checkpoints have to go."""
        for key in ('state_dict', 'ema_state_dict'):
            broken = self._broken(checkpoint.get(key) or {})
            if broken:
                averaged = ' of the averaged model (EMA)' if key != 'state_dict' else ''
                raise UserError(
                    f'The weights are not finite after iteration {checkpoint["meta"]["iter"]}: '
                    f'{_first(broken)}{averaged}. This checkpoint is not written.\n'
                    + _advice(runner))

    # --- ending -------------------------------------------------------------------------------

    def _end(self, runner, reason: str, losses: dict, data_batch) -> None:
        """Find the first tensor that is not finite in any process, and raise."""
        try:
            found = self._find(runner)
        except torch.cuda.OutOfMemoryError:
            found = None  # the repetition keeps a little more than the iteration did
        self._batch = None
        text = (f'{reason}: {_shown(losses)}.\nNot finite first: '
                f'{found or "nothing that could be found again"}.{_images(data_batch)}')
        reports = all_gather_object((found is not None, text))
        if get_rank():
            raise UserError('Stopped together with process 0, which says why.')
        first = next((rank for rank, (known, _) in enumerate(reports) if known), 0)
        where = f'In process {first}: ' if first else ''
        raise UserError(f'{where}{reports[first][1]}\n{_advice(runner)}\nTo go on regardless: '
                        '--cfg-options default_hooks.finite_loss.stop=False')

    def _find(self, runner) -> str | None:
        """Name the first tensor of this iteration that is not finite."""
        model = _bare(runner.model)
        found = None
        broken = self._broken(dict(model.named_parameters()))
        if broken:
            found = f'parameter {_first(broken)}'
        elif self._batch is not None:
            wrong = next(_tensors_not_finite(self._batch), None)
            found = wrong and f'the batch itself ({wrong})'
        # From here on processes depend on each other (SyncBN, shared losses): all or none.
        wrapper = next(iter(_wrappers(runner).values()), None)
        if (any_rank(found is not None) or self._batch is None or wrapper is None
                or not hasattr(model, '_run_forward')):
            return found
        with _no_trace(model, self._random), torch.no_grad():
            found, _ = _run(model, wrapper, self._batch)
        if any_rank(found is not None):
            return found
        with _no_trace(model, self._random):
            found, losses = _run(model, wrapper, self._batch)
            return found or _gradient(model, losses, _scaler(wrapper))


def _run(model: nn.Module, wrapper, batch) -> tuple[str | None, list]:
    """Run the forward pass; returns the first output that is not finite, and the losses."""
    found: list[str] = []
    handles = []

    def look(name):
        def hook(module, given, output):
            if found:
                return
            wrong = next(_tensors_not_finite(output), None)
            if wrong is not None:
                fed = next(_tensors_not_finite(given), None)
                found.append(
                    f'the output of {name or "the model"} ({type(module).__name__}), {wrong}; its '
                    + ('input was not finite either' if fed else 'input was finite'))
        return hook

    for name, module in model.named_modules():
        if module is not model:
            handles.append(module.register_forward_hook(look(name)))
    losses = {}
    try:
        with wrapper.optim_context(model):
            losses = model._run_forward(batch, mode='loss')
    except (ValueError, AssertionError, IndexError) as error:
        if not found:  # a part of the model that does not take such numbers
            found.append(f'where the model raised {type(error).__name__}: {error}')
    finally:
        for handle in handles:
            handle.remove()
    losses = losses if isinstance(losses, dict) else {}
    if not found:
        found += [f'{name}, which the model computes from finite outputs of its parts'
                  for name, value in losses.items() if next(_tensors_not_finite(value), None)]
    tensors = [t for name, value in losses.items() if 'loss' in name
               for t in (value if isinstance(value, (list, tuple)) else [value])]
    return (found[0] if found else None), tensors


def _gradient(model: nn.Module, losses: list, scaler) -> str | None:
    """Name the parameter nearest to the loss whose gradient is not finite."""
    total = sum(loss.mean() for loss in losses)
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        return None
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scale = scaler.get_scale() if scaler is not None else 1.0
    gradients = torch.autograd.grad(total * scale, [p for _, p in named], allow_unused=True)
    for (name, _), gradient in reversed(list(zip(named, gradients, strict=True))):
        if gradient is not None and not _finite(gradient):
            return f'the gradient of {name}, {_counted(gradient)}'
    return None


@contextmanager
def _no_trace(model: nn.Module, random: dict) -> Iterator[None]:
    """Repeat an iteration's random numbers; put them and the running statistics back."""
    now = get_random_state()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    set_random_state(random)
    try:
        yield
    finally:
        set_random_state(now)
        for buffer, before in buffers:
            buffer.copy_(before)


# --- looking --------------------------------------------------------------------------------------

def _finite(value) -> bool:
    return bool(torch.isfinite(torch.as_tensor(value).detach()).all())


def _shown(losses: dict) -> str:
    return ', '.join(f'{name} {float(torch.as_tensor(value).detach()):g}'
                     for name, value in losses.items())


def _counted(tensor: torch.Tensor) -> str:
    return f'{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values'


def _not_finite(state: dict) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not _finite(tensor):
            yield name, tensor


def _first(broken: list[tuple[str, torch.Tensor]]) -> str:
    name, tensor = broken[0]
    more = f' and {len(broken) - 1} more tensors' if len(broken) > 1 else ''
    return f'{name} ({_counted(tensor)}){more}'


def _tensors_not_finite(value, name: str = '') -> Iterator[str]:
    """Describe the tensors that are not finite in lists, dicts and data samples."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not _finite(value):
            yield f'{name + ": " if name else ""}{_counted(value)}'
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_not_finite(item, f'{name}.{key}' if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors_not_finite(item, f'{name}[{index}]' if name else '')
    elif hasattr(value, 'all_items'):  # mmengine's data elements
        yield from _tensors_not_finite(dict(value.all_items()), name)
    elif isinstance(getattr(value, 'tensor', None), torch.Tensor):  # mmdet's boxes
        yield from _tensors_not_finite(value.tensor, name)


def _images(data_batch) -> str:
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    paths = [getattr(sample, 'img_path', None) for sample in samples or []]
    paths = [path for path in paths if path]
    return f' Images of this batch: {", ".join(paths)}' if paths else ''


# --- asking the runner ----------------------------------------------------------------------------

def _bare(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _wrappers(runner) -> dict:
    """Wrappers whose steps can be watched; others (DeepSpeed's) look after theirs."""
    wrapper = runner.optim_wrapper
    wrappers = dict(wrapper.items()) if isinstance(wrapper, OptimWrapperDict) else {'': wrapper}
    return {name: each for name, each in wrappers.items() if isinstance(each, OptimWrapper)}


def _scaler(wrapper):
    """The scaler of a float16 training, if the wrapper has one that works."""
    scaler = getattr(wrapper, 'loss_scaler', None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _dynamic_scales(runner) -> dict[str, float]:
    return {name: float(_scaler(wrapper).get_scale())
            for name, wrapper in _wrappers(runner).items()
            if _scaler(wrapper) is not None
            and getattr(wrapper, '_scale_update_param', None) is None}


def _advice(runner) -> str:
    half = any(_scaler(wrapper) is not None for wrapper in _wrappers(runner).values())
    last = recorded(runner.work_dir)
    return ((f'The last good checkpoint is {last}.' if last else 'There is no checkpoint yet.')
            + '\nWhat to try: a lower learning rate (--cfg-options optim_wrapper.optimizer.lr=X), '
            'a warm-up (param_scheduler), clipping (optim_wrapper.clip_grad.max_norm=1.0), '
            + ('bfloat16 in place of float16 (optim_wrapper.dtype=bfloat16), ' if half else '')
            + 'and a look at the annotations of the images.')
