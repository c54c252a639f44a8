"""The selective scan by the CUDA kernels of mamba_ssm, where a user has them.

Nothing depends on it, and nothing here installs it: the compiled module `selective_scan_cuda` is
used when it imports. What it asks of its arguments is met here: one dtype for all tensors over
tokens, tokens side by side in memory, rows that start at 16 bytes where it loads vectors.

B batch, D channels, L tokens, N state, G groups.
"""

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..triton_support import first_line
from .launch import intercepted
from .operator import gate_gradients, make_operator

__all__ = ['selective_scan_mamba_ssm', 'unavailable_reason', 'unsupported_reason']

#: States that its kernels take.
MAX_STATE = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tokens between the states that its forward pass hands over.
_CHUNK = 2048
# It loads vectors of 16 bytes where the length is a multiple of at least this, and checks nothing.
_EVEN, _VECTOR = 128, 16


# Whether it can be used ---------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # the compiler asks once while it traces
def unavailable_reason() -> str | None:
    """Why the kernels cannot be used on this machine, with the remedy; None when they can."""
    found = _extension()
    return found if isinstance(found, str) else None


@functools.cache
def _extension() -> ModuleType | str:
    """The compiled module, or why there is none."""
    try:
        import selective_scan_cuda as module
    except ModuleNotFoundError as error:
        if error.name == 'selective_scan_cuda':
            return (
                'mamba_ssm is not installed (no module selective_scan_cuda); it is optional, use '
                "backend='torch', or install it as its own documentation says"
            )
        return _broken(error)
    except Exception as error:  # such as an undefined symbol, after another PyTorch was installed
        return _broken(error)
    missing = [name for name in ('fwd', 'bwd') if not callable(getattr(module, name, None))]
    if missing:
        return (
            f'the module selective_scan_cuda ({getattr(module, "__file__", "built in")}) has no '
            f'{" and no ".join(missing)}, so it is not that of mamba_ssm; install mamba_ssm '
            "again, or use backend='torch'"
        )
    if not torch.cuda.is_available():
        return "mamba_ssm is installed and PyTorch sees no GPU; use backend='torch'"
    return module


def _broken(error: Exception) -> str:
    return (
        f'mamba_ssm is installed and its selective_scan_cuda cannot be imported '
        f'({first_line(error)}); it has to be built for torch {torch.__version__}: install it '
        "again, or use backend='torch'"
    )


def unsupported_reason(call) -> str | None:
    """Why the kernels do not take a call; None when they do."""
    if call.device.type != 'cuda':
        return (
            f"the kernels of mamba_ssm run on a GPU and the tensors are on '{call.device}'; use "
            "backend='torch'"
        )
    if call.dtype != torch.float32:
        return (
            f"the kernels of mamba_ssm compute in float32, not {call.dtype}; use backend='torch'"
        )
    if call.state > MAX_STATE:
        return (
            f'the kernels of mamba_ssm take at most {MAX_STATE} states and this call has '
            f"{call.state}; use backend='torch'"
        )
    return _not_for(call.device.index)


@torch.compiler.assume_constant_result
def _not_for(index: int | None) -> str | None:
    if intercepted():  # nothing runs where operations are only looked at
        return None
    return _not_for_once(torch.cuda.current_device() if index is None else index)


@functools.cache
def _not_for_once(index: int) -> str | None:
    """Why the kernels do not run on a GPU: they may have been built for others only."""
    u = torch.zeros(1, 1, 1, device=torch.device('cuda', index))
    B = u.unsqueeze(1)
    try:
        _extension().fwd(u, u, u[0], B, B, None, None, None, False)
    except RuntimeError as error:
        return (
            f'mamba_ssm does not run on {torch.cuda.get_device_name(index)} '
            f"({first_line(error)}); build it for this GPU, or use backend='torch'"
        )
    return None


# Calling ------------------------------------------------------------------------------------------


def _rows(x: Tensor | None) -> Tensor | None:
    """Tokens side by side; `contiguous` would leave a stray stride on an axis of one."""
    if x is None or x.stride(-1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _laid(x: Tensor | None) -> Tensor | None:
    """A tensor over tokens as the kernels read it."""
    x = _rows(x)
    if x is None or x.shape[-1] % _EVEN:
        return x
    places = (x.data_ptr(), *(step * x.element_size() for step in x.stride()[:-1]))
    if all(place % _VECTOR == 0 for place in places):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    assert not reverse
    u, delta, B, C, z = (_laid(x) for x in (u, delta, B, C, z))
    D, delta_bias = _rows(D), _rows(delta_bias)
    out, states, *gated = _extension().fwd(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus
    )
    y, ungated = (out, out.new_empty(0)) if z is None else (gated[0], out)
    return y.contiguous(), _last_state(states), states, ungated.contiguous()


def _last_state(states: Tensor) -> Tensor:
    """(B, D, N) of the pairs (decay so far, state) at the ends of the chunks."""
    return states[:, :, -1, 1::2].clone(memory_format=torch.contiguous_format)


def _backward(
    grad_y, grad_last_state, states, ungated,
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse,
):
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if grad_last_state is None:
        grads = _gradients(grad_y, states, ungated, *inputs, delta_softplus)
    else:
        grads = _gradients_with_state(grad_y, grad_last_state, ungated, *inputs, delta_softplus)
    return tuple(
        A.new_empty(0) if x is None else grad.to(x.dtype).contiguous()
        for x, grad in zip(inputs, grads, strict=True)
    )


def _gradients(grad_y, states, ungated, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    u, delta, B, C, z, grad_y, ungated = (
        _laid(x)
        for x in (u, delta, B, C, z, grad_y.to(u.dtype), None if z is None else ungated)
    )
    du, ddelta, dA, dB, dC, dD, dbias, *dz = _extension().bwd(
        u, delta, A, B, C, _rows(D), z, _rows(delta_bias), grad_y, states.contiguous(), ungated,
        None, delta_softplus, False,
    )
    return du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, dbias


def _gradients_with_state(
    grad_y, grad_last_state, ungated, u, delta, A, B, C, D, z, delta_bias, delta_softplus
):
    """The gradients when one comes from the last state, which the kernels know nothing of.

    N tokens are added whose step is zero, so that the state stays as it is; the n-th of them
    reads state n, and hence receives its gradient. All in float32.
    """
    tokens, state = u.shape[-1], A.shape[1]
    grad_y = torch.zeros_like(u, dtype=A.dtype) if grad_y is None else grad_y.to(A.dtype)
    grad_z = None
    if z is not None:
        grad_y, grad_z = gate_gradients(grad_y, ungated.to(A.dtype), z)
    step = delta.to(A.dtype)
    if delta_bias is not None:
        step = step + delta_bias[:, None]
    if delta_softplus:
        step = F.softplus(step)

    u, longer_step, B, C = (
        F.pad(x.to(A.dtype), (0, state)).contiguous() for x in (u, step, B, C)
    )
    C[..., tokens:] = torch.eye(state, dtype=C.dtype, device=C.device)
    _, states = _extension().fwd(u, longer_step, A, B, C, _rows(D), None, None, False)
    ungated = u.new_empty(0)
    grads = _gradients(
        torch.cat([grad_y, grad_last_state], -1), states, ungated,
        u, longer_step, A, B, C, D, None, None, False,
    )
    du, ddelta, dB, dC = (grads[i][..., :tokens] for i in (0, 1, 3, 4))
    if delta_softplus:  # its derivative, a sigmoid, written with its value
        ddelta = ddelta * -torch.expm1(-step)
    return du, ddelta, grads[2], dB, dC, grads[5], grad_z, ddelta.sum((0, 2))


def _chunk_states_shape(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    return *u.shape[:2], -(-u.shape[2] // _CHUNK), 2 * A.shape[1]


_operator = make_operator(
    'selective_scan_mamba_ssm', _forward, _backward, _chunk_states_shape, ungated_like='u'
)


def selective_scan_mamba_ssm(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    """The backend of :func:`mmhybrid.ops.selective_scan`: y (B, D, L), last state (B, D, N).

    The gradients of A, B, C, D and delta_bias are sums in no fixed order, as mamba_ssm's always
    are: two runs differ by rounding.
    """
    tokens = [x for x in (u, delta, B, C, z) if x is not None]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tokens))
    dtype = dtype if dtype in _DTYPES else torch.float32

    def prepared(x):
        if x is None:
            return None
        x = x.to(dtype)
        return _rows(x.flip(-1) if reverse else x)

    y, last_state = _operator(
        prepared(u), prepared(delta), A, prepared(B), prepared(C), D, prepared(z), delta_bias,
        delta_softplus, False,
    )
    return (y.flip(-1) if reverse else y).to(u.dtype), last_state
