"""Pictures: predictions next to ground truth, directions found by a search, receptive fields."""
from .directions import draw_directions
from .pictures import class_colors, draw_instances, draw_regions, side_by_side
from .receptive_fields import draw_receptive_fields

__all__ = ['class_colors', 'draw_directions', 'draw_instances', 'draw_receptive_fields',
           'draw_regions', 'side_by_side']
