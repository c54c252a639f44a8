"""The MambaVision mixer as one differentiable operator: see README.md beside this file."""

from .fused import fused_mixer, mix, prepared, unsupported_reason

__all__ = ['fused_mixer', 'mix', 'prepared', 'unsupported_reason']
