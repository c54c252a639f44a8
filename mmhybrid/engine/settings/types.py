"""What the text after ``type=`` stands for. Looks names up; never imports what a config names."""
from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator

from mmengine import registry as roots
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry

__all__ = ['PACKAGES', 'find', 'known_types']

ROOTS = {each.name: each for each in vars(roots).values() if isinstance(each, Registry)}
#: Packages whose classes are known, and may be looked into by the dotted name of a class.
PACKAGES = ('mmhybrid', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'torch')


def find(name: str, scopes: tuple[str, ...], kind: str | None = None
         ) -> tuple[list[Callable], bool]:
    """Classes and functions that may be meant by a name.

    Args:
        name: such as "ResNet", "mmdet.ResNet" or "mmdet.models.ResNet".
        scopes: where registries look first.
        kind: of the registry that will build it; None if any may.

    Returns:
        One per kind of registry that knows the name, and whether all places where it could be were
        looked at (a package may not be installed).
    """
    kinds = [root for root in ROOTS.values() if kind in (None, root.name)]
    prefix, _, short = name.rpartition('.')
    if prefix and '.' not in prefix and (prefix in PACKAGES or _importable(prefix)):
        found = [each for root in kinds if (each := _in_scope(root, prefix, short))]
        return found or _dotted(name), bool(_importable(prefix))
    if prefix:
        return _dotted(name), False
    found = []
    for root in kinds:
        hits = (_in_scope(root, scope, name) for scope in (*scopes, root.scope))
        found += [hit for hit in hits if hit is not None][:1]
    return found, all(scope == 'mmengine' or _importable(scope) for scope in scopes)


def known_types(scopes: tuple[str, ...], kind: str | None = None) -> Iterator[str]:
    """Registered names, of one kind of registry or of all."""
    for root in ROOTS.values():
        if kind in (None, root.name):
            for registry in (root, *(root.children[scope] for scope in scopes
                                     if scope in root.children)):
                yield from registry.module_dict


def _in_scope(root: Registry, scope: str, name: str) -> Callable | None:
    if not _importable(scope):
        return None
    if scope == root.scope:
        return root.module_dict.get(name)
    registry = root.children.get(scope)
    if registry is None:
        return None
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some say there what they do not find
            registry.import_from_location()
    except Exception:  # whatever a package that is not whole raises; building it will say so
        return None
    return registry.module_dict.get(name)


@functools.cache
def _importable(scope: str) -> bool:
    """Whether the registries of a package are there; if it is one of mm's, they are imported."""
    if scope in ('mmengine', 'mmhybrid') or any(scope in root.children for root in ROOTS.values()):
        return True
    if scope not in MODULE2PACKAGE:
        return False
    try:
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(f'{scope}.registry')
    except Exception:  # not installed, or not whole
        return False
    return True


def _dotted(name: str) -> list[Callable]:
    """A class by the name of its module, if that is imported already."""
    module, _, attribute = name.rpartition('.')
    if name.partition('.')[0] not in PACKAGES or module not in sys.modules:
        return []
    found = getattr(sys.modules[module], attribute, None)
    return [found] if callable(found) else []
