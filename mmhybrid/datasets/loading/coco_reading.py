"""Let mmdet read annotation files as the check before it has."""
from __future__ import annotations

from functools import partial

__all__ = ['read_coco_alike']


def read_coco_alike() -> None:
    """Make pycocotools read UTF-8 everywhere, and take a missing "iscrowd" for 0.

    It opens files in the encoding of the locale, where a byte order mark, as Windows writes it, is
    an error.  Its evaluation fails without "iscrowd", after an epoch; training does not need it.
    """
    from pycocotools import coco
    if 'open' in vars(coco):
        return
    index = coco.COCO.createIndex

    def create_index(self):
        for entry in self.dataset.get('annotations', []):
            if 'bbox' in entry and entry.get('iscrowd') is None:
                entry['iscrowd'] = 0
        index(self)

    coco.open = partial(open, encoding='utf-8-sig')
    coco.COCO.createIndex = create_index
