"""Pickles as data: a reader that follows their instructions and runs nothing.

Python's own reader calls what a pickle names, and torch's restricted one still hands arguments of
the file to classes and functions of others.  This one knows the instructions that torch.save
writes, builds plain values, and for every name uses what :mod:`allowed` has for it.
"""
from __future__ import annotations

import argparse
import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from .allowed import (
    Budget,
    Damaged,
    Name,
    Refused,
    Storage,
    UnfinishedArray,
    UnfinishedDtype,
    Unusable,
    checked_key,
    dtype_of_storage,
    history_buffer,
    look_up,
)

__all__ = ['CutOff', 'read_pickle']

_LONGEST_NAME = 1000  # bytes
_PRICES = dict(MARK=3, EMPTY_LIST=2, EMPTY_DICT=2, EMPTY_SET=4)  # in instructions, by memory


class CutOff(Damaged):
    """A pickle ends before its last instruction."""


def read_pickle(stream: BinaryIO, size: int, budget: Budget,
                storage: Callable[[str, object, int, str], object] | None = None) -> object:
    """Read one pickle; the stream is left behind it.

    Args:
        stream: at the first byte.
        size: of the whole stream in bytes.
        budget: is charged.
        storage: called with key, dtype, number of values and location, gives the memory of
            tensors; without it there must be none.

    Returns:
        What was saved.  Values that are not plain data are :class:`Unusable` or other stand-ins,
        which :func:`check_tree` finds.

    Raises:
        Refused: if it names something that is not on the list.
        NotPlain: if it has tensors that are not weights.
        Damaged: if it breaks the rules of pickles or makes too much out of few bytes.
    """
    machine = _Machine(budget, storage)
    try:
        for instruction, argument, _ in _instructions(stream, size):
            budget.spend(_PRICES.get(instruction.name, 1))
            handler = _HANDLERS.get(instruction.name)
            if handler is None:
                raise Refused(f'the pickle instruction {instruction.name}')
            handler(machine, argument)
        return machine.pop()
    except IndexError as error:  # the stack is empty
        raise Damaged(f'its pickle contradicts itself at byte {stream.tell():,}') from error


def _instructions(stream: BinaryIO, size: int):
    try:
        # It takes anything with these two methods, whatever its annotation says.
        yield from pickletools.genops(_Bounded(stream, size))  # type: ignore[arg-type]
    except ValueError as error:
        place = stream.tell()
        if place >= size:
            raise CutOff('it ends in the middle of its pickle') from error
        raise Damaged(f'its pickle has no instruction at byte {place:,}') from error


class _Bounded:
    """A stream that never asks for more than there is: lengths are the file's claims."""

    def __init__(self, stream: BinaryIO, size: int):
        self.stream, self.size = stream, size

    def read(self, count: int) -> bytes:
        if count > 2**16:
            count = min(count, max(self.size - self.stream.tell(), 0))
        return self.stream.read(count)

    def readline(self) -> bytes:
        return self.stream.readline(_LONGEST_NAME)


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, budget: Budget, storage: Callable | None):
        self.budget, self.storage = budget, storage
        self.stack: list = []
        self.below: list[list] = []
        self.memo: dict = {}

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self, _) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def put(self, place: int) -> None:
        value = self.memo[place] = self.stack[-1]
        if isinstance(value, (UnfinishedArray, UnfinishedDtype)):
            value.places.append(place)

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise Damaged('its pickle repeats a value that it does not have')
        self.push(self.memo[place])

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def add(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise Damaged('its pickle appends to something that is not a list')
        self.stack[-1].extend(items)

    def set(self, pairs: list) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter) or len(pairs) % 2:
            raise Damaged('its pickle puts entries into something that is not a dictionary')
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[checked_key(key, self.budget)] = value

    def set_one(self, _) -> None:
        value, key = self.pop(), self.pop()
        self.set([key, value])

    def add_to_set(self, _) -> None:
        items, target = self.since_mark(), self.stack[-1]
        if type(target) is not set:
            raise Damaged('its pickle adds to something that is not a set')
        target.update(checked_key(each, self.budget) for each in items)

    def frozen_set(self, _) -> None:
        self.push(frozenset(checked_key(each, self.budget) for each in self.since_mark()))

    def name(self, _) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise Damaged('its pickle looks up something that is not a name')
        self.push(look_up(module, name))

    def call(self, _) -> None:
        args, called = self.pop(), self.pop()
        if type(args) is not tuple:
            raise Damaged('its pickle makes a value without arguments')
        if not isinstance(called, Name) or called.call is None:
            raise Refused(f'a call of {_described(called)}')
        self.push(called.call(self.budget, *args))

    def build(self, _) -> None:
        state, value = self.pop(), self.pop()
        finished = _finished(value, state, self.budget)
        if finished is not value:  # for whoever refers to it later, too
            self.memo.update(dict.fromkeys(value.places, finished))
        self.push(finished)

    def load_storage(self, _) -> None:
        given = self.pop()
        if type(given) is not tuple or len(given) not in (5, 6) or type(given[0]) is not str \
                or given[0] != 'storage' or self.storage is None:
            raise Damaged('the values of a tensor are not where torch.save puts them')
        _, kind, key, location, count, *view = given
        if type(key) is not str or type(location) is not str or type(count) is not int \
                or not 0 <= count < 2**48 or any(each is not None for each in view):
            raise Damaged('the values of a tensor are not where torch.save puts them')
        dtype = dtype_of_storage(kind)
        self.push(Storage(dtype, self.storage(key, dtype, count, location)))


def _described(called: object) -> str:
    return called.name if isinstance(called, Name) else f'a {type(called).__name__}'


def _finished(value: object, state: object, budget: Budget) -> object:
    """Complete a value with the state that was saved for it."""
    if isinstance(value, Unusable):
        return value
    if isinstance(value, UnfinishedDtype):
        return value.finished(state)
    if isinstance(value, UnfinishedArray):
        return value.finished(state, budget)
    if type(value) is OrderedDict:
        # Names of versions, of a state_dict(); any other attribute would hide a method.
        notes = state.get('_metadata') if type(state) is dict else None
        if isinstance(notes, dict) and all(isinstance(note, dict) for note in notes.values()):
            vars(value)['_metadata'] = notes
        return value
    if type(value) is argparse.Namespace and type(state) is dict:
        budget.spend(len(state))
        vars(value).update({key: each for key, each in state.items() if type(key) is str})
        return value
    if history_buffer() is not None and type(value) is history_buffer():
        return _with_curve(value, state)
    raise Refused(f'a state for a {type(value).__name__}')


def _with_curve(buffer, state: object):
    """Fill mmengine's loss curve: values, how many iterations each is for, and the most it has."""
    state = state if type(state) is dict else {}
    values, counts = state.get('_log_history'), state.get('_count_history')
    most = state.get('max_length')
    arrays = [each for each in (values, counts) if type(each) is np.ndarray and each.ndim == 1]
    if len(arrays) != 2 or len(arrays[0]) != len(arrays[1]) or type(most) is not int or most < 1:
        raise Damaged('a loss curve has no values that mmengine writes')
    buffer.max_length, buffer._log_history, buffer._count_history = most, values, counts
    return buffer


def _protocol(machine: _Machine, number: int) -> None:
    if not 2 <= number <= 5:
        raise Refused(f'pickle protocol {number}')


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    'PROTO': _protocol, 'STOP': lambda machine, _: None,
    'GLOBAL': lambda machine, names: machine.push(look_up(*names.split(' ', 1))),
    'MARK': _Machine.mark, 'REDUCE': _Machine.call, 'NEWOBJ': _Machine.call,
    'BUILD': _Machine.build, 'BINPERSID': _Machine.load_storage, 'SETITEM': _Machine.set_one,
    'SETITEMS': lambda machine, _: machine.set(machine.since_mark()),
    'APPEND': lambda machine, _: machine.add([machine.pop()]),
    'APPENDS': lambda machine, _: machine.add(machine.since_mark()),
    'TUPLE': lambda machine, _: machine.push(tuple(machine.since_mark())),
    'TUPLE1': lambda machine, _: machine.tuple_of(1),
    'TUPLE2': lambda machine, _: machine.tuple_of(2),
    'TUPLE3': lambda machine, _: machine.tuple_of(3),
    'EMPTY_TUPLE': lambda machine, _: machine.push(()),
    'EMPTY_LIST': lambda machine, _: machine.push([]),
    'EMPTY_DICT': lambda machine, _: machine.push({}),
    'EMPTY_SET': lambda machine, _: machine.push(set()),
    'NONE': lambda machine, _: machine.push(None),
    'NEWTRUE': lambda machine, _: machine.push(True),
    'NEWFALSE': lambda machine, _: machine.push(False),
    **dict.fromkeys(('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE',
                     'SHORT_BINSTRING', 'BINSTRING'), _Machine.push),
    # of the newer protocols, which torch.save takes as an option
    'FRAME': lambda machine, _: None, 'STACK_GLOBAL': _Machine.name,
    'MEMOIZE': lambda machine, _: machine.put(len(machine.memo)),
    'ADDITEMS': _Machine.add_to_set, 'FROZENSET': _Machine.frozen_set,
    **dict.fromkeys(('SHORT_BINUNICODE', 'BINUNICODE8', 'SHORT_BINBYTES', 'BINBYTES', 'BINBYTES8'),
                    _Machine.push),
    **dict.fromkeys(('BINGET', 'LONG_BINGET'), _Machine.get),
    **dict.fromkeys(('BINPUT', 'LONG_BINPUT'), _Machine.put),
}
