"""Detectors and segmentors by short name: which base config they stand on, and what it needs."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmhybrid.errors import UserError

from .models import MINI, Backbone

__all__ = ['HEADS', 'Head', 'default_head', 'find_head']

DETECTION = ('detect', 'instance')


@dataclass
class Head:
    """A kind of model.

    Attributes:
        name: as --head takes it.
        title: for people.
        tasks: that it can learn.
        base: config that has its model.
        whole: whether that config has data and a schedule, too, which have to go.
        model: gives the lines of ``model = dict(...)`` for a backbone, a number of classes, a task
            and the number of places in the maps at strides 8 to 64 of the smallest image.
        maps: which of the four maps it reads.
        clip: largest norm of the gradients.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    base: str
    model: Callable[..., list[str]]
    whole: bool = False
    maps: tuple[int, ...] = (0, 1, 2, 3)
    clip: float = 10.0


def _rcnn(backbone: Backbone, classes: int, task: str, tokens: int) -> list[str]:
    masks = (f'mask_head=dict(num_classes={classes})' if task == 'instance'
             else 'mask_roi_extractor=None, mask_head=None')
    return [f'neck=dict(in_channels={[*backbone.channels]}),',
            f'roi_head=dict(bbox_head=dict(num_classes={classes}), {masks})']


def _cascade(backbone: Backbone, classes: int, task: str, tokens: int) -> list[str]:
    masks = (f'mask_head=dict(num_classes={classes})' if task == 'instance'
             else 'mask_roi_extractor=None, mask_head=None')
    neck = [] if backbone.name == MINI else [f'neck=dict(in_channels={[*backbone.channels]}),']
    return [*neck, 'roi_head=dict(',
            f'    bbox_head=[dict(head, num_classes={classes})',
            '               for head in _base_.model.roi_head.bbox_head],', f'    {masks})']


def _retinanet(backbone: Backbone, classes: int, task: str, tokens: int) -> list[str]:
    return [f'neck=dict(in_channels={[*backbone.channels]}),',
            f'bbox_head=dict(num_classes={classes})']


def _rtmdet(backbone: Backbone, classes: int, task: str, tokens: int) -> list[str]:
    return [f'neck=dict(in_channels={[*backbone.channels[1:]]}),',
            f'bbox_head=dict(num_classes={classes})']


def _dino(backbone: Backbone, classes: int, task: str, tokens: int) -> list[str]:
    # Queries start from the best places of four maps, and small images have few places.
    queries = 900 if tokens >= 1200 else max(10, tokens * 3 // 4)
    few = [] if queries == 900 else [
        f'num_queries={queries}, test_cfg=dict(max_per_img={min(300, queries)}),']
    return [*few, *_rtmdet(backbone, classes, task, tokens)]


def _mask2former(backbone: Backbone, classes: int, task: str, tokens: int) -> list[str]:
    if task == 'semantic':
        return [f'decode_head=dict(in_channels={[*backbone.channels]}, num_classes={classes},',
                f'                 loss_cls=dict(class_weight=[1.0] * {classes} + [0.1]))']
    return ['data_preprocessor=dict(batch_augments=None),',
            f'panoptic_head=dict(in_channels={[*backbone.channels]},',
            f'                   num_things_classes={classes}, num_stuff_classes=0,',
            f'                   loss_cls=dict(class_weight=[1.0] * {classes} + [0.1])),',
            f'panoptic_fusion_head=dict(num_things_classes={classes}, num_stuff_classes=0),',
            'test_cfg=dict(panoptic_on=False, semantic_on=False, instance_on=True)']


def _upernet(backbone: Backbone, classes: int, task: str, tokens: int) -> list[str]:
    if backbone.name == MINI:
        return [f'decode_head=dict(num_classes={classes}),',
                f'auxiliary_head=dict(num_classes={classes})']
    return [f'decode_head=dict(in_channels={[*backbone.channels]}, num_classes={classes}),',
            f'auxiliary_head=dict(in_channels={backbone.channels[2]}, num_classes={classes})']


def _segformer(backbone: Backbone, classes: int, task: str, tokens: int) -> list[str]:
    return [f'decode_head=dict(in_channels={[*backbone.channels]}, num_classes={classes})']


_OURS = 'mmhybrid::_base_/models/'
HEADS = {head.name: head for head in (
    Head('mask-rcnn', 'Mask R-CNN', ('instance',), f'{_OURS}mask_rcnn.py', _rcnn),
    Head('cascade', 'Cascade R-CNN', DETECTION, f'{_OURS}cascade_mask_rcnn.py', _cascade),
    Head('faster', 'Faster R-CNN', ('detect',), f'{_OURS}mask_rcnn.py', _rcnn),
    Head('retinanet', 'RetinaNet', ('detect',), 'mmdet::_base_/models/retinanet_r50_fpn.py',
         _retinanet),
    Head('rtmdet', 'RTMDet', ('detect',), 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', _rtmdet,
         whole=True, maps=(1, 2, 3)),
    Head('dino', 'DINO', ('detect',), 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', _dino,
         whole=True, maps=(1, 2, 3), clip=0.1),
    Head('mask2former', 'Mask2Former', ('instance', 'semantic'),
         'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', _mask2former, whole=True,
         clip=0.01),
    Head('upernet', 'UPerNet', ('semantic',), f'{_OURS}upernet.py', _upernet),
    Head('segformer', "SegFormer's head", ('semantic',),
         f'{_OURS}segformer.py', _segformer),
)}
# mmengine finds no configs of mmseg's fork, whose distribution has another name.
_MASK2FORMER = f'{_OURS}mask2former_semantic.py'
_MINIS = {'cascade': 'mmhybrid::cascade_mambavision_mini_coco.py',
          'upernet': 'mmhybrid::upernet_mambavision_mini_ade20k.py'}


def default_head(task: str, backbone: str) -> str:
    """Name of the head that a task gets if nobody chooses."""
    if task == 'semantic':
        return 'upernet'
    if backbone == MINI:
        return 'cascade'
    return 'mask-rcnn' if task == 'instance' else 'faster'


def find_head(name: str, task: str) -> Head:
    """Give the head of a name.

    Raises:
        UserError: if there is none, or it cannot learn the task.
    """
    head = HEADS.get(name)
    able = [each.name for each in HEADS.values() if task in each.tasks]
    if head is None:
        raise UserError(f'--head {name} is not known. For --task {task} there are '
                        f'{", ".join(able)}.')
    if task not in head.tasks:
        raise UserError(f'--head {name} does not fit --task {task}. For it there are '
                        f'{", ".join(able)}; {name} learns {" and ".join(head.tasks)}.')
    return head


def base_of(head: Head, backbone: Backbone, task: str) -> tuple[str, bool]:
    """The config that has the model, and whether it has data and a schedule, too."""
    if backbone.name == MINI and head.name in _MINIS:
        return _MINIS[head.name], True
    if (head.name, task) == ('mask2former', 'semantic'):
        return _MASK2FORMER, False
    return head.base, head.whole
