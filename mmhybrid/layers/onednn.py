"""Linear layers and convolutions of inference on a CPU, with what follows them in the same pass.

PyTorch's own layers leave float32 products to MKL and write every result to memory before the next
operation reads it.  oneDNN, which comes with PyTorch, is faster on AMD processors, and applies
activation and residual sum while a result is still in the cache.  These are the operators that
``torch.compile`` puts into its code for a CPU; they have no gradients.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ['convolution', 'linear', 'takes']

_OPERATORS = torch.ops.mkldnn
_KNOWN = all(hasattr(_OPERATORS, name) for name in ('_linear_pointwise', '_convolution_pointwise'))
# What they call activations: name, scalars, variant.
_ACTIVATIONS = {None: ('none', [], ''), 'relu': ('relu', [], ''), 'gelu': ('gelu', [], 'none'),
                'gelu_tanh': ('gelu', [], 'tanh')}


def takes(x: Tensor, *modules: nn.Module) -> bool:
    """Whether the functions of this module may stand for these modules applied to x.

    They may where nobody looks: no gradients, no hooks of the modules, no compiler, tracer, counter
    of operators or autocast; in float32 on a CPU.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # first, so that training is not held up, and no compiler sees the rest
    return (_KNOWN and type(x) is Tensor
            and x.device.type == 'cpu' and x.dtype == torch.float32 and x.numel() > 0
            and torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()
            and not torch._C._len_torch_dispatch_stack() and not torch.is_autocast_enabled('cpu')
            and all(_is_plain(m) for m in modules))


def _is_plain(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks
                or module.weight is None or module.weight.dtype != torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """``F.linear`` and an activation: None, 'relu', 'gelu' or 'gelu_tanh'."""
    return _OPERATORS._linear_pointwise(x, weight, bias, *_ACTIVATIONS[activation])


def convolution(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, activation: str | None = None,
                residual: Tensor | None = None) -> Tensor:
    """A convolution, its BatchNorm in eval mode as part of the weights, and what comes after.

    Args:
        x: (B, C, H, W).
        conv: with zero padding.
        norm: behind it; its running statistics count.
        activation: as for :func:`linear`; without a residual only.
        residual: is added; as large as the result.
    """
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    weight = conv.weight * factor[:, None, None, None]
    rest = (weight, torch.addcmul(norm.bias, shift, factor), conv.padding, conv.stride,
            conv.dilation, conv.groups)
    if residual is None:
        return _OPERATORS._convolution_pointwise(x, *rest, *_ACTIVATIONS[activation])
    assert activation is None
    return _OPERATORS._convolution_pointwise(x, residual, *rest, 'add', None, None, [], None)
