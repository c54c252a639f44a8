"""``--cfg-options KEY=VALUE ...`` and options that are empty.

mmengine's parser and merging answer a slip of the pen with a traceback, or put something into the
config that nobody asked for.
"""
from __future__ import annotations

import re

from mmengine.config import Config, DictAction

from ..errors import UserError

__all__ = ['OptionsAction', 'check_options']

CLOSING = {')': '(', ']': '['}
DICT = re.compile(r'(?:^|[\[(,])\s*(?:dict\(|\{\s*[\'"\w]+\s*[:}])|^\{\s*\}$')
OFF = (None, True, False)  # what a group of settings may be replaced by


class OptionsAction(DictAction):
    """Reads ``KEY=VALUE``; a value is a number, True, False, None, text, or a list of these."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Parse ``values``; UserError names the one that cannot be read."""
        for text in values:
            _check_text(text)
        try:
            super().__call__(parser, namespace, values, option_string)
        except RecursionError:
            raise UserError(f'--cfg-options {" ".join(values)}: brackets that cannot be told '
                            'apart. Several tuples need a list around them, '
                            'KEY="[(1,2),(3,4)]".') from None


def _check_text(text: str) -> None:
    key, equals, value = text.partition('=')
    if not equals:
        raise UserError(f'--cfg-options takes KEY=VALUE, got {text!r}. Without spaces around the '
                        'equals sign, and in quotes if there are spaces or brackets in it.')
    _check_key(key, text)
    if DICT.search(value):
        raise UserError(f'--cfg-options {text}: a dict cannot be given on the command line. Set '
                        f'its entries one by one, {key}.ENTRY=VALUE, those of a list with their '
                        f'number, {key}.0.ENTRY=VALUE, or write a config with _base_.')
    if not _balanced(value):
        raise UserError(f'--cfg-options {text}: a bracket has no counterpart. Expected for example '
                        f'{key}=1,2 or {key}="[(1,2),(3,4)]".')
    if any(part.strip(' \'"()[]').lower() in ('nan', '-nan', '+nan') for part in value.split(',')):
        raise UserError(f'--cfg-options {text}: nan is not a value for a setting. Expected a '
                        'number, text, True, False or None.')


def _check_key(key: str, text: str) -> None:
    if key != key.strip() or re.search(r'\s', key) or not all(key.split('.')):
        raise UserError(f'--cfg-options {text}: {key!r} is not a name of a setting. Expected names '
                        'with dots between them, such as train_cfg.max_epochs=1.')


def _balanced(value: str) -> bool:
    """Whether brackets fit; one inside a name, such as "a(b", is part of the text."""
    value = value.strip('\'"')
    if ',' not in value and value[:1] not in ('(', '[') and value[-1:] not in (')', ']'):
        return True
    opened = []
    for mark in value:
        if mark in '([':
            opened.append(mark)
        elif mark in ')]' and (not opened or opened.pop() != CLOSING[mark]):
            return False
    return not opened


def check_options(cfg: Config, options: dict) -> None:
    """Raise UserError if an option does not fit the config that it changes.

    Args:
        cfg: the config, before the options are merged into it.
        options: values by dotted key.
    """
    keys = list(options)
    for place, (key, value) in enumerate(options.items()):
        _check_key(key, f'{key}={value}')
        # The other way round the later value takes the place of the group.
        below = next((other for other in keys[place:] if other.startswith(f'{key}.')), None)
        if below is not None and not isinstance(value, dict):
            raise UserError(f'--cfg-options sets {key}={value} and {below}={options[below]}: {key} '
                            'cannot be a value and a group of settings.')
        _check_place(cfg, key, value)


def _check_place(cfg: Config, key: str, value) -> None:
    if isinstance(value, str) and not value and key in (
            'work_dir', 'load_from', 'pretrained', 'resume'):
        raise UserError(f'--cfg-options {key}= is empty. Expected a path, or {key}=None.')
    node, parts = cfg._cfg_dict, key.split('.')
    for depth, part in enumerate(parts):
        here = '.'.join(parts[:depth])
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f'--cfg-options {key}={value}: {here} is a list of {len(node)} '
                                f'entries, which are numbered from 0, so {part!r} is none of them.')
            node = node[int(part)]
        elif isinstance(node, dict):
            if part not in node:
                return
            node = node[part]
        else:
            raise UserError(f'--cfg-options {key}={value}: {here} is {node!r} in the config, which '
                            f'has no entry {part!r}.')
    _check_replaced(node, key, value)


def _check_replaced(node, key: str, value) -> None:
    """A group of settings is switched off or replaced by another, but is not a number or text."""
    if isinstance(node, dict) and ('type' in node or '.' not in key):
        if not isinstance(value, dict) and not any(value is each for each in OFF):
            kind = f' of type {node["type"]}' if 'type' in node else ''
            raise UserError(f'--cfg-options {key}={value}: {key} is a group of settings{kind}. Set '
                            f'its entries, {key}.ENTRY=VALUE, or switch it off with {key}=None.')
    elif isinstance(node, list) and any(isinstance(each, dict) for each in node):
        fits = isinstance(value, list) and all(isinstance(each, dict) for each in value)
        if value is not None and not isinstance(value, dict) and not fits:
            raise UserError(f'--cfg-options {key}={value}: {key} is a list of {len(node)} groups '
                            f'of settings. Set their entries, {key}.0.ENTRY=VALUE, or write a '
                            'config with _base_.')
