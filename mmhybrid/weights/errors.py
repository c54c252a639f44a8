"""The one error of this part: a file of weights that is not loaded, and what to do about it."""

__all__ = ['WeightsError']


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message says why and what to do, in one line."""
