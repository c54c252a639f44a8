"""Predictions in a file."""
from __future__ import annotations

from mmengine.evaluator import DumpResults

from ..registry import METRICS

__all__ = ['DumpSegmentation']


@METRICS.register_module()
class DumpSegmentation(DumpResults):
    """Write label maps to a pickle file, one dict per image.

    The class scores are left out: 150 float maps per image would take gigabytes.

    Args:
        out_file_path: the file, ending with .pkl or .pickle.
        collect_device: where several processes bring their results together, "cpu" or "gpu".
    """

    def __init__(self, out_file_path: str, collect_device: str = 'cpu'):
        super().__init__(out_file_path=out_file_path, collect_device=collect_device)

    def process(self, data_batch, predictions) -> None:
        """Keep the label map and the picture's path and size of each prediction."""
        super().process(data_batch, [
            {key: value for key, value in sample.items()
             if key in ('pred_sem_seg', 'img_path', 'ori_shape')} for sample in predictions])
