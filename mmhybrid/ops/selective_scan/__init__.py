"""The selective scan of Mamba: one public function, several interchangeable backends.

B batch, D channels, L tokens, N state, G groups. The mathematics is in README.md beside this file.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import triton_support
from ..precision import autocast_off
from . import cpp, mamba_ssm_backend, triton_backend
from .export_backend import selective_scan_export
from .reference import selective_scan_reference
from .torch_backend import selective_scan_torch

__all__ = ['BackendStatus', 'available_backends', 'choose_backend', 'selective_scan']

logger = logging.getLogger(__name__)

#: Environment variable that takes the place of ``backend='auto'`` (never of an explicit argument).
BACKEND_VARIABLE = 'MMHYBRID_SCAN_BACKEND'


class Call(NamedTuple):
    """What a backend may look at to accept or refuse one call."""

    device: torch.device
    dtype: torch.dtype  # of the state: float32 or float64
    state: int  # N


class Backend(NamedTuple):
    """One way to compute the scan.

    ``run`` takes tensors of one device with float32 or float64 parameters, B and C as
    (B, G, N, L), and returns y in u's dtype and the last state (B, D, N) in the state's dtype.
    """

    run: Callable[..., tuple[Tensor, Tensor]]
    unavailable_reason: Callable[[], str | None]  # on this machine, with the remedy
    unsupported_reason: Callable[[Call], str | None]  # for this particular call
    not_default_reason: Callable[[], str | None]  # why only those get it who ask for it

    def reason(self, call: Call, asked: bool) -> str | None:
        """Why this backend does not take a call; None when it does."""
        return (
            self.unavailable_reason()
            or self.unsupported_reason(call)
            or (None if asked else self.not_default_reason())
        )


class BackendStatus(NamedTuple):
    """Whether a backend can be used on this machine, and the reason when it cannot."""

    usable: bool
    reason: str


def _never(*_) -> None:
    return None


def _run_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    dtype = A.dtype
    parts = [x if x is None else x.to(dtype) for x in (u, delta, A, B, C, D, z, delta_bias)]
    y, last_state = selective_scan_reference(*parts, delta_softplus, reverse)
    return y.to(u.dtype), last_state


_BACKENDS: dict[str, Backend] = {
    'triton': Backend(
        triton_backend.selective_scan_triton,
        triton_support.unavailable_reason,
        lambda call: triton_support.unsupported_reason(call.device, call.dtype),
        triton_support.not_default_reason,
    ),
    'mamba_ssm': Backend(
        mamba_ssm_backend.selective_scan_mamba_ssm,
        mamba_ssm_backend.unavailable_reason,
        mamba_ssm_backend.unsupported_reason,
        _never,
    ),
    'cpp': Backend(
        cpp.selective_scan_cpp, cpp.unavailable_reason, cpp.unsupported_reason, _never
    ),
    'torch': Backend(selective_scan_torch, _never, _never, _never),
    'reference': Backend(_run_reference, _never, _never, _never),
    # Never of its own accord: what `mmhybrid export` writes into files.
    'export': Backend(selective_scan_export, _never, _never, _never),
}

# What `auto` tries on each kind of device, best first; other devices get the last resort.
_PREFERENCE = {'cuda': ('triton', 'mamba_ssm', 'torch'), 'cpu': ('cpp', 'torch')}
_LAST_RESORT = ('torch',)


def available_backends() -> dict[str, BackendStatus]:
    """Every backend name with whether it is usable on this machine, or else the reason."""
    found = {}
    for name, backend in _BACKENDS.items():
        reason = backend.unavailable_reason()
        found[name] = BackendStatus(reason is None, reason or '')
    return found


@torch.compiler.assume_constant_result  # the compiler cannot trace os.environ everywhere
def _wish_of_environment() -> str:
    return os.environ.get(BACKEND_VARIABLE, 'auto')


@functools.cache
def _say_once(level: int, message: str) -> None:
    logger.log(level, message)


def choose_backend(
    backend: str = 'auto',
    device: torch.device | str = 'cpu',
    dtype: torch.dtype = torch.float32,
    state: int = 8,
) -> str:
    """Name of the backend that a call would use.

    Args:
        backend: 'auto' or a backend's name.
        device: where the tensors are.
        dtype: of the state, float32 or float64.
        state: N.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: when a backend was named that cannot take the call.
    """
    wish, source = backend, f"backend='{backend}'"
    if backend == 'auto':
        wish = _wish_of_environment()
        source = f'{BACKEND_VARIABLE}={wish}'
    if wish != 'auto' and wish not in _BACKENDS:
        raise ValueError(
            f'selective_scan got {source}, which is no backend; '
            f'choose one of {", ".join(["auto", *_BACKENDS])}.'
        )
    call = Call(torch.device(device), dtype, state)
    if wish != 'auto':
        reason = _BACKENDS[wish].reason(call, asked=True)
        if reason:
            raise RuntimeError(f'selective_scan was asked for {source}, but {reason}.')
        return wish

    passed_over = []
    names = _PREFERENCE.get(call.device.type, _LAST_RESORT)
    for name in names:
        reason = _BACKENDS[name].reason(call, asked=False)
        if reason is None:
            break
        passed_over.append(f'{name}: {reason}')
    if passed_over and not torch.compiler.is_compiling():
        # On a GPU the last resort is many times slower; on a CPU it is the ordinary way, unless
        # somebody else may have been at the kernel.
        slow = call.device.type == 'cuda' and name in _LAST_RESORT
        alarming = slow or cpp.distrusts_cache()
        level = logging.WARNING if alarming else logging.INFO
        why = '; '.join(passed_over)
        _say_once(level, f"selective_scan on {call.device.type} falls back to '{name}' ({why})")
    return name


def _shape_error(name: str, got: Tensor, expected: str) -> ValueError:
    return ValueError(f'selective_scan expects {name} of shape {expected}, got {tuple(got.shape)}.')


def _check(u, delta, A, B, C, D, z, delta_bias) -> torch.dtype:
    """Raise for anything that the backends do not handle; return the dtype of the state."""
    given = {'u': u, 'delta': delta, 'A': A, 'B': B, 'C': C, 'D': D, 'z': z,
             'delta_bias': delta_bias}
    dtype = torch.float32
    for name, x in given.items():
        if x is None and name in ('D', 'z', 'delta_bias'):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f'selective_scan expects {name} as a tensor, got {type(x).__name__}.')
        if not x.is_floating_point():
            raise TypeError(
                f'selective_scan expects {name} of a real floating dtype, got {x.dtype}; '
                'convert it, or split a complex parameter into real ones.'
            )
        if x.device != u.device:
            raise ValueError(
                f'selective_scan expects all tensors on one device, got u on {u.device} and '
                f'{name} on {x.device}; move {name} with .to(u.device).'
            )
        dtype = torch.promote_types(dtype, x.dtype)

    if u.dim() != 3:
        raise _shape_error('u', u, '(B, D, L)')
    batch, channels, length = u.shape
    # Texts of sizes are made where a check fails: a compiler would take the sizes for constants.
    if delta.shape != u.shape:
        raise _shape_error('delta', delta, f'{_sizes(u)} like u')
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise _shape_error('A', A, f'(D, N) with D = {channels} and N >= 1')
    state = A.shape[1]
    for name, x in (('B', B), ('C', C)):
        fits = x.dim() in (3, 4) and (x.shape[0], *x.shape[-2:]) == (batch, state, length)
        if not fits:
            raise _shape_error(name, x, f'(B, N, L) = ({batch}, {state}, {length}) or (B, G, N, L)')
        if x.dim() == 4 and (x.shape[1] == 0 or channels % x.shape[1]):
            raise ValueError(
                f'selective_scan expects a number of groups G in {name} (B, G, N, L) that divides '
                f'D = {channels}, got G = {x.shape[1]}.'
            )
    if _groups(B) != _groups(C):
        raise ValueError(
            f'selective_scan expects B and C with the same number of groups, got {_groups(B)} '
            f'and {_groups(C)}; repeat the smaller one.'
        )
    for name, x in (('D', D), ('delta_bias', delta_bias)):
        if x is not None and x.shape != (channels,):
            raise _shape_error(name, x, f'(D,) = ({channels},)')
    if z is not None and z.shape != u.shape:
        raise _shape_error('z', z, f'{_sizes(u)} like u')
    return dtype


def _sizes(u: Tensor) -> str:
    return '(B, D, L) = ({}, {}, {})'.format(*u.shape)


def _groups(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 4 else 1


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    backend: str = 'auto',
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan along the last axis, with the layouts and meaning of mamba-ssm.

    Per batch item, channel d and state n, in at least float32 (Gu and Dao, "Mamba: Linear-Time
    Sequence Modeling with Selective State Spaces", 2023, section 3)::

        dt_t = softplus(delta_t + delta_bias)       (each part optional; the identity above 20)
        h_t  = exp(dt_t * A) * h_{t-1} + dt_t * B_t * u_t          h before the first token is 0
        y_t  = sum_n(C_t * h_t) + D * u_t
        y_t  = y_t * silu(z_t)                                     (when z is given)

    Args:
        u: input, (B, D, L); any floating dtype, any strides.
        delta: step, (B, D, L).
        A: decay rates, (D, N), real; negative for a state that fades.
        B: input weights, (B, N, L), or (B, G, N, L) where channel d belongs to group d // (D / G).
        C: output weights, like B.
        D: skip weights, (D,).
        z: gate, (B, D, L).
        delta_bias: added to delta, (D,).
        delta_softplus: pass delta (after its bias) through softplus.
        return_last_state: also return the state.
        reverse: visit the tokens from right to left; every output stays at its token's place and
            the last state is the one after the left-most token.
        backend: 'auto' takes the fastest that is usable (or what the environment variable
            MMHYBRID_SCAN_BACKEND names) and says once when it falls back; 'triton',
            'mamba_ssm', 'cpp', 'torch' and 'reference' insist.

    Returns:
        y (B, D, L) in u's dtype; with ``return_last_state`` also the state (B, D, N), which is
        float32, or float64 when any input is. Both are differentiable, once, in every input.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit together, or the backend's name is unknown.
        RuntimeError: the backend that was asked for cannot be used; the message says what to do.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, None)
    flags = bool(delta_softplus), bool(reverse), bool(return_last_state)
    wish = _wish_of_environment() if backend == 'auto' else backend
    ready = triton_backend.prepared(tensors, 'scan', wish, *flags)
    if ready is not None and ready.call is not None:  # has passed all of the below
        return ready.call(tensors, ready.pointers)

    dtype = _check(u, delta, A, B, C, D, z, delta_bias)
    name = choose_backend(backend, u.device, dtype, A.shape[1])
    ours = _BACKENDS[name].run is triton_backend.selective_scan_triton
    if ready is not None and ours and triton_backend.takes(tensors):
        return triton_backend.scan(ready, *flags)
    y, last_state = run_backend(name, dtype, u, delta, A, B, C, D, z, delta_bias, *flags[:2])
    return (y, last_state) if return_last_state else y


def run_backend(
    name: str,
    dtype: torch.dtype,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """y and the last state by a backend that :func:`choose_backend` has named; nothing is checked.

    Args:
        name: of the backend.
        dtype: of the state, that for which the backend was chosen.

    The other arguments are those of :func:`selective_scan`.
    """
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    A, D, delta_bias = (x if x is None else x.to(dtype) for x in (A, D, delta_bias))
    if u.numel() == 0:  # nothing to cut into chunks
        name = 'reference'
    # Autocast would lower the state to half precision in the middle of the recurrence.
    with autocast_off(u.device):
        return _BACKENDS[name].run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
