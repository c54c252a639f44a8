"""Folders of images: data set, transforms, accuracy."""
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmhybrid.datasets.loading.checks import check_classes, check_data
from mmhybrid.datasets.loading.image_folder import ImageFolder
from mmhybrid.datasets.loading.transforms import LoadPicture, TimmTransform
from mmhybrid.engine.config import apply_tta
from mmhybrid.errors import UserError
from mmhybrid.evaluation.accuracy import TopAccuracy


@pytest.fixture
def folder(tmp_path):
    """Classes b and a with two pictures each, in modes that are not RGB."""
    for split in ('train', 'val'):
        for name in ('b', 'a'):
            (tmp_path / split / name).mkdir(parents=True)
            for number, mode in enumerate(('L', 'RGBA')):
                image = Image.new(mode, (40, 30), 90 if mode == 'L' else (90, 90, 90, 255))
                image.save(tmp_path / split / name / f'{number}.PNG')
        (tmp_path / split / '.hidden').mkdir()
        (tmp_path / split / 'a' / 'notes.txt').touch()
    return tmp_path


def data_set(root, split='train', **more):
    return dict(type='mmhybrid.ImageFolder', data_root=str(root), data_prefix=dict(img_path=split),
                **more)


def config(root, num_classes=2, **more):
    return Config(dict(
        default_scope='mmengine', data_root=str(root), model=dict(num_classes=num_classes),
        train_dataloader=dict(dataset=data_set(root, **more)),
        val_dataloader=dict(dataset=data_set(root, 'val', **more))))


def test_samples_in_order(folder):
    data = ImageFolder(str(folder), dict(img_path='train'), pipeline=[
        dict(type='mmhybrid.LoadPicture'), dict(type='mmhybrid.TimmTransform', input_size=32)])
    assert data.metainfo['classes'] == ('a', 'b') and len(data) == 4
    assert [data[i]['labels'] for i in range(4)] == [0, 0, 1, 1]
    assert [data[i]['img_path'][-7:] for i in range(4)] == [
        'a/0.PNG', 'a/1.PNG', 'b/0.PNG', 'b/1.PNG']
    for i in range(4):
        sample = data[i]
        assert set(sample) == {'inputs', 'labels', 'img_path'}
        # 90 of 255, with ImageNet's mean and spread
        expected = (90 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
            [0.229, 0.224, 0.225])
        assert sample['inputs'].shape == (3, 32, 32)
        torch.testing.assert_close(sample['inputs'].mean(dim=(1, 2)), expected, atol=1e-5, rtol=0)


def test_the_log_counts(folder, monkeypatch):
    lines = []
    monkeypatch.setattr('mmhybrid.datasets.loading.image_folder.print_log',
                        lambda text, **kwargs: lines.append(text))
    for split in ('train', 'val'):
        ImageFolder(str(folder), dict(img_path=split))
        (folder / 'val/a/notes.txt').unlink(missing_ok=True)
    assert [line.partition(';')[0] for line in lines] == [
        f'4 images of {folder}/{split} in 2 classes are used' for split in ('train', 'val')]
    assert '1 files or folders are left out' in lines[0] and 'a/notes.txt' in lines[0]
    assert lines[1].endswith('none is left out.')


def test_chosen_classes_and_parts(folder):
    data = ImageFolder(str(folder), dict(img_path='val'), metainfo=dict(classes=('b', 'a')))
    assert [data.get_data_info(i)['labels'] for i in (0, 3)] == [0, 1]
    assert '/b/' in data.get_data_info(0)['img_path']
    assert len(ImageFolder(str(folder), dict(img_path='val'), indices=3)) == 3


def test_folders_without_images(folder, tmp_path):
    (tmp_path / 'train' / 'c').mkdir()
    with pytest.raises(UserError, match='train/c/ has no images .* one of the 3 classes'):
        ImageFolder(str(folder), dict(img_path='train'))
    with pytest.raises(UserError, match='has no folders in it. Expected one per class'):
        ImageFolder(str(folder), dict(img_path='train/c'))


def test_random_transforms_are_random_and_reproducible():
    pixels = np.random.RandomState(0).randint(0, 255, (48, 64, 3), dtype=np.uint8)
    transform = TimmTransform(32, is_training=True, auto_augment='rand-m9-mstd0.5', re_prob=1.0)

    def draw(seed):
        import random
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return transform(dict(img=Image.fromarray(pixels), labels=0, img_path=''))['inputs']

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_load_picture_keeps_the_rest(folder):
    sample = LoadPicture()(dict(img_path=str(folder / 'val/a/0.PNG'), labels=1))
    assert sample['img'].mode == 'RGB' and sample['img'].size == (40, 30) and sample['labels'] == 1


def test_checks_before_a_run(folder):
    check_data(config(folder), ['train', 'val'])
    assert check_classes(config(folder), ['train', 'val']) == []
    with pytest.raises(UserError, match=r'2 classes \(a, b\).*model.num_classes=1000'):
        check_classes(config(folder, 1000), ['train'])
    chosen = dict(metainfo=dict(classes=('b',)))
    assert check_classes(config(folder, 1, **chosen), ['train', 'val']) == []
    for file in (folder / 'val' / 'b').iterdir():
        file.unlink()
    (folder / 'val' / 'b').rename(folder / 'val' / 'c')
    with pytest.raises(UserError, match='b, c are in one of them only'):
        check_classes(config(folder), ['train', 'val'])
    with pytest.raises(UserError, match=r'train/ does not exist[^$]*one folder per class'):
        check_data(config(folder / 'elsewhere'), ['train'])


def accuracy(scores, labels, **options):
    metric = TopAccuracy(**options)
    metric.process(None, [dict(scores=torch.tensor(s), gt_label=label)
                          for s, label in zip(scores, labels, strict=True)])
    return metric.evaluate(size=len(scores))


def test_no_augmentation_while_testing(folder):
    cfg = config(folder, pipeline=[])
    cfg.test_dataloader = cfg.val_dataloader
    with pytest.raises(UserError, match='classifiers cannot: leave --tta out'):
        apply_tta(cfg)


def test_accuracy():
    scores = [[.1, .2, .7], [.5, .2, .3], [.2, .5, .3], [.4, .35, .25]]
    assert accuracy(scores, [2, 2, 0, 0]) == {'accuracy/top1': 50.0}
    assert accuracy(scores, [2, 2, 0, 0], topk=(1, 2, 3)) == {
        'accuracy/top1': 50.0, 'accuracy/top2': 75.0, 'accuracy/top3': 100.0}


@pytest.mark.parametrize('value', [1 / 3, float('nan')])
def test_a_collapsed_network_is_not_right(value):
    assert accuracy([[value] * 3] * 3, [0, 1, 2]) == {'accuracy/top1': 0.0}


def test_top5_needs_five_classes():
    assert set(accuracy([[0., 1., 2., 3., 4.]], [4])) == {'accuracy/top1', 'accuracy/top5'}
    with pytest.raises(ValueError, match='positive integers'):
        TopAccuracy(topk=(0,))
