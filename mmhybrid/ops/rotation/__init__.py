"""A residual sum whose channel pairs are turned, in one kernel."""

from .fused import rotated_sum, unsupported_reason

__all__ = ['rotated_sum', 'unsupported_reason']
