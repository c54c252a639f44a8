"""``--fsdp``: processes divide weights, gradients and optimizer states among themselves.

PyTorch's fully sharded data parallelism (``fully_shard``): every process keeps a part of each
parameter, and what belongs to it of gradients and of the optimizer's states. A unit of the model
is put together when its turn comes and taken apart after it; the numbers are those of
DistributedDataParallel.
"""
from __future__ import annotations

import glob
import importlib
import os
import os.path as osp
import shutil
import time
from collections.abc import Iterator

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import all_gather_object, barrier, broadcast, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import convert_sync_batchnorm
from mmengine.optim import OptimWrapperDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmhybrid.layers import ConvBlock
from mmhybrid.weights import shards

from ..errors import UserError
from ..models.backbones.mambavision import HybridBlock
from ..models.backbones.plain import MixerBlock
from ..models.backbones.vmamba import VSSBlock
from .finite_loss import FiniteLossHook
from .pieces import is_sharded, piece_like, whole_tensor

__all__ = ['ShardedRunner', 'apply_fsdp', 'units']

#: Parts of blocks that hold nearly all weights and that nothing reads but their own forward
#: function; '' is the block. What networks read for many blocks at once stays with the rest.
PARTS = {
    ConvBlock: ('',),
    HybridBlock: ('mixer', 'mlp'),
    MixerBlock: ('mixer.in_proj',),
    VSSBlock: ('op.in_proj', 'op.out_proj', 'mlp'),
}
CHECKPOINTS = ('full', 'sharded')
#: Optimizers that treat every number for itself, so that parts of tensors are nothing new to them.
OPTIMIZERS = ('Adagrad', 'Adam', 'AdamW', 'Adamax', 'NAdam', 'RAdam', 'RMSprop', 'SGD')
WRAPPERS = ('AmpOptimWrapper', 'OptimWrapper')


# --- settings -------------------------------------------------------------------------------------

def apply_fsdp(cfg: Config, option: str | None, launcher: str) -> None:
    """Let the runner divide the model if ``--fsdp`` or ``fsdp`` of the config asks for it.

    Args:
        cfg: the config, changed in place.
        option: what ``--fsdp`` gave: 'full' or 'sharded' checkpoints; None without it.
        launcher: of the run.

    Raises:
        UserError: for settings that make no sense, or that do not go together with sharding.
    """
    setting = cfg.get('fsdp')
    if setting in (None, False) and option is None:
        return
    setting = {} if setting in (None, False, True) else setting
    if not isinstance(setting, dict) or set(setting) - {'checkpoints'}:
        raise UserError(f"fsdp must be dict(checkpoints='full'), dict(checkpoints='sharded'), True "
                        f'or None, got {setting!r}.')
    kind = option or setting.get('checkpoints', 'full')
    if kind not in CHECKPOINTS:
        raise UserError(f'fsdp.checkpoints is {kind!r}; expected full or sharded.')
    if launcher == 'none':
        raise UserError('--fsdp divides the model among several processes, and this is one. Start '
                        'them with: bash tools/dist_train.sh CONFIG PROCESSES --fsdp')
    if not hasattr(getattr(_fsdp(), 'FSDPModule', None), 'set_reshard_after_forward'):
        raise UserError('--fsdp needs torch.distributed.fsdp.fully_shard as PyTorch 2.11 has it, '
                        f'and {torch.__version__} is installed. Upgrade PyTorch, or leave --fsdp '
                        'out.')
    reason = next(_against(cfg), None)
    if reason is not None:
        raise UserError(f'--fsdp (fsdp of the config) and {reason}')
    cfg.fsdp = dict(checkpoints=kind)
    cfg.runner_type = 'ShardedRunner'


def _against(cfg: Config) -> Iterator[str]:
    """What does not go together with sharding."""
    apart = 'do not go together. Leave one of them out.'
    for key, name in (('cuda_graphs', '--cuda-graphs (cuda_graphs)'),
                      ('compile_backbone', '--compile (compile_backbone)'),
                      ('compile', "mmengine's setting compile"),
                      ('efficient_conv_bn_eval', 'efficient_conv_bn_eval'),
                      ('model_wrapper_cfg', 'model_wrapper_cfg (the wrapper would be another one)'),
                      ('find_unused_parameters', 'find_unused_parameters (of DDP)')):
        if cfg.get(key):
            yield f'{name} {apart}'
    if cfg.get('runner_type', 'ShardedRunner') != 'ShardedRunner':
        yield f'runner_type={cfg.runner_type} {apart}'
    for hook in cfg.get('custom_hooks') or ():
        kind = _name(hook.get('type') if isinstance(hook, dict) else type(hook))
        if kind in ('CompileHook', 'CudaGraphsHook', 'DirectionSearchHook') or 'EMA' in kind:
            yield f'{kind} {apart}'
    if (cfg.model.get('backbone') or {}).get('lora'):
        yield f'--lora (model.backbone.lora) {apart}'
    yield from _against_wrapper(cfg.optim_wrapper)


def _against_wrapper(wrapper: dict) -> Iterator[str]:
    kind = _name(wrapper.get('type', 'OptimWrapper'))
    if kind not in WRAPPERS:
        yield (f'optim_wrapper.type={kind} do not go together. Use {" or ".join(WRAPPERS)}, or '
               'leave --fsdp out.')
    optimizer = _name((wrapper.get('optimizer') or {}).get('type', 'AdamW'))
    if optimizer not in OPTIMIZERS:
        yield (f'optim_wrapper.optimizer.type={optimizer} do not go together: it may need tensors '
               f'as a whole. Use one of {", ".join(OPTIMIZERS)}, or leave --fsdp out.')
    clip = wrapper.get('clip_grad') or {}
    if float(clip.get('norm_type', 2)) == float('inf'):
        yield ('optim_wrapper.clip_grad.norm_type=inf do not go together: a part may be empty, '
               'which has no largest value. Use norm_type=2, or leave --fsdp out.')


def _fsdp():
    """The module, which takes long to import and is of use to few."""
    return importlib.import_module('torch.distributed.fsdp')


def _name(kind: str | type) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition('.')[2]


# --- parts of a model -----------------------------------------------------------------------------

def units(model: nn.Module) -> list[nn.Module]:
    """Modules that are put together one at a time; all else of a model stays together.

    Those of our blocks (:data:`PARTS`), or the backbone as one where it is of another library.
    """
    backbone = getattr(model, 'backbone', model)
    found = []
    for block in backbone.modules():
        names = next((names for kind, names in PARTS.items() if isinstance(block, kind)), ())
        for name in names:
            part = block
            for step in filter(None, name.split('.')):
                part = getattr(part, step, None)
            if isinstance(part, nn.Module):
                found.append(part)
    return found or ([] if backbone is model else [backbone])


def _shard(model: nn.Module, device: str) -> None:
    scalars = [name for name, parameter in model.named_parameters() if not parameter.dim()]
    if scalars:
        raise UserError(f'--fsdp cannot divide {scalars[0]}, a parameter that is one number '
                        'without an axis. Leave --fsdp out.')
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    marks = {name: vars(parameter) for name, parameter in model.named_parameters()}
    mesh = torch.distributed.init_device_mesh(device, (get_world_size(),))
    for unit in [*units(model), model]:
        _fsdp().fully_shard(unit, mesh=mesh)
    for name, parameter in model.named_parameters():
        vars(parameter).update(marks[name])  # such as _no_weight_decay
    for module in model.modules():
        module.register_load_state_dict_pre_hook(_take_pieces)


def _take_pieces(module: nn.Module, state: dict, prefix: str, *_) -> None:
    """Before a module loads: of whole tensors what this process holds."""
    for name, parameter in module._parameters.items():
        key = prefix + name
        if parameter is not None and isinstance(state.get(key), Tensor):
            state[key] = piece_like(state[key], parameter)


def _take_states(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Before an optimizer loads: the same for what it remembers of parameters."""
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    saved = [i for group in state['param_groups'] for i in group['params']]
    pieces = {
        index: {key: piece_like(value, parameter) if isinstance(value, Tensor) else value
                for key, value in state['state'][index].items()}
        for index, parameter in zip(saved, parameters, strict=True) if index in state['state']}
    return dict(state, state=pieces)


# --- the runner -----------------------------------------------------------------------------------

@RUNNERS.register_module()
class ShardedRunner(Runner):
    """mmengine's runner with a model that the processes divide among themselves.

    The model has its initial weights before it is divided. Checkpoints hold whole tensors and are
    those of any other run (``fsdp = dict(checkpoints='full')``), or are folders in which each
    process writes its own part ('sharded'); both resume with any number of processes.
    """

    saves_together = True  # all processes have to call save_checkpoint
    _to_save: dict | None = None

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Divide the model."""
        if isinstance(model, _fsdp().FSDPModule):
            return model
        if hasattr(model, 'init_weights'):
            model.init_weights()
        model = model.to(get_device())  # a GPU holds all of it for this moment
        if self.cfg.get('sync_bn') is not None:
            model = convert_sync_batchnorm(model, self.cfg.sync_bn)
        for tensor in model.state_dict().values():
            broadcast(tensor)
        _shard(model, torch.device(get_device()).type)
        return model

    def register_hooks(self, default_hooks=None, custom_hooks=None) -> None:
        """As in any run, and one that lets validations run without waiting for each other."""
        super().register_hooks(default_hooks, custom_hooks)
        self.register_hook(_TogetherWhileValidating())

    def _init_model_weights(self) -> None:
        """Done before the model was divided."""

    def build_optim_wrapper(self, optim_wrapper):
        """Build it; its optimizers take their parts of whole states."""
        built = super().build_optim_wrapper(optim_wrapper)
        for each in built.values() if isinstance(built, OptimWrapperDict) else [built]:
            if not getattr(each.optimizer, 'takes_pieces', False):
                each.optimizer.takes_pieces = True
                each.optimizer.register_load_state_dict_pre_hook(_take_states)
        return built

    def resume(self, filename, resume_optimizer=True, resume_param_scheduler=True,
               map_location='default') -> None:
        """Resume; whole tensors wait in main memory until they are divided."""
        super().resume(filename, resume_optimizer, resume_param_scheduler,
                       'cpu' if map_location == 'default' else map_location)

    def save_checkpoint(self, out_dir, filename, file_client_args=None, save_optimizer=True,
                        save_param_scheduler=True, meta=None, by_epoch=True,
                        backend_args=None) -> None:
        """Save; all processes have to call it together."""
        state = dict(state_dict=self.model.state_dict())
        if save_optimizer:
            state['optimizer'] = self.optim_wrapper.state_dict()
        options = dict(save_optimizer=save_optimizer, save_param_scheduler=save_param_scheduler,
                       meta=meta, by_epoch=by_epoch)
        if self.cfg.fsdp.checkpoints == 'sharded':
            self._check_finite(state['state_dict'])
            with _Folder(osp.join(out_dir, filename)) as folder:
                self._to_save = dict(_without_pieces(state), pieces=folder.write(state))
                super().save_checkpoint(folder.part, shards.REST, **options)
        else:
            self._to_save = _gathered(state)
            super().save_checkpoint(out_dir, filename, file_client_args=file_client_args,
                                    backend_args=backend_args, **options)
        self._to_save = None

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call hooks; those of a checkpoint get the tensors of all processes."""
        if fn_name == 'before_save_checkpoint':
            kwargs['checkpoint'].update(self._to_save)
        super().call_hook(fn_name, **kwargs)

    def _check_finite(self, weights: dict) -> None:
        """What FiniteLossHook does for checkpoints whose tensors are whole."""
        if not any(isinstance(hook, FiniteLossHook) for hook in self._hooks):
            return
        broken = [name for name, tensor in weights.items() if is_sharded(tensor)
                  and not bool(torch.isfinite(tensor.to_local()).all())]
        everyones = all_gather_object(broken)
        found = next((names[0] for names in everyones if names), None)
        if found is not None:
            raise UserError(f'The weights are not finite after iteration {self.iter}: {found}. '
                            'This checkpoint is not written.')


class _TogetherWhileValidating(Hook):
    """Keeps units together from the first batch of a validation to its end.

    Processes may have different numbers of batches, so later ones must not wait for anybody.
    """

    def before_val(self, runner) -> None:
        """From now on the forward function leaves units together."""
        runner.model.set_reshard_after_forward(False)

    def after_val(self, runner) -> None:
        """Take them apart; in training they are so again after each use."""
        for module in runner.model.modules():
            if isinstance(module, _fsdp().FSDPModule):
                module.reshard()
                module.set_reshard_after_forward(module is not runner.model, recurse=False)


# --- checkpoints ----------------------------------------------------------------------------------

def _gathered(tree):
    """A tree of states with whole tensors, in main memory, in process 0; others help."""
    if isinstance(tree, dict):
        return {key: _gathered(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_gathered(value) for value in tree]
    if not isinstance(tree, Tensor):
        return tree
    whole = whole_tensor(tree)
    return whole.cpu() if get_rank() == 0 else None


def _without_pieces(tree: dict) -> dict:
    return {key: _without_pieces(value) if isinstance(value, dict) else
            value.cpu() if isinstance(value, Tensor) else value
            for key, value in tree.items() if not is_sharded(value)}


def _pieces(tree: dict, keys: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _pieces(value, (*keys, key))
        elif is_sharded(value):
            yield (*keys, key), value


class _Folder:
    """A folder of pieces that appears under its name when it is complete."""

    def __init__(self, path: str):
        self.path, self.part = path, f'{path}.part'
        self.main = get_rank() == 0

    def __enter__(self) -> _Folder:
        if self.main:
            for left in glob.glob(osp.join(glob.escape(osp.dirname(self.path)), '*.pth.part')):
                shutil.rmtree(left)  # of a training that was killed
            os.makedirs(self.part)
        barrier()
        return self

    def write(self, state: dict) -> dict:
        """Write what this process holds; returns what the others beside it are."""
        run = all_gather_object(time.time_ns())[0]
        held = list(_pieces(state))
        name = shards.piece_name(get_rank(), get_world_size())
        content = dict(run=run, pieces=[
            (keys, tensor.to_local().detach().cpu()) for keys, tensor in held])
        problem = None
        try:
            torch.save(content, osp.join(self.part, name))
        except (OSError, RuntimeError) as error:  # torch turns a full disk into the latter
            problem = f'process {get_rank()} cannot write {name}: {error}'
        problem = next(filter(None, all_gather_object(problem)), None)
        if problem is not None:
            raise UserError(f'{self.path} is not written: {problem}. Every process has to reach '
                            'the work directory; --fsdp full lets process 0 write alone.')
        return dict(run=run, ranks=get_world_size(),
                    shapes=[(keys, tuple(tensor.shape)) for keys, tensor in held])

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and self.main:
            old = f'{self.path}.old'
            if osp.lexists(self.path):
                os.replace(self.path, old)
            os.replace(self.part, self.path)
            shutil.rmtree(old, ignore_errors=True)
