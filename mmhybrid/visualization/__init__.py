"""Pictures: predictions next to ground truth, and what a search for directions found."""
from .directions import draw_directions
from .pictures import class_colors, draw_instances, draw_regions, side_by_side

__all__ = ['class_colors', 'draw_directions', 'draw_instances', 'draw_regions', 'side_by_side']
