"""The selective scan, token by token, in plain PyTorch: slow, short and meant to be read.

B batch, D channels, L tokens, N state, G groups, H = D / G channels per group.
Tests and benchmarks of every other backend compare with this file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sequential selective scan with PyTorch's own autograd.

    All tensors share one dtype (float32 or float64) and one device; B and C are (B, G, N, L).
    The state equation is that of S6 (Gu and Dao, "Mamba", 2023, section 3.2) with the decay
    discretised by zero-order hold and the input by Euler's rule.

    Returns:
        y (B, D, L) and the state after the last token visited, (B, D, N).
    """
    batch, channels, length = u.shape
    groups, state = B.shape[1:3]
    grouped = (batch, groups, channels // groups)

    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)  # the identity above 20

    # unbind, not indexing: the gradient of x[..., t] is a tensor as large as x for every t.
    u_t, delta_t, B_t, C_t = (x.unbind(-1) for x in (u, delta, B, C))
    A = A.reshape(1, groups, -1, state)
    h = u.new_zeros(*grouped, state)
    y: list[Tensor] = [u.new_empty(0)] * length
    for t in reversed(range(length)) if reverse else range(length):
        step = delta_t[t].reshape(*grouped, 1)
        decay = torch.exp(step * A)
        h = decay * h + step * u_t[t].reshape(*grouped, 1) * B_t[t].unsqueeze(2)
        y[t] = (h * C_t[t].unsqueeze(2)).sum(-1).reshape(batch, channels)
    out = torch.stack(y, dim=-1) if y else u.clone()

    if D is not None:
        out = out + D[:, None] * u
    if z is not None:
        out = out * F.silu(z)
    return out, h.reshape(batch, channels, state)
