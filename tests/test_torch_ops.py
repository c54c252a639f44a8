"""What mmdet calls on a GPU only, called on a CPU: values and gradients of the other ways."""
import pytest
import torch

from mmhybrid.mmcv_ops import CompiledOpMissing, install


@pytest.fixture(scope='module', autouse=True)
def stand_in():
    pytest.importorskip('mmcv')
    install()
    if not getattr(pytest.importorskip('mmcv._ext'), 'IS_STAND_IN', False):
        pytest.skip('mmcv is compiled')


@pytest.mark.parametrize('gamma', [2.0, 0.5, 0.0])
def test_focal_loss(gamma):
    from mmcv.ops import sigmoid_focal_loss
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
    logits = (4 * torch.randn(40, 5, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, 6, (40,))
    loss = sigmoid_focal_loss(logits, target, gamma, 0.3, None, 'none')
    one_hot = torch.nn.functional.one_hot(target, 6)[:, :5]
    expected = py_sigmoid_focal_loss(logits, one_hot, gamma=gamma, alpha=0.3, reduction='none')
    torch.testing.assert_close(loss, expected)
    grad = torch.rand_like(loss)
    torch.testing.assert_close(torch.autograd.grad(loss, logits, grad),
                               torch.autograd.grad(expected, logits, grad))


def test_focal_loss_of_very_sure_logits_is_finite():
    from mmcv.ops import sigmoid_focal_loss
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, 'sum')
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * 200 + 0.25 * 200)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.75, -0.25]]))


def test_focal_loss_with_class_weights_is_refused():
    from mmcv.ops import sigmoid_focal_loss
    with pytest.raises(CompiledOpMissing, match='weight for each class'):
        sigmoid_focal_loss(torch.zeros(2, 3), torch.tensor([0, 3]), 2.0, 0.25, torch.ones(3))


def test_deformable_attention():
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )
    shapes = torch.tensor([[6, 4], [3, 2], [1, 1]])
    start = torch.tensor([0, 24, 30])
    value = torch.randn(2, 31, 4, 8, dtype=torch.float64)
    places = 1.4 * torch.rand(2, 7, 4, 3, 5, 2, dtype=torch.float64) - 0.2  # some outside
    weights = torch.rand(2, 7, 4, 3, 5, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (value, places, weights)]
    out = MultiScaleDeformableAttnFunction.apply(value, shapes, start, places, weights, 64)
    expected = multi_scale_deformable_attn_pytorch(value, shapes, places, weights)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for found, right in zip(torch.autograd.grad(out, inputs, grad),
                            torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(found, right)
