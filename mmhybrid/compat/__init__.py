"""Everything that mmhybrid changes in other packages and in Python, and the way to leave it alone.

``import mmhybrid`` and whatever registers models or hooks call :func:`install`; importing
``mmhybrid.ops`` or ``mmhybrid.layers`` does not. Each change is a :class:`Patch` with a name, and
the environment variable ``MMHYBRID_WITHOUT`` names those that are not wanted. ``mmhybrid doctor``
lists them, and docs/patches.md has a paragraph on each.
"""

from .patch import NAMES, VARIABLE, Patch, apply, switched_off

__all__ = ['NAMES', 'VARIABLE', 'Patch', 'apply', 'install', 'switched_off']


def install() -> None:
    """Apply all patches of an import; doing it twice changes nothing."""
    from .at_import import PATCHES

    for patch in PATCHES:
        apply(patch)
