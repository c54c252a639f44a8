"""Refuse settings that nothing reads.

A config is a tree of dictionaries from many files and the command line, and most readers take what
they know and leave the rest. Here every name is held against those that are known at its place: the
arguments of the class that ``type`` names, or a table where a dictionary has no type. Where neither
tells, for a class of a package that is not installed for example, nothing is said.
"""
from __future__ import annotations

import ast
import functools
import importlib.util
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config

from mmhybrid.errors import UserError
from mmhybrid.spelling import did_you_mean, is_slip, nearest

from .signatures import ANYTHING, Keywords, keywords
from .tables import (
    DEFAULT_TYPES,
    EXTRA,
    KINDS,
    KWARGS,
    OPAQUE,
    OPERATORS,
    PLACES,
    SETTINGS,
    UNREGISTERED,
    VARIABLES,
)
from .types import PACKAGES, find, known_types

__all__ = ['Unknown', 'check_settings', 'unknown_settings']

# What mmengine itself takes out of every dictionary.
_RESERVED = frozenset(('type', '_scope_', '_delete_'))


class Unknown(NamedTuple):
    """A name that nothing knows at its place."""

    path: str
    value: object
    near: str | None = None
    kind: str | None = None  # of the registry, if an unknown type is meant

    def __str__(self) -> str:
        text = f'{self.path}={reprlib.repr(self.value)}'
        if self.kind:
            return f'{text}: no {self.kind} of this name is registered.{did_you_mean(self.near)}'
        return f'{text}: nothing reads this.' + (did_you_mean(self.near) if self.near else '')


def check_settings(cfg: Config, path: str, before: Iterable[str], options: Iterable[str]
                   ) -> list[str]:
    """Refuse a config with names that nothing reads.

    Args:
        cfg: the whole config, with the options of the command line.
        path: the file it was read from.
        before: top-level names that the file sets.
        options: names that ``--cfg-options`` sets.

    Returns:
        Warnings about options that change variables of the files: too late to have an effect.

    Raises:
        UserError: naming every unknown setting, where it is and what was probably meant.
    """
    meant = _meant(cfg, path)
    found = [*_unknown_top(cfg, path, set(before), options), *unknown_settings(cfg)]
    found = [each for each in found if each.path not in meant]
    if not found:
        return [f'--cfg-options {each}: this is a variable of the config files, which are composed '
                'by now. Change the settings that were made from it.'
                for each in options if each.partition('.')[0] not in SETTINGS]
    listed = '\n'.join(f'  {each}' for each in found)
    paths = ','.join(each.path for each in found)
    raise UserError(
        f'{path}{" with --cfg-options" if options else ""} has settings of no effect:\n{listed}\n'
        'Correct or remove them. If code of your own reads them, say so: --cfg-options '
        f'extra_settings={paths} , or the same as a list in the config.')


def _meant(cfg: Config, path: str) -> set[str]:
    names = cfg.get('extra_settings') or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(each, str) for each in names):
        raise UserError(f'extra_settings of {path} must be a list of paths such as '
                        f"['model.test_cfg.mine'], got {names!r}.")
    return set(names)


# --- names at the top -----------------------------------------------------------------------------

def _unknown_top(cfg: Config, path: str, before: set[str], options: Iterable[str]
                 ) -> Iterator[Unknown]:
    for name in dict.fromkeys(option.partition('.')[0] for option in options):
        if name not in before | SETTINGS and name in cfg:
            yield Unknown(name, cfg[name], nearest(name, before | SETTINGS))
    for name in sorted(before & set(cfg) - SETTINGS - VARIABLES):
        slips = [each for each in SETTINGS if is_slip(name, each)]
        if slips and not (path.endswith('.py') and name in _names_read(path)):
            yield Unknown(name, cfg[name], nearest(name, slips))


def _names_read(path: str) -> set[str]:
    """Variables that a config file or one of its bases reads."""
    names, files = set(), [path]
    for file in files:  # grows
        tree = ast.parse(Path(file).read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)  # _base_.name
            elif isinstance(node, ast.Constant) and '_base_.' in str(node.value):
                names.update(str(node.value).strip('{} ').split('.'))  # '{{_base_.name}}'
        bases = [Config._get_cfg_path(base, file)[0] for base in Config._get_base_files(file)]
        bases += _imported(tree, Path(file))
        files += [base for base in bases if base.endswith('.py') and base not in files
                  and Path(base).is_file()]
    return names


def _imported(tree: ast.AST, file: Path) -> Iterator[str]:
    """Bases of a config of pure Python: what it imports below ``with read_base()``."""
    for block in (node for node in ast.walk(tree) if isinstance(node, ast.With)):
        for line in block.body:
            if not isinstance(line, ast.ImportFrom):
                continue
            if not line.level:
                spec = importlib.util.find_spec(line.module)
                yield spec.origin if spec and spec.origin else ''
                continue
            folder = file.resolve().parents[line.level - 1]
            for name in [line.module] if line.module else [each.name for each in line.names]:
                yield str(folder.joinpath(*name.split('.')).with_suffix('.py'))


# --- names further down ---------------------------------------------------------------------------

def unknown_settings(cfg: Config) -> list[Unknown]:
    """Names below the top level that nothing reads."""
    scope = cfg.get('default_scope') or 'mmengine'
    found: list[Unknown] = []
    for name in sorted(SETTINGS.intersection(cfg)):
        _visit(cfg[name], (name,), ('^', name), (scope,) if isinstance(scope, str) else (), found)
    return found


def _visit(node: object, path: tuple, place: tuple[str, ...], scopes: tuple[str, ...],
           found: list[Unknown], own: bool = False) -> None:
    """Look at a dictionary and those below; ``own`` if a class of the user's gets it.

    What such a class reads from it, and by which registry it builds it, nobody knows: only names
    that nearly are known ones are wrong there.
    """
    if isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            _visit(item, (*path, index), place, scopes, found, own)
    if not isinstance(node, Mapping):
        return
    try:
        kind, items = node.get('type'), list(node.items())
    except ImportError:  # a class of a package that is not installed, in a config of pure Python
        return
    if isinstance(node.get('_scope_'), str):
        scopes = (node['_scope_'], *scopes)
    if place == ('^', 'optim_wrapper') and any(
            isinstance(value, Mapping) and 'optimizer' in value for _, value in items):
        return  # several wrappers, of a constructor of the user's
    known = _known(place, kind, scopes)
    if own:
        known = known | ANYTHING if isinstance(known, Keywords) else ANYTHING
    if isinstance(known, str):
        what = _at(KINDS, place) or 'class'
        found.append(Unknown(_text(path, 'type'), kind, known, what))
    if not isinstance(known, Keywords):
        return
    found += _unknown_names(node, path, known)
    own = own or any(map(_is_own, _readers(node, place, scopes)))
    if isinstance(kind, str) and kind.count('.') == 1:
        scopes = (*scopes, kind.partition('.')[0])
    if not (isinstance(kind, str) and kind in OPAQUE):
        for key, value in items:
            below = (*place, 'two_stage', str(key)) if 'roi_head' in node else (*place, str(key))
            _visit(value, (*path, key), below, scopes, found, own)


def _readers(node: Mapping, place: tuple[str, ...], scopes: tuple[str, ...]) -> Iterator[Callable]:
    """Classes and functions that get a dictionary."""
    if isinstance(node.get('type'), str):
        yield from _targets(node['type'], place, scopes)[0]
    elif callable(node.get('type')):
        yield node['type']
    if place == ('^', 'optim_wrapper') and isinstance(node.get('constructor'), str):
        yield from find(node['constructor'], scopes, 'optimizer wrapper constructor')[0]


def _is_own(reader: Callable) -> bool:
    reader = reader.func if isinstance(reader, functools.partial) else reader
    return (getattr(reader, '__module__', None) or '').partition('.')[0] not in PACKAGES


def _unknown_names(node: Mapping, path: tuple, known: Keywords) -> Iterator[Unknown]:
    valid = known.names | {'type'}
    for key in node:
        if key not in valid and key not in _RESERVED:
            near = nearest(str(key), valid)
            if not known.open or near is not None and is_slip(str(key), near):
                yield Unknown(_text(path, key), node[key], near)


def _text(path: tuple, key: object) -> str:
    return '.'.join(map(str, (*path, key)))


def _known(place: tuple[str, ...], kind: object, scopes: tuple[str, ...]) -> Keywords | str | None:
    """Names that may stand at a place.

    Returns:
        The names; or a text, the type that was probably meant, if there is none of this name; or
        None if nothing can be said about the place and all below.
    """
    if place[-1] in UNREGISTERED:
        return None
    if isinstance(kind, str):
        targets, everywhere = _targets(kind, place, scopes)
        if not targets:
            return _near_type(kind, place, scopes) if everywhere else None
    elif callable(kind):
        targets = [kind]
    elif kind is None and _at(DEFAULT_TYPES, place):
        targets = _at(DEFAULT_TYPES, place)
    elif kind is None and _at(PLACES, place):
        return _table(_at(PLACES, place))
    else:
        return ANYTHING
    return functools.reduce(Keywords.__or__, map(_taken, targets), _table(_at(EXTRA, place) or ''))


def _targets(kind: str, place: tuple[str, ...], scopes: tuple[str, ...]
             ) -> tuple[list[Callable], bool]:
    if place[-1] not in OPERATORS:
        return find(kind, scopes, _at(KINDS, place))
    import mmcv.ops
    found = getattr(mmcv.ops, kind, None)
    return ([found] if found is not None else []), True


def _near_type(kind: str, place: tuple[str, ...], scopes: tuple[str, ...]) -> str | None:
    prefix, dot, short = kind.rpartition('.')
    if place[-1] in OPERATORS:
        import mmcv.ops
        names = vars(mmcv.ops)
    else:
        names = known_types((prefix,) if prefix else scopes, _at(KINDS, place))
    near = nearest(short, names)
    return prefix + dot + near if near is not None and is_slip(short, near) else None


def _taken(target: Callable) -> Keywords:
    names, more = keywords(target), KWARGS.get(getattr(target, '__name__', None))
    return names if more is None else Keywords(names.names) | _table(more)


@functools.cache
def _table(text: str) -> Keywords:
    names = frozenset(text.split())
    return Keywords(names - {'...'}, '...' in names)


def _at(table: Mapping, place: tuple[str, ...]):
    """The entry for the longest end of a place; None without one."""
    for start in range(len(place)):
        for end in (place[start:], (*place[start:-1], '*')):
            entry = table.get('.'.join(end))
            if entry is not None:
                return entry
    return None
