"""``--cuda-graphs`` and ``--compile``: the backbone of a run, without waiting for Python.

Both replace the forward function of ``model.backbone`` once everything else has happened to the
model (weights, distribution, copies for averaged weights), and give it back at the end of the run.
Parameters keep their names, so checkpoints are those of any other run.
"""
from __future__ import annotations

import importlib

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from ..errors import UserError
from ..registry import HOOKS
from .graphs import CudaGraphs, Replaced, check_numbers, missing, use_cuda_graphs

__all__ = ['CompileHook', 'CudaGraphsHook', 'apply_faster']


class _BackboneHook(Hook):
    """Does something to the backbone for as long as a run trains or evaluates."""

    priority = 'VERY_LOW'
    _done = None

    def before_train(self, runner) -> None:
        """Replace the forward function, unless that is done already."""
        if self._done is None:
            self._done = self._begin(_backbone(runner.model))

    before_val = before_test = before_train

    def after_run(self, runner) -> None:
        """Put it back."""
        if self._done is not None:
            self._done.remove()
            self._done = None


def _backbone(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or not hasattr(model, 'backbone') and hasattr(model, 'module'):
        model = model.module
    if not isinstance(getattr(model, 'backbone', None), nn.Module):
        raise UserError(f'model ({type(model).__name__}) has no backbone, which is what '
                        '--cuda-graphs and --compile make faster. Leave them out.')
    return model.backbone


@HOOKS.register_module()
class CudaGraphsHook(_BackboneHook):
    """Records CUDA graphs of the backbone and replays them; see :mod:`mmhybrid.engine.graphs`.

    The tools add it for ``--cuda-graphs`` or ``cuda_graphs = dict(...)`` with these settings.

    Args:
        divisor: sides of training images become multiples of it (smaller ones of a quarter of
            their size), None pads nothing. The heads see their usual sizes.
        test_divisor: the same for validation and tests.
        max_graphs: that are kept at a time.

    Raises:
        TypeError, ValueError: for a setting that makes no sense.
        UserError: when a run begins, without a GPU, or if the backbone synchronises BatchNorm
            between processes, which record at different times.
    """

    def __init__(self, divisor: int | None = 128, test_divisor: int | None = None,
                 max_graphs: int = 64):
        check_numbers(divisor, test_divisor, max_graphs)
        self._settings = dict(divisor=divisor, test_divisor=test_divisor, max_graphs=max_graphs)

    def _begin(self, backbone: nn.Module) -> CudaGraphs:
        _check_gpu()
        names = [name for name, module in backbone.named_modules()
                 if 'SyncBatchNorm' in type(module).__name__]
        if names and get_world_size() > 1:
            raise UserError(
                f'model.backbone.{names[0]} synchronises BatchNorm between processes, which record '
                'CUDA graphs at different times and would wait for each other for ever. Use BN in '
                "the backbone (sync_bn=None, norm_cfg.type='BN'), or leave --cuda-graphs out.")
        return use_cuda_graphs(backbone, **self._settings)

    def after_train_epoch(self, runner) -> None:
        """Say what was replayed."""
        runner.logger.info(self._done.report())

    def after_run(self, runner) -> None:
        """Say it for the whole run, and put the forward function back."""
        if self._done is not None:
            runner.logger.info(self._done.report())
        super().after_run(runner)


def _check_gpu() -> None:
    reason = missing()
    if reason is not None:
        raise UserError(f'{reason}: leave --cuda-graphs (cuda_graphs of the config) out.')


@HOOKS.register_module()
class CompileHook(_BackboneHook):
    """Compiles the backbone with ``torch.compile``, for images of any size at once.

    The tools add it for ``--compile`` or ``compile_backbone = dict(...)`` with these settings.
    (mmengine's own setting ``compile`` compiles whole training steps.)

    Args:
        backend: of ``torch.compile``.
        mode: of ``torch.compile``; None for its default.
        dynamic: whether height and width of images are variables of the compiled code. False
            compiles for each size, and for so few that PyTorch's limit allows.

    Raises:
        TypeError, ValueError: for a setting that makes no sense.
    """

    def __init__(self, backend: str = 'inductor', mode: str | None = None, dynamic: bool = True):
        if not isinstance(backend, str) or backend not in torch.compiler.list_backends(None):
            raise ValueError(f'got backend={backend!r}, expected one of torch.compile: '
                             f'{", ".join(torch.compiler.list_backends(None))}')
        modes = importlib.import_module('torch._inductor').list_mode_options()
        if mode is not None and mode not in modes:
            raise ValueError(f'got mode={mode!r}, expected None or one of {", ".join(modes)}')
        if not isinstance(dynamic, bool):
            raise TypeError(f'got dynamic={dynamic!r}, expected True or False')
        self._settings = dict(backend=backend, mode=mode)
        self._dynamic = dynamic

    def _begin(self, backbone: nn.Module) -> Replaced:
        compiled = torch.compile(backbone.forward, dynamic=None if self._dynamic else False,
                                 **self._settings)
        return Replaced(backbone, _any_size(compiled) if self._dynamic else compiled)


def _any_size(compiled):
    def forward(x: Tensor):
        for axis in range(2, x.dim()):  # counted from the front, or it has no effect
            torch._dynamo.maybe_mark_dynamic(x, axis)
        return compiled(x)

    return forward


# --- settings -------------------------------------------------------------------------------------

def apply_faster(cfg: Config, cuda_graphs: bool, compiled: bool) -> None:
    """Add the hooks that ``--cuda-graphs``, ``--compile`` or the settings of a config ask for.

    Raises:
        UserError: for both at once, settings that make no sense, or no GPU for graphs.
    """
    wanted = {}
    for key, option, given, hook in (
            ('cuda_graphs', '--cuda-graphs', cuda_graphs, CudaGraphsHook),
            ('compile_backbone', '--compile', compiled, CompileHook)):
        settings = cfg.get(key)
        if settings in (None, False) and not given:
            continue
        settings = {} if settings in (None, False, True) else settings
        if not isinstance(settings, dict):
            raise UserError(f'{key} must be a dict of settings, True or None, got {settings!r}.')
        try:
            hook(**settings)
        except (TypeError, ValueError) as error:
            raise UserError(f'{key}: {error}') from error
        wanted[f'{option} ({key})'] = dict(type=f'mmhybrid.{hook.__name__}', **settings)
    if 'mmhybrid.CudaGraphsHook' in [hook['type'] for hook in wanted.values()]:
        _check_gpu()
    if cfg.get('compile') and wanted:
        wanted["mmengine's setting compile"] = None
    if len(wanted) > 1:
        raise UserError(f'{" and ".join(wanted)} do not go together. Choose one of them.')
    kinds = {str(hook['type']).rpartition('.')[2] for hook in cfg.get('custom_hooks') or []
             if isinstance(hook, dict)}
    cfg.custom_hooks = list(cfg.get('custom_hooks') or []) + [
        hook for hook in wanted.values() if hook['type'].rpartition('.')[2] not in kinds]
