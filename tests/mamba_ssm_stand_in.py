"""What `selective_scan_cuda` of mamba_ssm does, in PyTorch on a CPU, and what it refuses.

Stricter than any one of its versions: the first ones wanted a stride of one even on an axis of
one, and the kernels read vectors of 16 bytes without a check, where the real one would crash.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from mmhybrid.ops.selective_scan.reference import selective_scan_reference

CHUNK = 2048
calls: list[tuple[str, torch.dtype, int]] = []  # function, dtype and tokens


def _check(condition, message):
    if not condition:
        raise RuntimeError(f'Expected {message} to be true, but got false.')


def _tokens(name, x, like, shape):
    _check(x.dtype == like, f'{name}.scalar_type() == input_type')
    _check(x.shape == torch.Size(shape), f'{name} must have shape {shape}')
    _check(x.stride(-1) == 1, f'{name}.stride(-1) == 1')
    if shape[-1] % 128 == 0:
        steps = (x.data_ptr(), *(s * x.element_size() for s in x.stride()[:-1]))
        assert all(step % 16 == 0 for step in steps), f'CUDA error: misaligned address ({name})'


def _parameter(name, x, shape):
    if x is None:
        return
    _check(x.dtype == torch.float32, f'{name}.scalar_type() == at::ScalarType::Float')
    _check(x.stride(-1) == 1 or len(shape) > 1, f'{name}.stride(-1) == 1')
    _check(x.shape == torch.Size(shape), f'{name} must have shape {shape}')


def _check_inputs(u, delta, A, B, C, D, z, delta_bias):
    _check(u.dtype in (torch.float32, torch.float16, torch.bfloat16), 'input_type == Float')
    batch, channels, length = u.shape
    state, groups = A.shape[1], B.shape[1]
    _check(state <= 256, 'selective_scan only supports state dimension <= 256')
    _parameter('A', A, (channels, state))
    _parameter('D', D, (channels,))
    _parameter('delta_bias', delta_bias, (channels,))
    for name, x in (('u', u), ('delta', delta), ('z', z)):
        if x is not None:
            _tokens(name, x, u.dtype, (batch, channels, length))
    for name, x in (('B', B), ('C', C)):
        _tokens(name, x, u.dtype, (batch, groups, state, length))
    return batch, channels, length, state


def _floats(*tensors):
    return [None if x is None else x.detach().float().requires_grad_() for x in tensors]


def _states(u, delta, A, B, C, delta_bias, softplus):
    """(B, D, chunks, 2 N): the decay since the first token and the state at ends of chunks."""
    u, delta, A, B, C, delta_bias = (
        None if x is None else x.detach().float() for x in (u, delta, A, B, C, delta_bias)
    )
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = F.softplus(step) if softplus else step
    ends = [*range(CHUNK, u.shape[-1], CHUNK), u.shape[-1]]
    found = []
    for end in ends:
        cut = (x[..., :end] for x in (u, step, B, C))
        cut_u, cut_step, cut_B, cut_C = cut
        state = selective_scan_reference(cut_u, cut_step, A, cut_B, cut_C)[1]
        decay = torch.exp(cut_step.sum(-1)[..., None] * A)
        found.append(torch.stack([decay, state], -1).flatten(-2))
    return torch.stack(found, 2)


def _differentiate(u, delta, A, B, C, D, delta_bias, softplus, grad):
    inputs = _floats(u, delta, A, B, C, D, delta_bias)
    y = selective_scan_reference(*inputs[:6], None, inputs[6], softplus)[0]
    grads = iter(torch.autograd.grad(y, [x for x in inputs if x is not None], grad))
    return [None if x is None else next(grads) for x in inputs]


def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    assert type(delta_softplus) is bool
    _check_inputs(u, delta, A, B, C, D, z, delta_bias)
    calls.append(('fwd', u.dtype, u.shape[-1]))
    with torch.no_grad():
        y = selective_scan_reference(
            *_floats(u, delta, A, B, C, D), None, *_floats(delta_bias), delta_softplus
        )[0]
        x = _states(u, delta, A, B, C, delta_bias, delta_softplus)
        out = torch.empty_like(delta).copy_(y)
        if z is None:
            return [out, x]
        return [out, x, torch.empty_like(z).copy_(y * F.silu(z.float()))]


def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    assert type(delta_softplus) is bool and recompute_out_z is False and dz is None
    batch, channels, length, state = _check_inputs(u, delta, A, B, C, D, z, delta_bias)
    calls.append(('bwd', u.dtype, length))
    _tokens('dout', dout, u.dtype, (batch, channels, length))
    _check(x.dtype == torch.float32, 'x.scalar_type() == weight_type')
    _check(x.is_contiguous(), 'x.is_contiguous()')
    chunks = -(-length // CHUNK)
    _check(x.shape == (batch, channels, chunks, 2 * state), 'x must have shape')
    torch.testing.assert_close(x, _states(u, delta, A, B, C, delta_bias, delta_softplus))
    grad = dout.float()
    found = []
    if z is not None:
        _check(out is not None, 'out_.has_value()')
        _tokens('out', out, u.dtype, (batch, channels, length))
        z = z.float()
        gate = torch.sigmoid(z)
        found = [(grad * out.float() * gate * (1 + z * (1 - gate))).to(u.dtype)]
        grad = grad * z * gate
    # Autograd is off inside of an operator, and on in another thread.
    with ThreadPoolExecutor(1) as thread:
        grads = thread.submit(
            _differentiate, u, delta, A, B, C, D, delta_bias, delta_softplus, grad
        ).result()
    given = (u, delta, A, B, C, D, delta_bias)
    return [
        None if p is None else torch.empty_like(p).copy_(g)
        for p, g in zip(given, grads, strict=True)
    ] + found
