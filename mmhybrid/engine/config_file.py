"""Reading a config file: what is wrong, in which file and line."""
from __future__ import annotations

import ast
import json
import os.path as osp
import traceback
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError

from ..errors import UserError

__all__ = ['read_config']

SUFFIXES = ('.py', '.json', '.yaml', '.yml')


def read_config(path: str) -> Config:
    """Read the config file ``path``.

    Raises:
        UserError: that names the file, which may be one of its ``_base_``, and the line.
    """
    if osp.isdir(path):
        names = sorted(entry.name for entry in Path(path).glob('*.py'))
        listed = f' It holds {", ".join(names[:3])}{", ..." if len(names) > 3 else ""}.'
        raise UserError(f'The config {path} is a folder; expected a file in it.'
                        f'{listed if names else ""}')
    if osp.splitext(path)[1] not in SUFFIXES:
        raise UserError(f'The config {path} does not end with {", ".join(SUFFIXES)}.')
    _refuse_circles(path)
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise UserError(_reason(path, error)) from error
    if not cfg._cfg_dict:
        raise UserError(f'The config {path} is empty: it sets nothing.')
    return cfg


def _refuse_circles(path: str, through: tuple[str, ...] = ()) -> None:
    """mmengine reads the files of a circle until Python's stack ends, which takes long."""
    path = osp.abspath(path)
    if path in through:
        circle = through[through.index(path):]
        raise UserError(f'The config {through[0]} cannot be read: by _base_ these files are made '
                        f'from each other in a circle: {", ".join(circle)}.')
    try:
        lines = ast.parse(Path(path).read_bytes()).body
        value = next(line.value for line in lines if isinstance(line, ast.Assign)
                     and getattr(line.targets[0], 'id', '') == '_base_')
        bases = ast.literal_eval(value)
    except (OSError, ValueError, SyntaxError, StopIteration, RecursionError, MemoryError):
        return  # reading it will tell
    for base in [bases] if isinstance(bases, str) else bases:
        if isinstance(base, str) and '::' not in base:
            _refuse_circles(osp.join(osp.dirname(path), base), (*through, path))


def _reason(path: str, error: Exception) -> str:
    chain = _files(error)
    file = chain[-1] if chain else path
    base = f' (through _base_ of {path})' if osp.abspath(file) != osp.abspath(path) else ''
    if isinstance(error, UnicodeDecodeError):
        return (f'The config {file}{base} is not a text file in UTF-8: byte {error.start} is '
                f'0x{error.object[error.start]:02x}.')
    if isinstance(error, SyntaxError):
        cause = error if error.lineno else (error.__cause__ or error.__context__ or error)
        line = getattr(cause, 'lineno', None)
        return (f'The config {file}{base} is not valid Python'
                f'{f", line {line}" if line else ""}: {getattr(cause, "msg", cause)}.')
    if isinstance(error, FileNotFoundError) and not osp.isfile(file):
        via = chain[-2] if len(chain) > 1 else path
        return f'The config {via} names {file} as _base_, and there is no such file.'
    if isinstance(error, PermissionError):
        return f'The config {file}{base} may not be read: {error.strerror}.'
    if isinstance(error, json.JSONDecodeError):
        return f'The config {file}{base} is not valid JSON: {error}.'
    if isinstance(error, ValueError) and 'null bytes' in str(error):
        return f'The config {file}{base} is not a text file: it holds null bytes.'
    if isinstance(error, ImportError):
        # mmengine's own text about custom_imports lists all of sys.path.
        cause = error.__cause__.__context__ if error.__cause__ else error
        where = ' by custom_imports' if error.__cause__ else _line(error, file)
        return (f'The config {file}{base} needs{where} a module that cannot be imported: {cause}. '
                'Install it, or set PYTHONPATH to its folder.')
    if isinstance(error, (ConfigParsingError, KeyError)) and error.args:
        return f'The config {file}{base} cannot be read{_line(error, file)}: {error.args[0]}'
    return (f'The config {file}{base} cannot be read{_line(error, file)}. '
            f'{type(error).__name__}: {error}')


def _files(error: Exception) -> list[str]:
    """The config files that were being read, each the ``_base_`` of the one before."""
    return [frame.f_locals['filename'] for frame, _ in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_name == '_file2dict' and 'filename' in frame.f_locals]


def _line(error: Exception, file: str) -> str:
    """Where in the file; the last line of it that was running."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_filename == file]
    return f', line {lines[-1]}' if lines else ''
