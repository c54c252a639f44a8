"""Registers the package's operators with PyTorch: a forward and its backward at a time.

All of them go this way, so that they share how a compiler sees them, how autograd differentiates
them, and how a second derivative is refused.
"""

from collections.abc import Callable, Iterable

import torch

__all__ = ['define', 'register']

_NAMESPACE = 'mmhybrid'
_library = torch.library.Library(_NAMESPACE, 'FRAGMENT')


def register(
    name: str,
    *,
    schema: str,
    forward: Callable,
    fake: Callable,
    setup_context: Callable,
    differentiate: Callable,
    backward_schema: str,
    backward: Callable,
    backward_fake: Callable,
    refusal: str,
    keys: Iterable[str] = ('CPU', 'CUDA', 'XPU'),
) -> None:
    """Make ``torch.ops.mmhybrid.<name>`` and ``torch.ops.mmhybrid.<name>_backward``.

    Args:
        name: of the forward operator.
        schema: arguments and results, as in ``(Tensor x) -> Tensor``.
        forward: of the arguments; its results share memory with nothing.
        fake: like ``forward``, in shapes, dtypes and strides only.
        setup_context: see :func:`torch.library.register_autograd`.
        differentiate: likewise; calls the backward operator.
        backward_schema: of the backward operator.
        backward: likewise.
        backward_fake: likewise.
        refusal: what a second derivative is told.
        keys: dispatch keys, which say on what devices the functions work.
    """

    def refuse(*_):
        raise RuntimeError(refusal)

    define(name, schema, forward, fake, keys)
    define(f'{name}_backward', backward_schema, backward, backward_fake, keys)
    torch.library.register_autograd(
        f'{_NAMESPACE}::{name}', differentiate, setup_context=setup_context, lib=_library
    )
    torch.library.register_autograd(f'{_NAMESPACE}::{name}_backward', refuse, lib=_library)


def define(
    name: str, schema: str, function: Callable, fake: Callable,
    keys: Iterable[str] = ('CPU', 'CUDA', 'XPU'),
) -> None:
    """Make ``torch.ops.mmhybrid.<name>`` without a derivative; see :func:`register`."""
    _library.define(f'{name}{schema}', tags=(torch.Tag.pt2_compliant_tag,))
    for key in keys:
        _library.impl(name, function, key)
    torch.library.register_fake(f'{_NAMESPACE}::{name}', fake, lib=_library)
