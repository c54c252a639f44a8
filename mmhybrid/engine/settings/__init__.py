"""Settings that nothing reads are refused."""
from .check import check_settings, unknown_settings
from .custom_keys import check_custom_keys

__all__ = ['check_custom_keys', 'check_settings', 'unknown_settings']
