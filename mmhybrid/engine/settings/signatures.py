"""Which keywords a class takes, through the ``**kwargs`` that it hands to its bases."""
from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

__all__ = ['Keywords', 'keywords']


class Keywords(NamedTuple):
    """Names that are known, and whether more may be meant."""

    names: frozenset[str]
    open: bool = False

    def __or__(self, other: Keywords) -> Keywords:
        return Keywords(self.names | other.names, self.open or other.open)


ANYTHING = Keywords(frozenset(), True)
NOTHING = Keywords(frozenset(), False)
# Their classes ignore keywords by mistake; a drop-in class of a project does it on purpose.
_OF_MM = ('mmengine', 'mmcv', 'mmdet', 'mmseg')


@functools.cache
def keywords(target: Callable) -> Keywords:
    """Keywords of a class or function.

    A ``**kwargs`` that a constructor hands to the next one adds that one's names. One that goes
    elsewhere, to a function or into an attribute, may hold anything.

    Args:
        target: class, function or partial.
    """
    if isinstance(target, functools.partial):
        return keywords(target.func)
    if not inspect.isclass(target):
        return _own(target)[0]
    if type(target).__call__ is not type.__call__ or any(
            '__new__' in vars(cls) for cls in target.__mro__ if cls is not object):
        # __init__ is not all that takes them: a named tuple, a metaclass of the user's
        return Keywords(_through_bases(target.__mro__).names, True)
    return _through_bases(target.__mro__)


def _through_bases(classes: tuple[type, ...]) -> Keywords:
    for index, cls in enumerate(classes):
        if cls is nn.Module:
            return NOTHING  # it takes keywords, and refuses all
        if '__init__' not in vars(cls) or cls is object:
            continue
        found, calls = _own(vars(cls)['__init__'])
        names = [each.__name__ for each in classes]
        for after, name in calls:
            start = names.index(name) + after if name in names else index + 1
            # Keywords for a plain object: the real base is not installed, mmdet's ReID for example.
            found |= _through_bases(classes[start:]) if classes[start:] != (object,) else ANYTHING
        return found
    return NOTHING


def _own(function: Callable) -> tuple[Keywords, list[tuple[bool, str | None]]]:
    """What a function names itself, and the constructors that get its ``**kwargs``.

    Those are (whether the one after it is meant, name of a class or None for this one).
    """
    try:  # through decorators, to what is wrapped or to the signature that they give it
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        return ANYTHING, []
    names = frozenset(each.name for each in parameters if each.kind in (
        each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)) - {'self'}
    swallows = next((each.name for each in parameters if each.kind is each.VAR_KEYWORD), None)
    if swallows is None:
        return Keywords(names), []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return Keywords(names, True), []
    uses = list(_uses(tree, swallows))
    read = {what for how, what in uses if how == 'key'}
    calls = [what for how, what in uses if how == 'constructor']
    elsewhere = any(how == 'elsewhere' for how, _ in uses) if uses else (
        function.__module__.partition('.')[0] not in _OF_MM)
    return Keywords(names | read, elsewhere), calls


def _uses(tree: ast.AST, name: str) -> Iterator[tuple[str, object]]:
    """What becomes of the dictionary ``name``: ("key" | "constructor" | "elsewhere", which)."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Name) and node.id == name):
            continue
        parent = parents[node]
        above = parents.get(parent)
        if isinstance(parent, ast.Subscript) and isinstance(parent.slice, ast.Constant):
            yield 'key', str(parent.slice.value)
        elif isinstance(parent, ast.Compare) and isinstance(parent.left, ast.Constant):
            yield 'key', str(parent.left.value)
        elif isinstance(parent, ast.Attribute) and isinstance(above, ast.Call):
            if parent.attr in ('pop', 'get', 'setdefault') and above.args and isinstance(
                    above.args[0], ast.Constant):
                yield 'key', str(above.args[0].value)
            elif parent.attr != 'update':
                yield 'elsewhere', parent.attr
        elif isinstance(parent, ast.keyword) and parent.arg is None and _constructor(above):
            yield 'constructor', _constructor(above)
        else:
            yield 'elsewhere', type(parent).__name__


def _constructor(call: ast.AST) -> tuple[bool, str | None] | None:
    """The class whose ``__init__`` is called: ``super()``, ``super(Name, self)`` or ``Name``."""
    function = call.func if isinstance(call, ast.Call) else None
    if not isinstance(function, ast.Attribute) or function.attr != '__init__':
        return None
    owner = function.value
    if not isinstance(owner, ast.Call):
        return False, getattr(owner, 'id', getattr(owner, 'attr', None))
    if getattr(owner.func, 'id', None) != 'super':
        return None
    return True, getattr(owner.args[0], 'id', None) if owner.args else None
