"""Mixed precision that a CPU can read too."""
from __future__ import annotations

import torch
from mmengine.device import (
    is_cuda_available,
    is_mlu_available,
    is_musa_available,
    is_npu_available,
)
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper as _AmpOptimWrapper
from mmengine.optim import OptimWrapper

from ..registry import OPTIM_WRAPPERS

__all__ = ['AmpOptimWrapper', 'has_accelerator']

DTYPES = ('float16', 'bfloat16')


def has_accelerator() -> bool:
    """Whether mmengine would train on something other than the CPU with mixed precision."""
    return (is_cuda_available() or is_npu_available() or is_mlu_available()
            or is_musa_available())


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(_AmpOptimWrapper):
    """Mixed precision on an accelerator, float32 with one log line on a CPU.

    mmengine's class of this name asserts an accelerator, so a config with it cannot even start
    on a CPU.

    Args:
        optimizer: the optimizer.
        dtype: "float16" (with loss scaling), "bfloat16" (without: it has float32's range), or
            None for float32 everywhere, which switches the mixed precision of a base config off.
        loss_scale: for float16, "dynamic", a float for a constant scale, or a dict of arguments
            of ``torch.amp.GradScaler``. Without effect in bfloat16 and on a CPU.
        use_fsdp: use the gradient scaler of fully sharded data parallel training.
        accumulative_counts: iterations per optimizer step.
        clip_grad: arguments of ``torch.nn.utils.clip_grad_norm_``.
    """

    def __init__(self, optimizer, dtype='float16', loss_scale='dynamic', use_fsdp=False,
                 accumulative_counts=1, clip_grad=None):
        name = str(dtype).removeprefix('torch.')
        if dtype is not None and name not in DTYPES:
            raise ValueError(f'dtype must be one of {", ".join(DTYPES)}, or None for float32, '
                             f'got {dtype!r}.')
        if isinstance(loss_scale, str) and loss_scale != 'dynamic':
            raise ValueError(f'loss_scale must be "dynamic", a float or a dict, got {loss_scale!r}')
        common = dict(optimizer=optimizer, accumulative_counts=accumulative_counts,
                      clip_grad=clip_grad)
        self.active = dtype is not None and has_accelerator()
        if self.active:
            if name == 'bfloat16':
                loss_scale = dict(enabled=False)
            elif isinstance(loss_scale, int):
                loss_scale = float(loss_scale)
            super().__init__(loss_scale=loss_scale, dtype=name, use_fsdp=use_fsdp, **common)
        else:
            OptimWrapper.__init__(self, **common)
            self.loss_scaler, self.cast_dtype = None, None
            if dtype is not None:
                print_log(
                    f'Mixed precision ({name}) needs an accelerator; this run is on the CPU '
                    'and trains in float32.', logger='current')

    def backward(self, loss: torch.Tensor, **kwargs) -> None:
        """Back-propagate ``loss``, scaled where mixed precision is active."""
        if self.active:
            super().backward(loss, **kwargs)
        else:
            OptimWrapper.backward(self, loss, **kwargs)

    def step(self, **kwargs) -> None:
        """Update the parameters; a step with infinite gradients is left out in float16."""
        if self.active:
            super().step(**kwargs)
        else:
            OptimWrapper.step(self, **kwargs)

    def state_dict(self) -> dict:
        """State of the optimizer, and of the loss scale where there is one."""
        return super().state_dict() if self.active else OptimWrapper.state_dict(self)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state saved by any mm optimizer wrapper, with or without a loss scale."""
        state_dict = dict(state_dict)
        scale = state_dict.pop('loss_scaler', None)
        if self.active:
            if scale:  # empty after bfloat16; then the scale starts afresh
                state_dict['loss_scaler'] = scale
            super().load_state_dict(state_dict)
        else:
            OptimWrapper.load_state_dict(self, state_dict)

    def optim_context(self, model):
        """Context for the forward pass: autocast where mixed precision is active."""
        if self.active:
            return super().optim_context(model)
        return OptimWrapper.optim_context(self, model)
