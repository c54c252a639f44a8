"""The pyramid of plain backbones."""
import pytest
import torch
from fill import fill_state_dict, make_input
from torch import nn
from torch.nn import functional as F

from mmhybrid.models import SimpleFPN


@pytest.mark.parametrize('size', [(6, 8), (5, 7), (1, 3)], ids=str)
def test_strides(size):
    neck = SimpleFPN(16, out_channels=8, num_outs=6)
    h, w = size
    maps = neck((torch.rand(2, 4, 9, 9), torch.rand(2, 16, h, w)))  # the last input counts
    half = (max(h // 2, 1), max(w // 2, 1))
    assert [tuple(m.shape[2:]) for m in maps[:4]] == [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), half]
    assert len(maps) == 6 and all(m.shape[:2] == (2, 8) for m in maps)
    assert torch.equal(maps[4], maps[3][..., ::2, ::2])
    assert torch.equal(maps[5], maps[4][..., ::2, ::2])
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_levels_follow_the_paper():
    neck = fill_state_dict(SimpleFPN(8, out_channels=12))
    x = make_input(0, (1, 8, 4, 6))

    def norm(x, layer):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        x = (x - mean) / (var + 1e-6).sqrt()
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    def out(x, first, second):
        x = norm(F.conv2d(x, first.weight), first.norm)
        return norm(F.conv2d(x, second.weight, padding=1), second.norm)

    up, ln, _, up2, *convs = neck.simfp_2
    y = F.conv_transpose2d(x, up.weight, up.bias, stride=2)
    y = F.conv_transpose2d(F.gelu(norm(y, ln)), up2.weight, up2.bias, stride=2)
    maps = neck(x)
    torch.testing.assert_close(maps[0], out(y, *convs))
    up, *convs = neck.simfp_3
    torch.testing.assert_close(
        maps[1], out(F.conv_transpose2d(x, up.weight, up.bias, stride=2), *convs))
    torch.testing.assert_close(maps[2], out(x, *neck.simfp_4))
    torch.testing.assert_close(maps[3], out(F.max_pool2d(x, 2), *neck.simfp_5[1:]))


def test_errors():
    with pytest.raises(ValueError, match='backbone_channel=18, expected a multiple of 4'):
        SimpleFPN(18)
    with pytest.raises(ValueError, match='num_outs=3, expected at least 4'):
        SimpleFPN(16, num_outs=3)
    with pytest.raises(TypeError, match="unknown argument 'num_out'; did you mean 'num_outs'"):
        SimpleFPN(16, num_out=5)


def test_spelling_of_mmdets_project():
    neck = SimpleFPN(backbone_channel=16, in_channels=[4, 8, 16, 16], out_channels=8, num_outs=5,
                     norm_cfg=dict(type='LN2d', requires_grad=True))
    assert neck.simfp_2[1].eps == neck.simfp_4[0].norm.eps == 1e-6
    other = SimpleFPN(16, norm_cfg=dict(type='LN2d', eps=1e-3))
    assert {m.eps for m in other.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}
    with pytest.raises(ValueError, match=r'expected \[4, 8, 16, 16\]'):
        SimpleFPN(16, [16, 16, 16, 16])
    with pytest.raises(ValueError, match='norm_cfg=.*expected dict'):
        SimpleFPN(16, norm_cfg=dict(type='BN'))


def test_the_norm_of_its_heads_is_registered():
    from mmengine.registry import MODELS
    norm = MODELS.build(dict(type='LN2d', normalized_shape=4, eps=1e-6))
    assert isinstance(norm, nn.LayerNorm) and norm(torch.rand(1, 4, 3, 3)).shape == (1, 4, 3, 3)
