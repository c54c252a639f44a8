"""Which names a pickle may mention: the rule that keeps checkpoints from running code.

A pickle is a small program.  It can do harm only through the names that it looks up, so two things
are checked: before anything is executed, every name in the program must be on the list below, and
while torch's restricted reader executes it, each listed name leads to something harmless: to a
class that only holds values, or to a function that accepts nothing but the expected arguments.

The list has what released files and mmengine's own checkpoints contain, and no more.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import pathlib
import pickle
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from typing import BinaryIO

import torch

__all__ = ['Refused', 'allowed_names', 'check_pickle', 'harmless_globals']

# Instructions that torch's restricted reader knows, in the words of pickletools.
_INSTRUCTIONS = frozenset(
    'PROTO STOP GLOBAL NEWOBJ REDUCE BUILD MARK APPEND APPENDS SETITEM SETITEMS TUPLE TUPLE1 '
    'TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET NONE NEWTRUE NEWFALSE BININT '
    'BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET '
    'BINPUT LONG_BINPUT'.split())

# What torch's restricted reader resolves by itself; the rest of its own list is not needed.
_TORCH = frozenset(
    ('collections.OrderedDict', 'collections.Counter', 'torch.Size', 'torch.device',
     'torch.Tensor', 'torch.nn.parameter.Parameter', 'torch._utils._rebuild_tensor',
     'torch._utils._rebuild_tensor_v2', 'torch._utils._rebuild_parameter',
     'torch.storage.UntypedStorage', 'torch.storage.TypedStorage'))


class Refused(pickle.UnpicklingError):
    """A pickle mentions something that is not harmless; the message is its name."""


def _is_tensor_type(name: str) -> bool:
    module, _, own = name.rpartition('.')
    if module not in ('torch', 'torch.cuda'):
        return False
    return own.endswith('Storage') or isinstance(getattr(torch, own, None), torch.dtype)


def allowed_names() -> frozenset[str]:
    """Names besides torch's own that a file may mention."""
    return frozenset(_harmless())


def check_pickle(stream: BinaryIO) -> None:
    """Read one pickle without executing it; the stream is left behind it.

    Raises:
        Refused: naming the first thing in it that is not harmless.
        EOFError, ValueError: if it is cut off or no pickle.
    """
    allowed = allowed_names()
    for instruction, argument, _ in pickletools.genops(stream):
        if instruction.name == 'GLOBAL':
            name = _today(*argument.split(' ', 1))
            if name not in allowed and name not in _TORCH and not _is_tensor_type(name):
                raise Refused(name)
        elif instruction.name == 'PROTO' and argument != 2:
            raise Refused(f'pickle protocol {argument}')
        elif instruction.name not in _INSTRUCTIONS:
            raise Refused(f'the pickle instruction {instruction.name}')


def _today(module: str, name: str) -> str:
    # Protocol 2 has the names of Python 2; pickle and torch translate them with the same tables.
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    else:
        module = IMPORT_MAPPING.get(module, module)
    return f'{module}.{name}'


# --- what the names lead to ---

class _Values:
    """Stands for a class that is not installed or not needed; keeps nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


class _Dict:
    """Stands for a kind of dictionary.

    torch's reader puts entries into ordinary dictionaries only, so it becomes one at once.
    """

    def __new__(cls, *args):
        return collections.OrderedDict(*args)


def _encode(text: str, encoding: str = 'latin1') -> bytes:
    # Bytes of protocol 2.  Looking an encoding up imports a module by that name.
    if encoding not in ('latin1', 'latin-1'):
        raise Refused(f'an encoding {encoding!r}')
    return text.encode('latin1')


def _getattr(owner: object, name: str) -> Callable:
    # mmengine's loss curves refer to their own methods in this way.
    methods = getattr(owner, '_statistics_methods', None)
    if getattr(owner, '__name__', '') != 'HistoryBuffer' or not isinstance(methods, dict) \
            or name not in ('min', 'max', 'current', 'mean', *methods):
        raise Refused(f'getattr(..., {name!r})')
    return getattr(owner, name)


def _named(name: str, value: Callable) -> Callable:
    """Give a function or class of ours the name under which a pickle looks it up."""
    module, _, own = name.rpartition('.')
    value.__module__, value.__name__, value.__qualname__ = module, own, own
    return value


def _stand_in(name: str, base: type = _Values) -> type:
    return _named(name, type(name.rpartition('.')[2], (base,), {}))


def _forwarded(name: str, function: Callable) -> Callable:
    def forward(*args):
        return function(*args)

    return _named(name, forward)


_harmless_table: dict[str, Callable] = {}


def _harmless() -> dict[str, Callable]:
    """Names and what they lead to."""
    if _harmless_table:
        return _harmless_table
    table = {
        'argparse.Namespace': argparse.Namespace,
        'builtins.set': set,
        'yacs.config.CfgNode': _stand_in('yacs.config.CfgNode', _Dict),
        'mmengine.config.config.ConfigDict': _stand_in('mmengine.config.config.ConfigDict', _Dict),
        'builtins.getattr': _forwarded('builtins.getattr', _getattr),
        '_codecs.encode': _forwarded('_codecs.encode', _encode),
        **{f'pathlib.{kind}Path': _forwarded(f'pathlib.{kind}Path', pathlib.PurePosixPath)
           for kind in ('Posix', 'Windows', 'PurePosix', 'PureWindows')},
    }
    try:
        from mmengine.logging import HistoryBuffer
        table['mmengine.logging.history_buffer.HistoryBuffer'] = HistoryBuffer
    except ImportError:
        name = 'mmengine.logging.history_buffer.HistoryBuffer'
        table[name] = _stand_in(name)
    table.update(_numpy())
    _harmless_table.update(table)
    return _harmless_table


def _numpy() -> dict[str, Callable]:
    try:
        import numpy as np
    except ImportError:
        return {}
    # 1.26 has the name of numpy 2 as well, as an empty shell
    core = np.core if np.__version__.startswith('1.') else np._core
    table = {'numpy.ndarray': np.ndarray, 'numpy.dtype': np.dtype}
    # numpy 2 moved its functions; files have the place of the numpy that wrote them.
    for place in ('core', '_core'):
        for name in ('_reconstruct', 'scalar'):
            path = f'numpy.{place}.multiarray.{name}'
            table[path] = _forwarded(path, getattr(core.multiarray, name))
    for code in '?bBhHiIlLqQefdgFD':
        kind = type(np.dtype(code))
        table[f'{kind.__module__}.{kind.__qualname__}'] = kind
    return table


@contextlib.contextmanager
def harmless_globals() -> Iterator[None]:
    """Let torch's restricted reader resolve the names of the list while the context is open."""
    types = list(_harmless().values())
    serialization = torch.serialization
    if hasattr(serialization, 'safe_globals'):
        with serialization.safe_globals(types):
            yield
        return
    # torch 2.4 has the list but not the context
    before = list(serialization.get_safe_globals())
    serialization.add_safe_globals(types)
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


