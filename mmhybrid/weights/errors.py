"""The one error of this part: a file of weights that is not loaded, and what to do about it."""

__all__ = ['WeightsError', 'printable']


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message says why and what to do, in one line."""


def printable(text: object, longest: int = 1000) -> str:
    """Make a text of a file fit for one line of any log: what no log can show is escaped."""
    text = str(text)
    shown = ''.join(sign if sign.isprintable() else sign.encode('unicode_escape').decode()
                    for sign in text[:longest])
    return shown + ('...' if len(text) > longest else '')
