"""The training shell around a classification network, for mmengine's runner."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor

from mmhybrid.registry import MODELS

from ..arguments import check_names, check_rate, strict_arguments

__all__ = ['ImageClassifier']

_MIXING = ('mixup_alpha', 'cutmix_alpha', 'cutmix_minmax', 'prob', 'switch_prob', 'mode',
           'correct_lam')


@MODELS.register_module()
@strict_arguments
class ImageClassifier(BaseModel):
    """Cross entropy around a network that turns images into logits.

    Args:
        backbone: config of a classification network of this package, such as
            ``dict(type='mmhybrid.LocalVimClassifier')``.  The name is that of detectors and
            segmentors, so every tool finds the network in the same place.
        num_classes: number of logits; the network is built with it.
        label_smoothing: share of the target that is spread evenly over all classes.
        mixing: None, or what ``timm.data.Mixup`` takes (``mixup_alpha``, ``cutmix_alpha``,
            ``switch_prob``, ``prob``, ``mode``, ``cutmix_minmax``, ``correct_lam``) to mix pairs of
            images while training.  Batches must then have an even number of images.
        data_preprocessor: mmengine data preprocessor; None for one that only moves the batch to
            the device of the model.
        init_cfg: mmengine initialisation of the whole; weights of the network belong into
            ``backbone['init_cfg']``.

    Raises:
        TypeError: for an unknown argument, also inside ``mixing``.
        ValueError: for a value out of range.
    """

    def __init__(self, backbone: dict, *, num_classes: int = 1000, label_smoothing: float = 0.0,
                 mixing: dict | None = None, data_preprocessor: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        check_rate('label_smoothing', label_smoothing)
        check_names(mixing or (), _MIXING, 'ImageClassifier: unknown key in mixing')
        self.backbone = MODELS.build({**backbone, 'num_classes': num_classes})
        self.label_smoothing = label_smoothing
        self.mixing = None
        if mixing:
            from timm.data import Mixup
            self.mixing = Mixup(**mixing, label_smoothing=label_smoothing, num_classes=num_classes)

    def forward(self, inputs: Tensor | Sequence[Tensor],
                labels: Tensor | Sequence[int] | None = None,
                img_path: Sequence[str] | None = None, mode: str = 'tensor'):
        """Compute losses, predictions or logits.

        Args:
            inputs: images (B, 3, H, W), normalised, or a list of B images of one size.
            labels: B class indices; needed for mode 'loss'.
            img_path: B paths, handed on to the predictions.
            mode: 'loss', 'predict' or 'tensor'.

        Returns:
            'loss': ``dict(loss=...)``.  'predict': per image a dictionary with ``scores``
            (num_classes,), ``pred_label`` and, where given, ``gt_label`` and ``img_path``.
            'tensor': logits (B, num_classes).

        Raises:
            ValueError: for another mode, missing labels, or an odd batch with ``mixing``.
        """
        images = inputs if isinstance(inputs, Tensor) else torch.stack(list(inputs))
        if labels is not None:
            labels = torch.as_tensor(labels, device=images.device)
        if mode == 'loss':
            return dict(loss=self.loss(images, labels))
        logits = self.backbone(images)
        if mode == 'tensor':
            return logits
        if mode != 'predict':
            raise ValueError(f"got mode={mode!r}, expected 'loss', 'predict' or 'tensor'")
        scores = logits.float().softmax(dim=1)
        samples = [dict(scores=each, pred_label=int(each.argmax())) for each in scores]
        for name, values in (('gt_label', None if labels is None else labels.tolist()),
                             ('img_path', img_path)):
            if values is not None:
                for sample, value in zip(samples, values, strict=True):
                    sample[name] = value
        return samples

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Cross entropy of (mixed) images (B, 3, H, W) with labels (B,)."""
        if labels is None:
            raise ValueError("got no labels, but mode='loss' needs one class index per image")
        if self.mixing is None:
            return F.cross_entropy(self.backbone(images), labels,
                                   label_smoothing=self.label_smoothing)
        if len(images) % 2:
            raise ValueError(
                f'got a batch of {len(images)}, but mixing takes images in pairs; set an even '
                'train_dataloader.batch_size and train_dataloader.drop_last=True')
        images, targets = self.mixing(images.clone(), labels)  # it mixes in place
        return F.cross_entropy(self.backbone(images), targets)
