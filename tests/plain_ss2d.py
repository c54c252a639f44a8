"""SS2D as it is written down: one direction at a time, the twin against which mixers are tested."""

import torch
import torch.nn.functional as F

from mmhybrid.ops.cross_scan.reference import order_reference
from mmhybrid.ops.selective_scan.reference import selective_scan_reference


def plain_ss2d(mixer, x):
    """Parameters of an SS2D, and a map in its layout; the same layout out."""
    x, gate = _input(mixer, x)
    y = sum(_directions(mixer, x))
    return _output(mixer, y, gate)


def plain_local_ss2d(mixer, x):
    """Likewise of a LocalSS2D with fixed directions."""
    x, gate = _input(mixer, x)
    attention = mixer.multi_scan.attn
    total = 0
    for y in _directions(mixer, x):
        tokens = y.flatten(2).mT
        mean = _norm(attention.norm, tokens).mean(1, keepdim=True)
        hidden = F.gelu(mean @ attention.global_reduce.weight.mT + attention.global_reduce.bias)
        select = attention.channel_select
        tokens = tokens * (hidden @ select.weight.mT + select.bias).sigmoid()
        total = total + tokens.mT.unflatten(2, y.shape[2:])
    return _output(mixer, total, gate)


def _input(mixer, x):
    """The map (B, D, H, W) after the convolution, and the gate (B, H, W, D)."""
    if mixer.channel_first:
        x = x.permute(0, 2, 3, 1)
    x, gate = x @ mixer.in_proj.weight.mT, None
    if mixer.gate:
        x, gate = x.chunk(2, -1)
    conv = mixer.conv2d
    x = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=conv.groups)
    return F.silu(x), gate


def _directions(mixer, x):
    """Each direction's result as a map."""
    B, D, H, W = x.shape
    N = mixer.A_logs.shape[1]
    plan_restore = mixer.v_restore == 'released' and H != W
    length = max(len(order_reference(name, H, W)) for name in mixer.directions)
    for k, name in enumerate(mixer.directions):
        order = torch.tensor(order_reference(name, H, W), device=x.device)
        order = F.pad(order, (0, length - len(order)), value=-1)
        tokens = F.pad(x.flatten(2), (0, 1))[..., order]  # the last one is a zero token
        R = mixer.dt_projs_weight.shape[2]
        step, b, c = (mixer.x_proj_weight[k] @ tokens).split([R, N, N], 1)
        own = slice(k * D, (k + 1) * D)
        y, _ = selective_scan_reference(
            tokens, mixer.dt_projs_weight[k] @ step, -torch.exp(mixer.A_logs[own]),
            b.unsqueeze(1), c.unsqueeze(1), mixer.Ds[own], None, mixer.dt_projs_bias[k], True,
            False)
        back = torch.tensor([order.tolist().index(token) for token in range(H * W)],
                            device=x.device)
        if plan_restore and name.startswith('v'):
            # where the release looks for the result of a token
            token = torch.arange(H * W, device=x.device)
            back = token % H * W + token // H
            back = H * W - 1 - back if name == 'v_flip' else back
        yield y[..., back].unflatten(2, (H, W))


def _norm(norm, x):
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _output(mixer, y, gate):
    y = _norm(mixer.out_norm, y.permute(0, 2, 3, 1))
    if gate is not None:
        y = y * F.silu(gate)
    y = y @ mixer.out_proj.weight.mT
    return y.permute(0, 3, 1, 2) if mixer.channel_first else y
