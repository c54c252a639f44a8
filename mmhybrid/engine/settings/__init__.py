"""Settings that nothing reads are refused."""
from .check import check_settings, unknown_settings

__all__ = ['check_settings', 'unknown_settings']
