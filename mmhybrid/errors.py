"""Errors that a person can act on."""

__all__ = ['UserError']


class UserError(ValueError):
    """Something the user can put right. The tools print its text without a traceback."""
