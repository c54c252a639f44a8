"""A small annotation file of COCO's form with everything in it, and all that reads such files."""
import numpy as np
from mmengine.config import Config

from mmhybrid.datasets.loading.checks import check_classes
from mmhybrid.errors import UserError

CLASSES = ('cat', 'dog')


def good():
    """Two images; polygons, run lengths as numbers and as text, a crowd, an ignored object."""
    polygon = [[10, 10, 60, 10, 60, 50, 10, 50], [70, 70, 90, 70, 90, 90]]
    numbers = dict(size=[100, 120], counts=[1010, 30, 70, 30, 10860])
    text = dict(size=[100, 120], counts='bo0n0V20Va:')
    objects = [dict(bbox=[10, 10, 80, 80], segmentation=polygon),
               dict(bbox=[10.5, 10, 2, 30.5], segmentation=numbers, iscrowd=1, category_id=9),
               dict(bbox=[10, 10, 2, 30], segmentation=text, image_id=2),
               dict(bbox=[10, 10, 50, 40], segmentation=polygon[:1], image_id=2, ignore=1)]
    return dict(
        info=dict(year=2024), licenses=[],
        images=[dict(id=number, file_name=f'{number}.jpg', width=120, height=100)
                for number in (1, 2)],
        annotations=[dict(dict(id=number, image_id=1, category_id=4, iscrowd=0, area=1500.5),
                          **entry) for number, entry in enumerate(objects, 1)],
        categories=[dict(id=4, name='cat'), dict(id=9, name='dog')])


def config(folder):
    dataset = dict(
        type='CocoDataset', data_root=str(folder), ann_file='a.json', data_prefix=dict(img=''),
        metainfo=dict(classes=CLASSES), serialize_data=False,
        pipeline=[dict(type='LoadImageFromFile'),
                  dict(type='LoadAnnotations', with_bbox=True, with_mask=True)])
    return Config(dict(
        default_scope='mmdet', train_dataloader=dict(dataset=dataset),
        val_dataloader=dict(dataset=dict(dataset, test_mode=True)),
        val_evaluator=dict(type='CocoMetric', ann_file=str(folder / 'a.json'),
                           metric=['bbox', 'segm'])))


def use(cfg):
    """Everything that mmdet and pycocotools do with the file."""
    from mmdet.registry import DATASETS
    from pycocotools import mask as coder
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        dataset = DATASETS.build(loader.dataset)
        samples = [dataset[index] for index in range(len(dataset))]
        assert all(len(sample['gt_masks']) == len(sample['instances']) for sample in samples)
    coco = COCO(cfg.val_evaluator.ann_file)
    names = coco.getCatIds(catNms=CLASSES)
    for entry in coco.loadAnns(coco.getAnnIds(catIds=names)):
        if entry['image_id'] in coco.imgs:
            assert coco.annToMask(entry).max(initial=0) <= 1
    box, mask = [10, 10, 50, 40], np.zeros((100, 120), np.uint8, order='F')
    mask[10:50, 10:60] = 1
    found = coco.loadRes([dict(image_id=image, category_id=number, bbox=box, score=0.9,
                               segmentation=coder.encode(mask))
                          for image in coco.getImgIds() for number in names])
    for kind in ('bbox', 'segm'):
        scores = COCOeval(coco, found, kind)
        scores.params.catIds = names
        scores.evaluate()
        scores.accumulate()


def outcome(folder):
    """'used', or the sentence with which the file is refused."""
    cfg = config(folder)
    try:
        check_classes(cfg, ['train', 'val'])
    except UserError as error:
        return str(error)
    use(cfg)
    return 'used'
