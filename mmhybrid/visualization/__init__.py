"""Pictures of predictions next to ground truth."""
from .pictures import draw_instances, draw_regions, side_by_side

__all__ = ['draw_instances', 'draw_regions', 'side_by_side']
