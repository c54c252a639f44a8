"""A backbone in a training loop of plain PyTorch: no config, no runner.

A 1x1 convolution on the map of stride 8 learns which pixels of a made-up picture are bright.

    python examples/plain_backbone.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from mmhybrid.models import VMamba


def main(steps: int = 20) -> list[float]:
    """Train, print and return the losses."""
    torch.manual_seed(0)
    small = dict(dim=16, depths=(1, 1, 1, 1), ssm_ratio=1.0)  # arch='tiny' is VMamba-T
    backbone = VMamba(small, out_indices=(1,))
    head = nn.Conv2d(backbone.out_channels[0], 1, 1)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=2e-3)

    losses = []
    for step in range(steps):
        light = F.interpolate(torch.rand(4, 1, 4, 4), size=64, mode='bilinear')
        images = light + 0.1 * torch.randn(4, 3, 64, 64)
        bright = (F.avg_pool2d(light, backbone.out_strides[0]) > 0.5).float()

        (features,) = backbone(images)
        loss = F.binary_cross_entropy_with_logits(head(features), bright)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f'step {step + 1}: loss {loss:.3f}')
    return losses


if __name__ == '__main__':
    main()
