"""Inputs, a table of cases and comparisons that the tests of several scan backends share."""

import torch

from mmhybrid.ops import selective_scan

B, D, L, N = 2, 12, 37, 8


def make_inputs(batch=B, channels=D, length=L, state=N, groups=None, *, skip=True, gate=False,
                bias=True, softplus=True, dtype=torch.float64):
    """Random inputs by name; ``groups=None`` gives B and C without the axis of groups."""

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64)

    lead = (batch,) if groups is None else (batch, groups)
    inputs = {
        'u': normal(batch, channels, length),
        'delta': normal(batch, channels, length) - 2 if softplus
        else 0.3 * torch.rand(batch, channels, length, dtype=torch.float64),
        'A': -0.1 - 2 * torch.rand(channels, state, dtype=torch.float64),
        'B': normal(*lead, state, length),
        'C': normal(*lead, state, length),
    }
    if skip:
        inputs['D'] = normal(channels)
    if gate:
        inputs['z'] = normal(batch, channels, length)
    if bias:
        inputs['delta_bias'] = normal(channels) if softplus else torch.rand(channels).double()
    return {name: x.to(dtype) for name, x in inputs.items()}


def run(inputs, *, backend, softplus=True, reverse=False, use_y=True, use_state=True):
    """Outputs and all gradients by name."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, last = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True,
                             reverse=reverse, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for use, x in ((use_y, y), (use_state, last)):
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if use:
            loss = loss + (x.double() * weight).sum()
    loss.backward()
    found = {'y': y.detach(), 'last_state': last.detach()}
    return found | {f'grad_{name}': x.grad for name, x in inputs.items()}


def assert_same(found, expected, tolerance):
    """Compare by name; tolerance is relative to the largest magnitude of each tensor."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = found[name]
        if want is None:
            assert got is None, name
            continue
        assert got.shape == want.shape, name
        error = (got.double() - want.double()).abs().max().item()
        scale = max(want.double().abs().max().item(), 1e-3)
        assert error <= tolerance * scale, f'{name}: error {error:.2e} at scale {scale:.2e}'


CASES = [
    # batch, channels, length, state, groups, skip, gate, bias, softplus, reverse
    (2, 6, 1, 8, None, True, True, True, True, False),
    (1, 4, 2, 5, None, False, False, True, True, True),
    (2, 6, 7, 1, None, True, False, False, False, False),
    (1, 6, 63, 16, 2, True, True, True, True, True),
    (2, 12, 64, 8, None, True, False, True, True, False),
    (2, 12, 64, 8, 1, False, True, False, True, True),
    (3, 4, 65, 5, 4, True, True, True, False, False),
    (1, 8, 65, 1, 4, False, False, False, True, True),
    (1, 16, 1000, 8, None, True, False, True, True, False),
    (2, 6, 1000, 16, 3, True, True, True, True, True),
    (40, 64, 49, 8, None, True, False, True, True, False),  # many sequences: no chunks
    (2, 3, 1000, 5, None, False, False, False, False, True),
]
