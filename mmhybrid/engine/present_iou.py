"""Where the metric stood at first: configs inside older checkpoints import it from here."""
from mmhybrid.evaluation.present_iou import PresentIoUMetric

__all__ = ['PresentIoUMetric']
