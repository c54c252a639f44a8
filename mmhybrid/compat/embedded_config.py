"""The config that training writes into a checkpoint, as data of somebody else.

Inferencers that are given nothing but a checkpoint build what its config describes.  The text is a
Python file, so only texts that set plain values are accepted; and values can do harm as well: a
``type`` may name any function, an entry may name modules to import or files that are executed when
they are read.  Such entries are taken out, and whoever reads the log learns which.
"""
from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import io
import keyword
import re
import tokenize

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

__all__ = ['PACKAGES', 'plain_config', 'settled_text']

#: Packages whose code may run because a checkpoint asks for it; they are installed and imported.
PACKAGES = ('mmhybrid', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
_LARGEST = 2**21  # characters; configs have some ten thousand
_TOKENS = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP, tokenize.NEWLINE,
           tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER)
_SIGNS = frozenset(('(', ')', '[', ']', '{', '}', ',', ':', '=', '-', '**'))
# Built from nothing but their settings, these write files or start runs.
_STARTING = ('runner', 'runner constructor', 'strategy', 'inferencer', 'log_processor')
# Settings beside ``type`` that are looked up by their names.
_NAMES = ('collate_fn', 'worker_init_fn', 'norm_layer', 'act_layer', 'auto_wrap_policy',
          'param_init_fn', 'init_fn', 'check_fn', 'policy')
# Where a text of the config would be run or unpickled, whatever the class:
_HARMFUL = (
    ('warp_mode', r'(?!cv2\.MOTION_[A-Z]+\Z).*', 'is run as Python'),
    ('split_file', r'.*', 'names a file that is unpickled'),
    ('checkpoint_path|sys_path|conf_path|(?i:weights)', r'.*',
     'names a file that is read without our checks'),
    (r'((\w+_)?model_|tokenizer_)?name', r'.*(:|/).*',
     'names a model elsewhere, which is read without our checks'),
    (r'(\w+_)?(config|cfg)', r'(?i).*\.(py|json|ya?ml)', 'names a config that is run'),
    (r'(\w+_)?save_(dir|file)', r'(/|~|[A-Za-z]:|.*\.\.).*', 'names a place to write to'),
    (r'.*', r'(?i)(.*\.)?(pkl|pickle|npy|np)', 'names a file that is unpickled'),
    (r'.*', r'(?i)(.*\.)?ya?ml', 'names a file of YAML, which mmengine lets run code'),
)


def plain_config(text: object) -> dict | None:
    """Read a config that does nothing but set names to literals and ``dict(...)``.

    Returns:
        What it sets; None if it does more, or is not a config.
    """
    # mmengine replaces {{ }} in the text before Python reads it, so that quotes may end elsewhere
    if not isinstance(text, str) or len(text) > _LARGEST or '{{' in text:
        return None
    try:
        text.encode()
        if not _has_plain_tokens(text):
            return None
        lines = ast.parse(text).body
        if not all(map(_is_plain_line, lines)):
            return None
        names = [target.id for line in lines for target in line.targets]
        if len(set(names)) < len(names):  # mmengine runs the first _base_ and keeps the last
            return None
        return {target.id: _value(line.value) for line in lines for target in line.targets}
    except (SyntaxError, tokenize.TokenError, TypeError, ValueError, RecursionError, MemoryError):
        return None


def _has_plain_tokens(text: str) -> bool:
    """Whether Python's parser may see it: enough of some signs would end the process."""
    before = ''
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, word = token.type, token.string
        if kind not in _TOKENS or kind == tokenize.OP and word not in _SIGNS:
            return False
        if kind == tokenize.STRING and re.match('[a-zA-Z]?[fF]', word) or before == word == '-':
            return False
        if keyword.iskeyword(word) and word not in ('True', 'False', 'None'):
            return False
        before = word
    return True


def _is_plain_line(line: ast.stmt) -> bool:
    return isinstance(line, ast.Assign) and _is_plain(line.value) and all(
        isinstance(target, ast.Name) and target.id not in ('dict', 'float')
        for target in line.targets)


def _is_plain(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return all(map(_is_plain, node.elts))
    if isinstance(node, ast.Dict):
        return all(key is not None and _is_plain(key) for key in node.keys) and all(
            map(_is_plain, node.values))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        # float: infinities
        return node.func.id in ('dict', 'float') and all(
            map(_is_plain, [*node.args, *(item.value for item in node.keywords)]))
    return False


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand)
    if isinstance(node, ast.Dict):
        return {_value(key): _value(each)
                for key, each in zip(node.keys, node.values, strict=True)}
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        return kind(map(_value, node.elts))
    args = [_value(each) for each in node.args]
    if node.func.id == 'float':
        return float(*args)
    result = dict(*args)
    for item in node.keywords:  # without a name: **
        result.update({item.arg: _value(item.value)} if item.arg else _value(item.value))
    return result


def settled_text(text: str, values: dict) -> tuple[str, list[str]]:
    """Take entries that can do harm out of a config.

    Args:
        text: the config.
        values: what it sets; see :func:`plain_config`.

    Returns:
        The text, unchanged if all of it may stay, and what was taken out and why.
    """
    dropped: list[str] = []
    kept = _kept_entries(values, '', dropped)
    if not dropped:
        return text, []
    return ''.join(f'{name} = {_written(value)}\n' for name, value in kept.items()), dropped


_GONE = object()


def _kept(value: object, place: str, dropped: list[str]) -> object:
    """Copy a value without what can do harm; ``_GONE`` if that is the value itself."""
    if isinstance(value, dict):
        problem = _type_problem(value['type']) if 'type' in value else None
        if problem:
            dropped.append(f'{place} (type={value["type"]!r:.80} {problem})')
            return _GONE
        return _kept_entries(value, f'{place}.', dropped)
    if isinstance(value, (list, tuple)):
        items = [_kept(each, f'{place}[{index}]', dropped) for index, each in enumerate(value)]
        return type(value)(each for each in items if each is not _GONE)
    if isinstance(value, str):
        return _kept_text('', value, place, dropped)
    return value


def _kept_entries(values: dict, place: str, dropped: list[str]) -> dict:
    pairs = {key: _kept_entry(key, value, f'{place}{key}', dropped)
             for key, value in values.items()}
    return {key: value for key, value in pairs.items() if value is not _GONE}


def _kept_entry(key: object, value: object, place: str, dropped: list[str]) -> object:
    if key == 'custom_imports':
        return _kept_imports(value, place, dropped)
    if key == '_base_':
        return _kept_bases(value, place, dropped)
    if key in ('default_scope', '_scope_') and value is not None and value not in PACKAGES:
        dropped.append(f'{place}={value!r:.80} (imports another package than '
                       f'{", ".join(PACKAGES)})')
        return _GONE
    problem = _type_problem(value) if key in _NAMES else None
    if problem:
        dropped.append(f'{place}={value!r:.80} ({problem})')
        return _GONE
    if isinstance(value, str):
        return _kept_text(str(key), value, place, dropped)
    return _kept(value, place, dropped)


def _kept_text(key: str, value: str, place: str, dropped: list[str]) -> object:
    for keys, pattern, why in _HARMFUL:
        if re.fullmatch(keys, key) and re.fullmatch(pattern, value, re.DOTALL):
            dropped.append(f'{place}={value!r:.80} ({why})')
            return _GONE
    return value


def _kept_imports(value: object, place: str, dropped: list[str]) -> object:
    """Keep imports of our and mmengine's packages, which are imported anyway."""
    settings = value if isinstance(value, dict) else {}
    given = settings.get('imports')
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    kept = [name for name in names if isinstance(name, str) and re.fullmatch(
        rf'({"|".join(PACKAGES)})(\.(?!_)\w+)*', name)]
    if value is None or isinstance(value, dict) and len(kept) == len(names) and isinstance(
            given, (str, list)) and set(settings) <= {'imports', 'allow_failed_imports'}:
        return value
    dropped.append(f'{place}={value!r:.120} (imports another package than '
                   f'{", ".join(PACKAGES)})')
    return dict(imports=kept, allow_failed_imports=True) if kept else _GONE


def _kept_bases(value: object, place: str, dropped: list[str]) -> object:
    """Keep ``_base_`` files of installed packages; every other one would be executed."""
    files = value if isinstance(value, list) else [value]
    if all(isinstance(file, str) and '..' not in file and re.fullmatch(
            rf'({"|".join(PACKAGES)})::\w[\w.-]*(/[\w.-]+)*\.py', file) for file in files):
        return value
    dropped.append(f'{place}={value!r:.80} (runs a file)')
    return _GONE


# --- what a type leads to ---

def _type_problem(name: object) -> str | None:
    """Say why a ``type`` must not be built; None if it may."""
    if not isinstance(name, str):
        return None  # a setting that is called so; a registry takes nothing but text
    parts = name.split('.')
    if not all(part.isidentifier() and not part.startswith('__') for part in parts):
        return 'is not a name'
    if name == 'RFSearchHook' or name.endswith('.RFSearchHook'):
        return 'runs texts of its settings as Python'
    if len(parts) == 1:
        # Registries import what they do not have; and some places look a type up on their own.
        if not _is_registered_name(name) and (hasattr(builtins, name) or _is_module(name)):
            return 'is registered nowhere, and is a function or a module of Python'
        return None
    if parts[0] not in (*PACKAGES, 'torch'):
        return f'is nothing of {", ".join(PACKAGES)}'
    if parts[0] == 'torch' and parts[1] not in ('nn', 'optim'):
        return 'is neither a layer nor an optimizer'
    try:
        found = get_object_from_string(name)
    except Exception:  # whatever a module raises that cannot be imported here
        return 'leads to a module that cannot be imported'
    if found is None:  # a registered name with its scope, or nothing
        return None if len(parts) == 2 else 'leads to nothing'
    return _object_problem(found)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return True


def _registries():
    waiting = [each for each in vars(mmengine_registry).values() if isinstance(each, Registry)]
    while waiting:
        registry = waiting.pop()
        yield registry
        waiting.extend(registry.children.values())


def _is_registered_name(name: str) -> bool:
    return any(name in registry.module_dict for registry in _registries())


def _object_problem(found: object) -> str | None:
    """Say why what a dotted name leads to must not be built."""
    holders = [registry.name for registry in _registries()
               if any(each is found for each in registry.module_dict.values())]
    if any(name in _STARTING for name in holders):
        return 'starts a program of its own'
    if holders:
        return None
    home = getattr(found, '__module__', None) or ''
    if inspect.isclass(found) and re.match(
            r'(mmcv|mmdet|mmseg|mmhybrid)\.(?!apis|utils|testing|engine|cli|doctor)|'
            r'torch\.(nn|optim)\.', home):
        return None
    if inspect.isfunction(found) and home.startswith('mmcv.ops.'):
        return None  # such as nms
    own = getattr(found, '__qualname__', type(found).__name__)
    return f'leads to {home or "the module"}.{own}, which no registry has'


def _written(value: object) -> str:
    """Write a value as Python that gives it again."""
    if isinstance(value, dict):
        return '{' + ', '.join(f'{_written(key)}: {_written(each)}'
                               for key, each in value.items()) + '}'
    if isinstance(value, list):
        return '[' + ', '.join(map(_written, value)) + ']'
    if isinstance(value, tuple):
        return '(' + ''.join(f'{_written(each)}, ' for each in value) + ')'
    if isinstance(value, float):
        return repr(value) if abs(value) < float('inf') else f'float({str(value)!r})'
    return repr(value)
