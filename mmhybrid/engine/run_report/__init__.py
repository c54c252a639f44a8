"""What a training leaves beside its checkpoints: tables, curves, and where everything is."""
from .hook import RunReportHook
from .summary import tell_end

__all__ = ['RunReportHook', 'tell_end']
