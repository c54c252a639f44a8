"""Pictures: predictions next to ground truth, and what a search for directions found."""
from .directions import draw_directions
from .pictures import draw_instances, draw_regions, side_by_side

__all__ = ['draw_directions', 'draw_instances', 'draw_regions', 'side_by_side']
