"""The training shell of classifiers."""
import pytest
import torch
import torch.nn.functional as F

from mmhybrid.models import ImageClassifier
from mmhybrid.models.checkpoints import load_backbone
from mmhybrid.registry import MODELS
from mmhybrid.weights import WeightsError

BACKBONE = dict(type='mmhybrid.LocalVimClassifier', arch=dict(dim=8, depth=2, state_dim=2),
                img_size=32, directions='unsearched', drop_path_rate=0.0)


@pytest.fixture
def batch():
    return torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1])


def test_loss_is_smoothed_cross_entropy(batch):
    model = ImageClassifier(BACKBONE, num_classes=3, label_smoothing=0.1)
    images, labels = batch
    logits = model(images)
    assert logits.shape == (4, 3)
    smooth = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    loss = model(images, labels, mode='loss')['loss']
    torch.testing.assert_close(loss, expected)
    # the runner hands lists over where nothing collates
    torch.testing.assert_close(model(list(images), labels.tolist(), mode='loss')['loss'], loss)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_predictions(batch):
    model = ImageClassifier(BACKBONE, num_classes=3).eval()
    images, labels = batch
    found = model(images, labels, [f'{i}.jpg' for i in range(4)], mode='predict')
    assert [sample['gt_label'] for sample in found] == labels.tolist()
    assert [sample['img_path'] for sample in found] == ['0.jpg', '1.jpg', '2.jpg', '3.jpg']
    for sample, logits in zip(found, model(images), strict=True):
        torch.testing.assert_close(sample['scores'], logits.softmax(0))
        assert sample['pred_label'] == int(logits.argmax())
    assert set(model(images, mode='predict')[0]) == {'scores', 'pred_label'}


@pytest.mark.parametrize('smoothing', [0.0, 0.3])
def test_mixed_targets_are_smoothed_as_asked(batch, smoothing):
    model = ImageClassifier(BACKBONE, num_classes=3, label_smoothing=smoothing,
                            mixing=dict(mixup_alpha=1.0))
    _, targets = model.mixing(batch[0].clone(), batch[1])
    assert targets.min().item() == pytest.approx(smoothing / 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_mixing_leaves_the_batch_alone(batch):
    """Mixed images have mixed targets; the mixture's loss lies between those of its parts."""
    model = ImageClassifier(BACKBONE, num_classes=3,
                            mixing=dict(mixup_alpha=1.0, cutmix_alpha=0.0))
    images, labels = batch
    before, seen = images.clone(), []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images, labels, mode='loss')['loss'].backward()
    assert torch.equal(images, before) and not torch.equal(seen[0], before)
    # image 0 became share * image 0 + (1 - share) * image 3
    share = ((seen[0][0] - images[3]) / (images[0] - images[3])).median()
    torch.testing.assert_close(seen[0][0], share * images[0] + (1 - share) * images[3],
                               atol=1e-4, rtol=0)
    model(images, mode='tensor')
    assert torch.equal(seen[1], images)  # only losses are mixed
    with pytest.raises(ValueError, match='even train_dataloader.batch_size'):
        model(images[:3], labels[:3], mode='loss')


@pytest.mark.parametrize('arguments, error, text', [
    (dict(mixing=dict(mixup=0.2)), TypeError, "did you mean 'mixup_alpha'"),
    (dict(label_smoothing=1.0), ValueError, 'label_smoothing'),
    (dict(classes=3), TypeError, "did you mean 'num_classes'"),
    (dict(backbone=dict(type='mmhybrid.LocalVim')), TypeError, "unknown argument 'num_classes'"),
])
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        ImageClassifier(**{'backbone': BACKBONE, **arguments})


@pytest.mark.parametrize('kind', [
    'MambaVisionClassifier', 'VimClassifier', 'VMambaClassifier', 'LocalVMambaClassifier'])
def test_every_family_is_built_with_the_number_of_classes(kind):
    with torch.device('meta'):
        model = ImageClassifier(dict(type=f'mmhybrid.{kind}'), num_classes=7)
    head, = (param for name, param in model.named_parameters() if name.endswith('head.weight'))
    assert head.shape[0] == 7


def test_wrong_calls(batch):
    model = ImageClassifier(BACKBONE, num_classes=3)
    with pytest.raises(ValueError, match="mode='loss' needs one class index per image"):
        model(batch[0], mode='loss')
    with pytest.raises(ValueError, match="expected 'loss', 'predict' or 'tensor'"):
        model(*batch, mode='train')


@pytest.mark.parametrize('backbone, head', [
    (dict(type='LocalVMambaClassifier', arch=dict(dim=8, depths=(1, 1, 1, 1)),
          directions='unsearched'), 'classifier.head'),
    (dict(type='VimClassifier', arch=dict(dim=16, depth=2)), 'head'),
])
def test_weights_for_other_classes_leave_the_last_layer_fresh(tmp_path, backbone, head):
    given = MODELS.build(dict(backbone, num_classes=7))
    file = tmp_path / 'weights.pth'
    torch.save(given.state_dict(), file)
    model = MODELS.build(dict(type='ImageClassifier', num_classes=5, backbone=dict(
        backbone, init_cfg=dict(type='Pretrained', checkpoint=str(file)))))
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    model.init_weights()
    own = model.backbone.state_dict()
    assert {name for name in own if name.startswith(f'{head}.')} == {
        f'{head}.weight', f'{head}.bias'}
    for name, tensor in own.items():
        source = before if name.startswith(f'{head}.') else given.state_dict()
        assert torch.equal(tensor, source[name]), name
    # evaluating with them would be meaningless, so loading them by hand is refused
    with pytest.raises(WeightsError, match='is a classifier of 7 classes, expected 5; set num_'):
        load_backbone(model.backbone, file)
    wider = MODELS.build(dict(backbone, num_classes=5, arch=dict(
        backbone['arch'], dim=2 * backbone['arch']['dim']),
        init_cfg=dict(type='Pretrained', checkpoint=str(file))))
    with pytest.raises(WeightsError):
        wider.init_weights()
