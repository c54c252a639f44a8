"""Weights and inputs without checkpoint files, the same on every machine.

Each tensor of a state dict is drawn from a generator of its own, seeded with the CRC-32 of its
name, so models that agree on names and shapes agree on weights, in any order.
"""
import re
import zlib

import numpy as np
import torch

# Computed from the configuration, never drawn.
COMPUTED = ('rope.freqs_cos', 'rope.freqs_sin')


def fill_value(name, shape, dt_bias=-4.0):
    """Give the float64 array of one tensor; KeyError where no rule fits the name."""
    last = name.rsplit('.', 1)[-1]
    n = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if last == 'num_batches_tracked':
        return np.zeros(shape)
    if last == 'running_var':
        return 1 + 0.1 * np.abs(n)
    if last == 'running_mean':
        return 0.1 * n
    if re.match(r'A(_b)?_log', last):
        return np.log(np.arange(1, shape[-1] + 1)) + 0.1 * n
    if re.fullmatch(r'D(s|_b|_\d+)?', last):
        return 1 + 0.1 * n
    if last.startswith('gamma'):
        return 0.5 + 0.1 * n
    if re.search(r'dt_proj(_b|_\d+)?\.bias$', name) or last == 'dt_projs_bias':
        return dt_bias + 0.5 * n
    if last in ('cls_token', 'pos_embed'):
        return 0.2 * n
    if len(shape) == 1 and last == 'weight':
        return 1 + 0.1 * n
    if len(shape) == 1 and last == 'bias':
        return 0.1 * n
    if len(shape) >= 2:
        return n / np.sqrt(np.prod(shape[1:]))
    raise KeyError(f'no rule for {name!r} of shape {tuple(shape)}')


@torch.no_grad()
def fill_state_dict(target, strip_prefix='', dt_bias=-4.0):
    """Fill a module or a state dict in place and return it.

    ``strip_prefix`` is removed from names before they are used; names without it are left alone.
    """
    state = target.state_dict() if isinstance(target, torch.nn.Module) else target
    for name, tensor in state.items():
        if name.startswith(strip_prefix) and not name.endswith(COMPUTED):
            value = fill_value(name[len(strip_prefix):], tensor.shape, dt_bias)
            tensor.copy_(torch.from_numpy(np.asarray(value)).reshape(tensor.shape))
    return target


def make_input(seed, shape):
    """Give a float32 standard normal tensor."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
