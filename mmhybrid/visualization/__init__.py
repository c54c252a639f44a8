"""Pictures: predictions next to ground truth, what networks look at, directions, mistakes."""
from .charts import draw_bars
from .directions import draw_directions
from .heat import as_colors, draw_heat, draw_map, mark
from .pictures import class_colors, draw_instances, draw_regions, sheet, side_by_side
from .receptive_fields import draw_receptive_fields
from .training import draw_confusion, draw_curves

__all__ = ['as_colors', 'class_colors', 'draw_bars', 'draw_confusion', 'draw_curves',
           'draw_directions', 'draw_heat', 'draw_instances', 'draw_map', 'draw_receptive_fields',
           'draw_regions', 'mark', 'sheet', 'side_by_side']
