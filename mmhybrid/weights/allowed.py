"""Which names a pickle may mention, and what we make of them.

A pickle is a small program that looks names up and calls what it finds.  Ours finds only what is
listed here, and the file's arguments never reach what a name really leads to: every entry is a
function of ours that checks them and makes a value out of them itself.

The list has what released files and mmengine's own checkpoints contain, and no more.
"""
from __future__ import annotations

import argparse
import collections
import math
import pathlib
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable

import numpy as np
import torch

__all__ = ['Budget', 'Damaged', 'Method', 'Name', 'NotPlain', 'Refused', 'Storage',
           'UnfinishedArray', 'UnfinishedDtype', 'Unusable', 'allowed_names', 'checked_key',
           'dtype_of_storage', 'history_buffer', 'look_up']


class Refused(Exception):
    """A pickle mentions something that is not on the list; the message is its name."""


class NotPlain(Exception):
    """A pickle holds tensors of a kind that is no use as weights; the message names the kind."""


class Damaged(Exception):
    """A pickle breaks the rules that every pickle follows; the message says which."""


class Budget:
    """How much a file may still make out of its bytes.

    Honest pickles are as large in memory as on disk, give or take; others repeat a short
    instruction until the memory is full.

    Args:
        size: bytes of the file.
    """

    STEPS = 1_500_000  # two seconds; files of the largest models take some ten thousand

    def __init__(self, size: int):
        self.steps = self.STEPS
        self.bytes = 16 * size + 64 * 2**20

    def spend(self, steps: int = 0, size: int = 0) -> None:
        """Pay for instructions, and for bytes that are made from others.

        Raises:
            Damaged: if that is more than any honest file needs.
        """
        self.steps -= steps
        self.bytes -= size
        if self.steps < 0:
            raise Damaged(f'it has more than {self.STEPS:,} values beside its tensors')
        if self.bytes < 0:
            raise Damaged('what it describes is many times larger than the file')


class Name:
    """A name of the list, as an entry of a pickle's stack; it leads to nothing by itself."""

    def __init__(self, name: str, call: Callable | None):
        self.name, self.call = name, call


class Method:
    """Stands for a method of mmengine's loss curves, which refer to them; we have our own."""


class Unusable:
    """Stands for a value that is not plain data; whoever finds it in the result says where."""

    def __init__(self, what: str):
        self.what = what


class UnfinishedDtype:
    """A numpy dtype whose byte order is still to come."""

    def __init__(self, code: str):
        self.code = code
        self.places: list = []

    def finished(self, state: object) -> np.dtype | Unusable:
        """Make the dtype; numpy itself must never see such a state, which describes memory."""
        if type(state) is not tuple or len(state) != 8 or type(state[1]) is not str:
            raise Damaged('a numpy dtype has no state that numpy writes')
        version, order, *rest = state
        if not (_is(version, 3) or _is(version, 4)) or order not in ('<', '>', '|', '=') \
                or not all(map(_is, rest, (None, None, None, -1, -1, 0))):
            return Unusable(f'a numpy record ({self.code})')
        return np.dtype(self.code).newbyteorder(order)


class UnfinishedArray:
    """A numpy array whose shape and values are still to come."""

    def __init__(self):
        self.places = []

    def finished(self, state: object, budget: Budget) -> np.ndarray | Unusable:
        """Make the array, if as many bytes are there as its shape needs."""
        if type(state) is not tuple or len(state) != 5:
            raise Damaged('a numpy array has no state that numpy writes')
        _, shape, dtype, by_columns, content = state
        if isinstance(dtype, Unusable):
            return dtype
        dtype, content = _dtype_of(dtype), _content_of(content)
        if type(shape) is not tuple or not all(map(_is_size, shape)) or len(shape) > 32 \
                or math.prod(shape) * dtype.itemsize != len(content) \
                or math.prod(max(each, 1) for each in shape) >= 2**58:
            raise Damaged('a numpy array has another number of values than its shape says')
        budget.spend(size=len(content))
        flat = np.frombuffer(content, dtype).copy()
        return flat.reshape(shape, order='F' if by_columns is True else 'C')


class Storage:
    """Memory of tensors.

    Args:
        dtype: of the values.
        memory: the values.
    """

    def __init__(self, dtype: torch.dtype, memory: torch.UntypedStorage):
        self.dtype, self.memory = dtype, memory


def _is(value: object, wanted: object) -> bool:
    # arrays and tensors give no truth value when they are compared
    return type(value) is type(wanted) and value == wanted


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _dtype_of(value: object) -> np.dtype:
    if isinstance(value, UnfinishedDtype):
        return np.dtype(value.code)
    if not isinstance(value, np.dtype):
        raise Damaged('a numpy value has no dtype')
    return value


def _content_of(value: object) -> bytes:
    if type(value) is str:  # of Python 2
        value = _latin(value)
    if type(value) is not bytes:
        raise Damaged('a numpy value has no bytes')
    return value


def _latin(text: str) -> bytes:
    try:
        return text.encode('latin1')
    except UnicodeEncodeError as error:
        raise Damaged('bytes are given as text that stands for none') from error


def checked_key(key: object, budget: Budget) -> object:
    """Let plain keys pass; others can be made so that they all collide, which takes for ever."""
    parts = [key]
    for part in parts:  # grows
        if type(part) is tuple and len(parts) + len(part) <= 32:
            parts += part
            # these can be made to collide as well, but not so many
            budget.spend(100 + 100 * len(part))
        elif not _is_plain_key(part.item() if isinstance(part, np.generic) else part):
            raise Damaged(f'a dictionary or set has {type(key).__name__} as a key, '
                          'expected texts, numbers or short tuples of them')
    return key


def _is_plain_key(key: object) -> bool:
    return type(key) in (str, float, bool, bytes, type(None)) or type(
        key) is int and abs(key) < 2**60


# --- what the names lead to: each takes the budget and the arguments of the pickle ---

def _taken(args: tuple, *kinds: type | tuple[type, ...]) -> tuple:
    """Arguments, if they are as many as expected and of exactly these classes."""
    if len(args) != len(kinds) or not all(
            type(arg) in (kind if isinstance(kind, tuple) else (kind,))
            for arg, kind in zip(args, kinds, strict=True)):
        raise Damaged('a value has other arguments than those that are ever written for it')
    return args


def _dictionary(kind: type) -> Callable:
    def make(budget: Budget, *args):
        result = kind()
        if not args:
            return result
        given, = _taken(args, (dict, collections.OrderedDict, collections.Counter, list))
        budget.spend(len(given))
        pairs = given if type(given) is list else given.items()
        for pair in pairs:
            if type(pair) not in (tuple, list) or len(pair) != 2:
                raise Damaged('a dictionary is made of something else than pairs')
            result[checked_key(pair[0], budget)] = pair[1]
        return result

    return make


def _default_dictionary(budget: Budget, *args) -> dict:
    if args:  # what it would make of a new key
        _taken(args, (Name, type(None)))
    return {}


def _set(kind: type) -> Callable:
    def make(budget: Budget, *args):
        given, = _taken(args, list) if args else ([],)
        budget.spend(len(given))
        return kind(checked_key(each, budget) for each in given)

    return make


def _bytes(budget: Budget, *args) -> bytes:
    _taken(args)
    return b''


def _encoded(budget: Budget, *args) -> bytes:
    # Bytes of protocol 2.  Looking an encoding up would import a module by that name.
    text, encoding = _taken(args, str, str)
    if encoding not in ('latin1', 'latin-1'):
        raise Refused(f'an encoding {encoding!r}')
    budget.spend(size=len(text))
    return _latin(text)


def _complex(budget: Budget, *args) -> complex:
    return complex(*_taken(args, float, float))


def _attribute(budget: Budget, *args) -> Method:
    # mmengine's loss curves refer to their own methods in this way.
    owner, name = args if len(args) == 2 else (None, None)
    known = getattr(history_buffer(), '_statistics_methods', {})
    if not isinstance(owner, Name) or owner.name != _CURVE or type(name) is not str \
            or name not in ('min', 'max', 'current', 'mean', *known):
        raise Refused(f'getattr(..., {name!r})' if type(name) is str else 'getattr')
    return Method()


def _path(budget: Budget, *args) -> pathlib.PurePosixPath:
    budget.spend(len(args))
    return pathlib.PurePosixPath(*_taken(args, *(str for _ in args)))


def _namespace(budget: Budget, *args) -> argparse.Namespace:
    _taken(args)
    return argparse.Namespace()


def history_buffer() -> type | None:
    """Give mmengine's class of loss curves; None without mmengine."""
    try:
        from mmengine.logging import HistoryBuffer
    except ImportError:
        return None
    return HistoryBuffer


def _curve(budget: Budget, *args):
    _taken(args)
    budget.spend(8)
    kind = history_buffer()
    return argparse.Namespace() if kind is None else kind()


def _size(budget: Budget, *args) -> torch.Size:
    given, = _taken(args, (tuple, list))
    if not all(map(_is_size, given)):
        raise Damaged('a size has something else than numbers')
    budget.spend(len(given))
    return torch.Size(given)


def _device(budget: Budget, *args) -> torch.device:
    kind, index = _taken(args, str, int) if len(args) == 2 else (*_taken(args, str), None)
    if not re.fullmatch(r'[a-z]{2,20}', kind) or index is not None and not 0 <= index < 1000:
        raise Damaged(f'a tensor is on the device {kind!r}, which there is not')
    try:
        return torch.device(kind) if index is None else torch.device(kind, index)
    except RuntimeError as error:
        raise Damaged(f'a tensor is on the device {kind!r}, which there is not') from error


def _no_call(what: str) -> Callable:
    def call(budget: Budget, *args):
        raise Refused(f'a call of {what}')

    return call


# --- numpy ---

def _dtype(budget: Budget, *args) -> UnfinishedDtype | Unusable:
    if len(args) != 3 or type(args[0]) is not str:
        raise Damaged('a numpy dtype has other arguments than those that are ever written for it')
    code = args[0]
    # a bool, or whole, floating and complex numbers: everything that arrays of numbers pickle
    if not re.fullmatch(r'b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)', code):
        return Unusable(f'a numpy value of the kind {code[:20]!r}')
    try:
        np.dtype(code)
    except TypeError:
        return Unusable(f'a numpy value of the kind {code!r}, which this machine lacks')
    return UnfinishedDtype(code)


def _array(budget: Budget, *args) -> UnfinishedArray:
    kind, shape, code = args if len(args) == 3 else (None, None, None)
    if not isinstance(kind, Name) or kind.name != 'numpy.ndarray':
        raise Refused('a numpy array of a class of its own')
    if type(shape) is not tuple or len(shape) != 1 or not _is(shape[0], 0) or not (
            _is(code, b'b') or _is(code, 'b')):
        raise Damaged('a numpy array has other arguments than those that are ever written for it')
    budget.spend(4)
    return UnfinishedArray()


def _scalar(budget: Budget, *args) -> np.generic | Unusable:
    if len(args) != 2:
        raise Damaged('a numpy number has other arguments than those that are ever written for it')
    if isinstance(args[0], Unusable):
        return args[0]
    dtype, content = _dtype_of(args[0]), _content_of(args[1])
    if len(content) != dtype.itemsize:
        raise Damaged('a numpy number has another number of bytes than its dtype says')
    return np.frombuffer(content, dtype)[0]


# --- torch ---

_STORAGES = {
    'Double': torch.float64, 'Float': torch.float32, 'Half': torch.float16,
    'BFloat16': torch.bfloat16, 'Long': torch.int64, 'Int': torch.int32, 'Short': torch.int16,
    'Char': torch.int8, 'Byte': torch.uint8, 'Bool': torch.bool,
    'ComplexDouble': torch.complex128, 'ComplexFloat': torch.complex64}


def _tensor(budget: Budget, *args) -> torch.Tensor:
    """Make a tensor that lies within its storage."""
    if not 4 <= len(args) <= 7 or not isinstance(args[0], Storage):
        raise Damaged('a tensor has other arguments than those that are ever written for it')
    storage, offset, shape, strides, *more = args
    _check_unmarked(more[2:])
    return _over(storage.memory, storage.dtype, offset, shape, strides,
                 bool(more) and more[0] is True, budget)


def _typed_tensor(budget: Budget, *args) -> torch.Tensor:
    # of the dtypes that torch added last, such as float8
    if not 7 <= len(args) <= 8 or not isinstance(args[0], Storage) or type(
            args[6]) is not torch.dtype:
        raise Damaged('a tensor has other arguments than those that are ever written for it')
    storage, offset, shape, strides, needs_gradient, _, dtype = args[:7]
    _check_unmarked(args[7:])
    if not re.fullmatch(r'torch\.(float8_\w+|uint(16|32|64))', str(dtype)):
        raise NotPlain(f'a tensor of the dtype {dtype} in the form of newer ones')
    return _over(storage.memory, dtype, offset, shape, strides, needs_gradient is True, budget)


def _check_unmarked(marks: list | tuple) -> None:
    if any(mark is not None and not _is(mark, {}) for mark in marks):
        raise NotPlain('a tensor that is conjugated or negated')


def _over(memory: torch.UntypedStorage, dtype: torch.dtype, offset, shape, strides,
          needs_gradient: bool, budget: Budget) -> torch.Tensor:
    numbers = (offset, *shape, *strides) if type(shape) in (tuple, torch.Size) and type(
        strides) is tuple else (None,)
    if not all(map(_is_size, numbers)) or len(shape) != len(strides) or len(shape) > 64:
        raise Damaged('a tensor has no shape that there is')
    count, there = math.prod(shape), memory.nbytes() // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(max(n, 1) for n in shape) >= 2**62 or offset > there or count and last >= there:
        raise Damaged('a tensor is larger than the values that are there for it')
    budget.spend(8, count * dtype.itemsize)
    tensor = torch.empty(0, dtype=dtype, device=memory.device)
    tensor.set_(memory, offset, tuple(shape), strides)
    tensor.requires_grad = needs_gradient and (dtype.is_floating_point or dtype.is_complex)
    return tensor


def _parameter(budget: Budget, *args) -> torch.nn.Parameter:
    # a fourth argument holds attributes such as the _no_weight_decay of many Mamba models
    if len(args) not in (3, 4) or type(args[0]) is not torch.Tensor:
        raise Damaged('a parameter has other arguments than those that are ever written for it')
    kind = args[0].dtype
    return torch.nn.Parameter(args[0].detach(), requires_grad=args[1] is True and (
        kind.is_floating_point or kind.is_complex))


def _with_attributes(budget: Budget, *args) -> torch.Tensor:
    """Make a tensor without its attributes; buffers are such tensors, too."""
    make, kind, given = args[:3] if len(args) == 4 else (None, None, None)
    if not isinstance(make, Name) or make.call not in (_tensor, _typed_tensor) or not isinstance(
            kind, Name) or kind.name not in _TENSORS or type(given) is not tuple:
        raise NotPlain('a tensor of a class of its own')
    return make.call(budget, *given)


def _no_tensor(budget: Budget, *args):
    raise NotPlain('a tensor of a form that torch.save does not write')


_TENSORS = ('torch.Tensor', 'torch.nn.parameter.Parameter', 'torch.nn.parameter.Buffer')
_CURVE = 'mmengine.logging.history_buffer.HistoryBuffer'
_CALLS: dict[str, Callable] = {
    'argparse.Namespace': _namespace,
    'builtins.set': _set(set), 'builtins.frozenset': _set(frozenset),
    'builtins.bytes': _bytes, '_codecs.encode': _encoded, 'builtins.complex': _complex,
    'builtins.getattr': _attribute, _CURVE: _curve,
    'collections.OrderedDict': _dictionary(collections.OrderedDict),
    'collections.Counter': _dictionary(collections.Counter),
    # kinds of dictionaries become ordinary ones
    'collections.defaultdict': _default_dictionary,
    **{f'builtins.{kind}': _no_call(f'builtins.{kind}')
       for kind in ('dict', 'list', 'int', 'float')},
    'yacs.config.CfgNode': _dictionary(collections.OrderedDict),
    'mmengine.config.config.ConfigDict': _dictionary(collections.OrderedDict),
    **{f'pathlib{place}.{kind}Path': _path for place in ('', '._local')
       for kind in ('Posix', 'Windows', 'PurePosix', 'PureWindows')},
    'numpy.ndarray': _no_call('numpy.ndarray'), 'numpy.dtype': _dtype,
    # numpy 2 moved its functions; files have the place of the numpy that wrote them.
    **{f'numpy.{place}.multiarray.{name}': call for place in ('core', '_core')
       for name, call in (('_reconstruct', _array), ('scalar', _scalar))},
    'torch.Size': _size, 'torch.device': _device,
    'torch._utils._rebuild_tensor': _tensor, 'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _typed_tensor,
    **dict.fromkeys(('torch._utils._rebuild_parameter',
                     'torch._utils._rebuild_parameter_with_state'), _parameter),
    **dict.fromkeys(('torch._tensor._rebuild_from_type', 'torch._tensor._rebuild_from_type_v2'),
                    _with_attributes),
    **dict.fromkeys(_TENSORS, _no_tensor),
}
# What torch.save writes as well, but nobody can use as weights.
_NO_WEIGHTS = (
    (r'torch\._utils\._rebuild_sparse\w*|torch\.sparse\.\w+|torch\.serialization\._get_layout',
     'a sparse tensor'),
    (r'torch\._utils\._rebuild_qtensor|torch\.Q\w+Storage|torch\.per_(tensor|channel)_\w+',
     'a quantized tensor'),
    (r'torch\._utils\._rebuild_meta_tensor_no_storage',
     "a tensor of the device 'meta', which has no values"),
    (r'torch\._utils\._rebuild_nested_tensor', 'a nested tensor'),
    (r'torch\._utils\._rebuild_wrapper_subclass|torch\.nn\.parameter\.\w+',
     'a tensor of a class of its own'),
)


def allowed_names() -> frozenset[str]:
    """Names that a file may mention, beside dtypes and storages of torch."""
    return frozenset(_CALLS)


def look_up(module: str, name: str) -> Name | torch.dtype:
    """Give what stands for a name of a pickle.

    Raises:
        Refused: if it is not on the list.
        NotPlain: if it belongs to tensors that are not weights.
    """
    # Protocol 2 has the names of Python 2; pickle and torch translate them with the same tables.
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    else:
        module = IMPORT_MAPPING.get(module, module)
    path = f'{module}.{name}'
    if path in _CALLS:
        return Name(path, _CALLS[path])
    if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    kind = name.removesuffix('Storage')
    if module in ('torch', 'torch.cuda') and name.endswith('Storage') and kind in _STORAGES:
        return Name(f'torch.{name}', None)
    if path == 'torch.storage.UntypedStorage':
        return Name('torch.ByteStorage', None)
    for pattern, what in _NO_WEIGHTS:
        if re.fullmatch(pattern, path):
            raise NotPlain(f'{what} ({path})')
    raise Refused(path)


def dtype_of_storage(kind: object) -> torch.dtype:
    """Give the dtype that belongs to the name of a class of storages."""
    short = kind.name[len('torch.'):-len('Storage')] if isinstance(kind, Name) else ''
    if short not in _STORAGES:
        raise Damaged('the values of a tensor are of no kind that there is')
    return _STORAGES[short]
