"""Kernels for Tritons that know no tuples: the same source, written out for given constants.

The kernels keep blocks in tuples, carry those through loops and hand them to helpers, all of which
Triton takes from 3.3 on. Before that it takes plain names only, so a kernel is evaluated as far as
its constants go: loops over ``tl.static_range`` are unrolled, conditions on constants decided,
helpers written where they are called, and every element of a tuple gets a name of its own. What
is left does the same operations in the same order.
"""

import ast
import builtins
import functools
import inspect
import itertools
import linecache
import operator
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ['WITH_TUPLES', 'Unrolled', 'for_this_triton']

#: The first Triton that takes the kernels as they are written.
WITH_TUPLES = (3, 3)

_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.LShift: operator.lshift, ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert,
    ast.Not: operator.not_,
}
_NUMBERS = (bool, int, float)
# Python's functions that constants may go through.
_PURE = (len, min, max, abs, int, float, bool)


def for_this_triton(names: Mapping[str, Any]) -> dict[str, 'Unrolled']:
    """What takes the place of a module's kernels under the installed Triton; nothing on new ones.

    Args:
        names: the module's names; kernels are those that end in ``_kernel``.
    """
    if tuple(int(x) for x in triton.__version__.split('.')[:2]) >= WITH_TUPLES:
        return {}
    return {name: Unrolled(x) for name, x in names.items() if name.endswith('_kernel')}


class Unrolled:
    """A kernel that is launched like another, and written out for the constants of each launch."""

    def __init__(self, kernel):
        self.kernel = kernel
        self._versions: dict[tuple, Any] = {}

    def __getattr__(self, name):
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        def launch(**arguments):
            kernel, rest = self.of(arguments)
            return kernel[grid](**rest)

        return launch

    @functools.cached_property
    def constants(self) -> frozenset[str]:
        """Names of the parameters that are constants of the source."""
        return frozenset(x.arg for x in _definition(self.kernel).args.args if _is_constant(x))

    def of(self, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The kernel for the constants among some arguments, and the other arguments."""
        known = {k: x for k, x in arguments.items() if k in self.constants or x is None}
        types = {k: _type_name(x) for k, x in arguments.items() if hasattr(x, 'data_ptr')}
        # True == 1, and they are not the same source.
        key = (*((name, type(x), x) for name, x in sorted(known.items())), *sorted(types.items()))
        if key not in self._versions:
            self._versions[key] = write_out(self.kernel, known, types)
        return self._versions[key], {k: x for k, x in arguments.items() if k not in known}


def _type_name(tensor) -> str:
    return str(tensor.dtype).rpartition('.')[2]


def write_out(kernel, constants: Mapping[str, Any], types: Mapping[str, str] | None = None):
    """A kernel of the parameters that are left when some are constant.

    Args:
        kernel: what ``triton.jit`` made.
        constants: values by name of all ``tl.constexpr`` parameters, and None for absent pointers.
        types: what pointers point to, by name, as Triton calls it; for conditions on that.

    Raises:
        NotImplementedError: the source holds something that is not known here.
    """
    writer = _Writer(kernel, constants, types or {})
    lines = writer.source.splitlines(keepends=True)
    name = kernel.fn.__name__
    given = ' '.join(f'{k}={x}' for k, x in constants.items())
    # Triton asks for the source of a function, which Python looks for in this cache, too.
    file = f'<{name} {given} {next(_counter)}>'
    linecache.cache[file] = (len(writer.source), None, lines, file)
    names = {'__name__': kernel.fn.__module__, **writer.globals}
    exec(compile(writer.source, file, 'exec'), names)
    left = [x.arg for x in writer.parameters]
    plain = [
        x.name for x in getattr(kernel, 'params', ()) if x.do_not_specialize and x.name in left
    ]
    return triton.jit(do_not_specialize=plain)(names[name])


_counter = itertools.count()


def _definition(kernel) -> ast.FunctionDef:
    return _parsed(kernel.fn)


@functools.cache
def _parsed(function) -> ast.FunctionDef:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    ast.increment_lineno(node, function.__code__.co_firstlineno - 1)
    return node


def _is_constant(parameter: ast.arg) -> bool:
    return parameter.annotation is not None and 'constexpr' in ast.unparse(parameter.annotation)


# Values: what an expression is while a kernel is evaluated ----------------------------------------


class _Known(NamedTuple):
    """A constant: a number or another object of Python, and how the source names the latter."""

    value: Any
    node: ast.expr | None = None


class _Tuple(NamedTuple):
    items: list


class _Code(NamedTuple):
    """What only a launch decides."""

    node: ast.expr


class _Return(NamedTuple):
    value: Any


class _Frame(NamedTuple):
    """A function while its body is evaluated."""

    function: Any
    values: dict[str, Any]
    names: dict[str, str]  # of variables in the source that is written


class _Writer:
    """Evaluates the body of a kernel and writes what is left of it."""

    def __init__(
        self, kernel, constants: Mapping[str, Any], types: Mapping[str, str] = MappingProxyType({})
    ):
        self.globals: dict[str, Any] = {}
        self.taken: set[str] = set(dir(builtins)) | {'tl', 'triton'}
        self.body: list[ast.stmt] = []
        self.whole: ast.expr | None = None  # the expression of the present statement
        self.dynamic = 0  # loops and conditions around what is evaluated
        definition = _definition(kernel)
        parameters = definition.args.args
        # A pointer that only moves points to what it pointed to.
        others = _reassigned(definition.body)
        self.types = {k: x for k, x in types.items() if k not in others and hasattr(tl, x)}
        self.frame = _Frame(kernel.fn, {}, {})
        self.depth = 0
        self.parameters = [x for x in parameters if x.arg not in constants]
        for parameter in parameters:
            name = parameter.arg
            if name in constants:
                self.frame.values[name] = self._known(constants[name], parameter)
                continue
            if _is_constant(parameter):
                self._refuse(parameter, f'the constant {name} has no value')
            self.taken.add(name)
            self.frame.names[name] = name
            self.frame.values[name] = _Code(_name(name))
        self._block(definition.body)
        function = ast.FunctionDef(
            name=definition.name,
            args=ast.arguments([], self.parameters, None, [], [], None, []),
            body=self.body or [ast.Pass()],
            decorator_list=[],
            lineno=1,
            **({'type_params': []} if 'type_params' in ast.FunctionDef._fields else {}),
        )
        self.source = ast.unparse(ast.fix_missing_locations(function)) + '\n'

    def _refuse(self, node, what: str):
        raise NotImplementedError(
            f'{self.frame.function.__module__}.{self.frame.function.__name__}, line '
            f'{getattr(node, "lineno", "?")}: {what}; a kernel for Triton before '
            f'{".".join(map(str, WITH_TUPLES))} can be written out without it only'
        )

    def _known(self, value, node):
        """A value from outside of the source."""
        if isinstance(value, tl.constexpr):
            value = value.value
        if isinstance(value, tuple):
            return _Tuple([self._known(x, node) for x in value])
        return _Known(value)

    # Names in the written source

    def _fresh(self, base: str) -> str:
        for i in itertools.count(1):
            name = f'{base}_{i}'
            if name not in self.taken:
                self.taken.add(name)
                return name

    def _written(self, variable: str) -> str:
        """The name that a variable of the present function has."""
        names = self.frame.names
        if variable not in names:
            free = self.depth == 0 and variable not in self.taken
            names[variable] = variable if free else self._fresh(variable)
            self.taken.add(names[variable])
        return names[variable]

    def _global(self, name: str, value) -> str:
        """The name that an object of the kernel's module has."""
        for known, other in self.globals.items():
            if other is value:
                return known
        if name in self.taken and name not in ('tl', 'triton'):
            name = self._fresh(name)
        self.taken.add(name)
        self.globals[name] = value
        return name

    # Values to code

    def _node(self, value, at) -> ast.expr:
        if isinstance(value, _Code):
            return value.node
        if isinstance(value, _Tuple):
            return ast.Tuple([self._node(x, at) for x in value.items], ast.Load())
        if value.node is not None:
            return value.node
        if value.value is None or isinstance(value.value, (str, *_NUMBERS)):
            return ast.Constant(value.value)
        return _name(self._global(getattr(value.value, '__name__', 'constant'), value.value))

    def _assign(self, name: str, node: ast.expr):
        self.body.append(ast.Assign([ast.Name(name, ast.Store())], node, lineno=1))

    def _kept(self, value, base: str, at):
        """A value that may be used later, when the names it was made of mean something else."""
        if isinstance(value, _Tuple):
            return _Tuple([self._kept(x, base, at) for x in value.items])
        if isinstance(value, _Known) or value.node in self._single:
            return value
        name = self._fresh(base)
        self._assign(name, value.node)
        node = _name(name)
        self._single.add(node)
        return _Code(node)

    @functools.cached_property
    def _single(self) -> set[ast.expr]:
        """Nodes of names that mean one thing wherever they are read."""
        return set()

    # Statements

    def _block(self, statements) -> _Return | None:
        for statement in statements:
            method = getattr(self, f'_on_{type(statement).__name__}', None)
            if method is None:
                self._refuse(statement, f'{type(statement).__name__} is not known')
            done = method(statement)
            if done is not None:
                return done
        return None

    def _on_Pass(self, node):
        pass

    def _on_Expr(self, node):
        if isinstance(node.value, ast.Constant):
            return
        value = self._whole(node.value)
        if isinstance(value, _Code) and isinstance(value.node, ast.Call):
            self.body.append(ast.Expr(value.node))

    def _on_Assert(self, node):
        test = self._value(node.test)
        if not isinstance(test, _Known):
            self._refuse(node, 'an assertion about what only a launch decides')
        assert test.value, ast.unparse(node)

    def _on_Assign(self, node):
        value = self._whole(node.value)
        if len(node.targets) > 1:
            value = self._kept(value, 'value', node)
        for target in node.targets:
            self._bind(target, value)

    def _on_AnnAssign(self, node):
        if node.value is not None:
            value = self._value(node.value)
            if 'constexpr' in ast.unparse(node.annotation) and isinstance(value, _Code):
                self._refuse(node, 'a constant that only a launch decides')
            self._bind(node.target, value)

    def _on_AugAssign(self, node):
        if not isinstance(node.target, ast.Name):
            self._refuse(node, f'an assignment to {ast.unparse(node.target)}')
        left = ast.Name(node.target.id, ast.Load(), lineno=node.lineno)
        whole = ast.BinOp(left, node.op, node.value, lineno=node.lineno)
        self._bind(node.target, self._value(whole))

    def _bind(self, target, value):
        if isinstance(target, (ast.Tuple, ast.List)):
            self._bind_several(target, value)
            return
        if not isinstance(target, ast.Name):
            self._refuse(target, f'an assignment to {ast.unparse(target)}')
        values = self.frame.values
        if isinstance(value, _Known):
            values[target.id] = value
        elif isinstance(value, _Tuple):
            values[target.id] = self._kept(value, self._written(target.id), target)
        else:
            name = self._written(target.id)
            if not (isinstance(value.node, ast.Name) and value.node.id == name):
                self._assign(name, value.node)
            values[target.id] = _Code(_name(name))

    def _bind_several(self, target, value):
        if any(isinstance(x, ast.Starred) for x in target.elts):
            self._refuse(target, 'a star in an assignment')
        if isinstance(value, _Code):  # a function of Triton that returns several blocks
            fresh = [self._fresh('part') for _ in target.elts]
            to = ast.Tuple([ast.Name(x, ast.Store()) for x in fresh], ast.Store())
            self.body.append(ast.Assign([to], value.node, lineno=1))
            value = _Tuple([_Code(_name(x)) for x in fresh])
        if not isinstance(value, _Tuple) or len(value.items) != len(target.elts):
            self._refuse(target, f'{ast.unparse(target)} from something else than so many values')
        # All are read before any is written.
        value = self._kept(value, 'part', target)
        for one, item in zip(target.elts, value.items, strict=True):
            self._bind(one, item)

    def _on_Return(self, node):
        if node.value is None and self.depth == 0 and self.dynamic:
            self.body.append(ast.Return(None))
            return _Return(_Known(None))
        if self.dynamic:
            self._refuse(node, 'a return from within a loop or condition that a launch decides')
        return _Return(_Known(None) if node.value is None else self._whole(node.value))

    def _on_If(self, node):
        test = self._value(node.test)
        if not isinstance(test, _Code):
            return self._block(node.body if _truth(test) else node.orelse)
        before, outer = self.frame.values, self.body
        ends = []
        for statements in (node.body, node.orelse):
            values = dict(before)
            self.frame, self.body = self.frame._replace(values=values), []
            self.dynamic += 1
            done = self._block(statements)
            self.dynamic -= 1
            ends.append((self.frame.values, self.body, done))
        self.frame, self.body = self.frame._replace(values=before), outer
        self._join(ends, node)
        (_, then, _), (_, other, _) = ends
        if then or other:
            self.body.append(ast.If(test.node, then or [ast.Pass()], other))
        if all(done for *_, done in ends):
            return ends[0][2]
        return None

    def _join(self, ends, at):
        """Variables after a condition: names that both sides write."""
        going_on = [(values, body) for values, body, done in ends if not done]
        before = self.frame.values
        found = {}
        for variable in dict.fromkeys(itertools.chain(*(values for values, _ in going_on))):
            if not all(variable in values for values, _ in going_on):
                continue  # reading it is refused
            sides = [values[variable] for values, _ in going_on]
            if all(_same(x, sides[0]) for x in sides):
                found[variable] = sides[0]
                continue
            base = self._written(variable)
            common = self._names_like(sides[0], base, at)
            for (_, body), side in zip(going_on, sides, strict=True):
                self._write(body, common, side, at)
            found[variable] = common
        before.clear()
        before.update(found)

    def _names_like(self, value, base: str, at, *, own: bool = True):
        """Names for a value that is written in several places."""
        if isinstance(value, _Tuple):
            items = [self._names_like(x, base, at, own=False) for x in value.items]
            return _Tuple(items)
        node = _name(base if own else self._fresh(base))
        if not own:
            self._single.add(node)
        return _Code(node)

    def _write(self, body, names, value, at):
        """Assign a value to names of its structure, all at once."""
        outer, self.body = self.body, body
        pairs = list(self._pairs(names, value, at))
        written = {name.id for name, _ in pairs}
        moved = [
            (name, x)
            for name, x in pairs
            if not (isinstance(x, ast.Name) and x.id == name.id)
        ]
        read = {y.id for _, x in moved for y in ast.walk(x) if isinstance(y, ast.Name)}
        if read & written:
            held = []
            for name, x in moved:
                other = self._fresh(name.id)
                self._assign(other, x)
                held.append((name, _name(other)))
            moved = held
        for name, x in moved:
            self._assign(name.id, x)
        self.body = outer

    def _pairs(self, names, value, at):
        if isinstance(names, _Tuple):
            if not isinstance(value, _Tuple) or len(names.items) != len(value.items):
                self._refuse(at, 'a tuple that becomes longer, shorter or something else')
            for name, x in zip(names.items, value.items, strict=True):
                yield from self._pairs(name, x, at)
        elif isinstance(value, _Tuple):
            self._refuse(at, 'a value that becomes a tuple')
        else:
            yield names.node, self._node(value, at)

    def _on_For(self, node):
        if node.orelse or not isinstance(node.target, ast.Name):
            self._refuse(node, 'a loop with else or several variables')
        if not isinstance(node.iter, ast.Call):
            self._refuse(node, f'a loop over {ast.unparse(node.iter)}')
        function = self._value(node.iter.func)
        if isinstance(function, _Known) and function.value is tl.static_range:
            return self._static(node)
        return self._loop(node)

    def _static(self, node):
        bounds = [self._value(x) for x in node.iter.args]
        if node.iter.keywords or not all(isinstance(x, _Known) for x in bounds):
            self._refuse(node, f'{ast.unparse(node.iter)} with bounds that are no constants')
        for i in range(*(x.value for x in bounds)):
            self.frame.values[node.target.id] = _Known(i)
            done = self._block(node.body)
            if done is not None:
                return done
        return None

    def _loop(self, node):
        over = self._node(self._value(node.iter), node)
        values = self.frame.values
        variable = self._written(node.target.id)
        for name in (node.target.id, *_counters(node.body)):
            values.pop(name, None)  # another value in the next round: reading it first is refused
        assigned = [x for x in _assigned(node.body) if x in values]
        carried = {}
        for name in assigned:
            value = values[name]
            if isinstance(value, _Known) and not isinstance(value.value, _NUMBERS):
                continue  # must be the same after the body
            carried[name] = self._names_like(value, self._written(name), node)
            self._write(self.body, carried[name], value, node)
            values[name] = carried[name]
        before = dict(values)
        outer, self.body = self.body, []
        values[node.target.id] = _Code(_name(variable))
        self.dynamic += 1
        self._block(node.body)
        self.dynamic -= 1
        names = _Tuple(list(carried.values()))
        self._write(self.body, names, _Tuple([values[x] for x in carried]), node)
        for name in assigned:
            if name not in carried and not _same(values[name], before[name]):
                self._refuse(node, f'{name}, which a loop changes and is no number')
        body, self.body = self.body, outer
        values.clear()
        values.update(before)
        to = ast.Name(variable, ast.Store())
        self.body.append(ast.For(to, over, body or [ast.Pass()], [], lineno=1))
        return None

    # Expressions

    def _whole(self, node):
        """The value of a statement's whole expression."""
        self.whole = node
        return self._value(node)

    def _value(self, node):
        method = getattr(self, f'_of_{type(node).__name__}', None)
        if method is None:
            self._refuse(node, f'{type(node).__name__} ({ast.unparse(node)}) is not known')
        return method(node)

    def _of_Constant(self, node):
        return _Known(node.value)

    def _of_Name(self, node):
        if node.id in self.frame.values:
            return self.frame.values[node.id]
        if node.id in self.frame.names:
            self._refuse(node, f'{node.id}, which may have no value here')
        names = self.frame.function.__globals__
        if node.id in names:
            value = names[node.id]
            found = self._known(value, node)
            if isinstance(found, _Tuple) or isinstance(found.value, (str, *_NUMBERS)):
                return found
            return _Known(found.value, _name(self._global(node.id, found.value)))
        if hasattr(builtins, node.id):
            return _Known(getattr(builtins, node.id), _name(node.id))
        self._refuse(node, f'{node.id}, which may have no value here')

    def _of_Tuple(self, node):
        items = []
        for element in node.elts:
            if isinstance(element, ast.Starred):
                more = self._value(element.value)
                if not isinstance(more, _Tuple):
                    self._refuse(node, f'{ast.unparse(element)}, which is no tuple')
                items += more.items
            else:
                items.append(self._value(element))
        return _Tuple(items)

    def _of_List(self, node):
        items = self._of_Tuple(node).items
        return _Code(ast.List([self._node(x, node) for x in items], ast.Load()))

    def _of_Slice(self, node):
        parts = [None if x is None else self._value(x) for x in (node.lower, node.upper, node.step)]
        return _Code(ast.Slice(*(None if x is None else self._node(x, node) for x in parts)))

    def _of_Attribute(self, node):
        value = self._value(node.value)
        if isinstance(value, _Tuple):
            self._refuse(node, f'an attribute of a tuple ({ast.unparse(node)})')
        inner = self._node(value, node)
        if node.attr == 'element_ty' and isinstance(inner, ast.Attribute):
            name = getattr(inner.value, 'id', None)
            if inner.attr == 'dtype' and name in self.types:
                return self._type(self.types[name])
        code = ast.Attribute(inner, node.attr, ast.Load())
        if isinstance(value, _Code):
            return _Code(code)
        if not hasattr(value.value, node.attr):
            self._refuse(node, f'{ast.unparse(node)}, which does not exist')
        found = getattr(value.value, node.attr)
        if isinstance(found, tl.constexpr):
            found = found.value
        return _Known(found, None if isinstance(found, _NUMBERS) else code)

    def _type(self, name: str) -> _Known:
        language = _name(self._global('tl', tl))
        return _Known(getattr(tl, name), ast.Attribute(language, name, ast.Load()))

    def _of_Subscript(self, node):
        value = self._value(node.value)
        if isinstance(value, _Tuple):
            return self._item(value, node)
        inner = self._node(value, node)
        return _Code(ast.Subscript(inner, self._node(self._value(node.slice), node), ast.Load()))

    def _item(self, value, node):
        part = node.slice
        if isinstance(part, ast.Slice):
            given = (part.lower, part.upper, part.step)
            bounds = [None if x is None else self._value(x) for x in given]
            if all(x is None or isinstance(x, _Known) for x in bounds):
                return _Tuple(value.items[slice(*(x and x.value for x in bounds))])
        else:
            at = self._value(part)
            if isinstance(at, _Known) and isinstance(at.value, int):
                return value.items[at.value]
        self._refuse(node, f'{ast.unparse(node)}, a tuple at a place that is no constant')

    def _of_BinOp(self, node):
        left, right = self._value(node.left), self._value(node.right)
        if isinstance(left, _Tuple) and isinstance(right, _Tuple) and isinstance(node.op, ast.Add):
            return _Tuple([*left.items, *right.items])
        if isinstance(node.op, ast.Mult):
            for many, times in ((left, right), (right, left)):
                if isinstance(many, _Tuple) and isinstance(times, _Known):
                    return _Tuple(many.items * times.value)
        if isinstance(left, _Tuple) or isinstance(right, _Tuple):
            self._refuse(node, f'{ast.unparse(node)}, of a tuple')
        if isinstance(left, _Known) and isinstance(right, _Known):
            return _Known(_OPERATORS[type(node.op)](left.value, right.value))
        return _Code(ast.BinOp(self._node(left, node), node.op, self._node(right, node)))

    def _of_UnaryOp(self, node):
        value = self._value(node.operand)
        if not isinstance(value, _Code):
            if isinstance(node.op, ast.Not):
                return _Known(not _truth(value))
            return _Known(_OPERATORS[type(node.op)](value.value))
        return _Code(ast.UnaryOp(node.op, value.node))

    def _of_Compare(self, node):
        values = [self._value(x) for x in (node.left, *node.comparators)]
        if all(isinstance(x, _Known) for x in values):
            pairs = zip(node.ops, values[:-1], values[1:], strict=True)
            return _Known(all(_compare(op, a.value, b.value) for op, a, b in pairs))
        if len(node.ops) == 1 and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            # What is None was handed over as a constant.
            return _Known(isinstance(node.ops[0], ast.IsNot))
        left, *rest = (self._node(x, node) for x in values)
        return _Code(ast.Compare(left, node.ops, rest))

    def _of_BoolOp(self, node):
        decides = isinstance(node.op, ast.Or)
        left = []
        for operand in node.values:
            value = self._value(operand)
            last = operand is node.values[-1]
            if not isinstance(value, _Code):
                if not left and (last or _truth(value) is decides):
                    return value
                if not last and _truth(value) is not decides:
                    continue
            left.append(self._node(value, node))
        return _Code(left[0] if len(left) == 1 else ast.BoolOp(node.op, left))

    def _of_IfExp(self, node):
        test = self._value(node.test)
        if not isinstance(test, _Code):
            return self._value(node.body if _truth(test) else node.orelse)
        length = len(self.body)
        sides = [self._node(self._value(x), node) for x in (node.body, node.orelse)]
        if len(self.body) != length:
            self._refuse(node, f'{ast.unparse(node)}, of which a launch decides what is computed')
        return _Code(ast.IfExp(test.node, *sides))

    def _of_Call(self, node):
        function = self._value(node.func)
        arguments = self._of_Tuple(ast.Tuple(node.args, ast.Load(), lineno=node.lineno)).items
        if any(x.arg is None for x in node.keywords):
            self._refuse(node, f'{ast.unparse(node)}, with two stars')
        named = {x.arg: self._value(x.value) for x in node.keywords}
        if isinstance(function, _Known):
            found = self._constant_call(function.value, arguments, named, node)
            if found is not None:
                return found
            if _is_helper(function.value):
                return self._inlined(function.value, arguments, named, node)
            callee = function.value
            ours = getattr(callee, '__module__', None) or ''
            if ours.partition('.')[0] not in ('triton', 'builtins', ''):
                self._refuse(node, f'{ast.unparse(node.func)}, which is no function of Triton')
        return _Code(ast.Call(
            self._node(function, node),
            [self._node(x, node) for x in arguments],
            [ast.keyword(name, self._node(x, node)) for name, x in named.items()],
        ))

    def _constant_call(self, function, arguments, named, node):
        if function is tl.constexpr:
            return arguments[0]
        if function is tl.static_assert:
            test = arguments[0] if arguments else named['cond']
            if not isinstance(test, _Known):
                self._refuse(node, 'an assertion about what only a launch decides')
            assert test.value, ast.unparse(node)
            return _Known(None)
        if function is len and isinstance(arguments[0], _Tuple):
            return _Known(len(arguments[0].items))
        if named or not all(isinstance(x, _Known) for x in arguments):
            return None
        values = [x.value for x in arguments]
        if function is tl.cdiv:
            return _Known(-(-values[0] // values[1]))
        if function in _PURE:
            return _Known(function(*values))
        return None

    # Helpers, where they are called

    def _inlined(self, helper, arguments, named, node):
        definition = _definition(helper)
        given = definition.args
        if given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs:
            self._refuse(node, f'parameters of {definition.name} that are not plain')
        names = [x.arg for x in given.args]
        bound = dict(zip(names, arguments, strict=False)) | named
        outer = self.frame
        self.frame = _Frame(helper.fn, {}, {})
        defaults = zip(names[len(names) - len(given.defaults) :], given.defaults, strict=True)
        for name, default in defaults:
            if name not in bound:
                bound[name] = self._value(default)
        if set(bound) != set(names) or len(arguments) > len(names):
            self._refuse(node, f'{definition.name} with other arguments than {", ".join(names)}')
        self.depth += 1
        outer_dynamic, self.dynamic = self.dynamic, 0
        whole, length = self.whole, len(self.body)
        changed = _assigned(definition.body)
        for parameter in given.args:
            value = bound[parameter.arg]
            if isinstance(value, _Code) and (
                _is_property(value.node)
                or (isinstance(value.node, ast.Name) and parameter.arg not in changed)
            ):
                self.frame.values[parameter.arg] = value
                continue
            if _is_constant(parameter) and isinstance(value, _Code):
                what = f'{parameter.arg}={ast.unparse(value.node)}'
                self._refuse(node, f'{what}, which is no constant')
            self._bind(ast.Name(parameter.arg, ast.Store()), value)
        done = self._block(definition.body)
        result = _Known(None) if done is None else self._kept(done.value, definition.name, node)
        self.dynamic = outer_dynamic
        self.depth -= 1
        self.frame = outer
        if node is not whole and _has_effects(self.body[length:]):
            self._refuse(node, f'{ast.unparse(node)} within an expression, as it writes to memory')
        return result


def _name(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _is_helper(function) -> bool:
    """Whether this is a function for ``triton.jit`` that is not Triton's own."""
    inner = getattr(function, 'fn', None)
    return inspect.isfunction(inner) and inner.__module__.partition('.')[0] != 'triton'


def _is_property(node: ast.expr) -> bool:
    """Whether code is what the compiler knows of a block: p.dtype.element_ty or x.shape[0]."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Attribute) and node.value.attr == 'shape'
    return isinstance(node, ast.Attribute) and node.attr in ('dtype', 'element_ty')


def _has_effects(statements) -> bool:
    """Whether statements write to memory or wait for other threads."""
    nodes = itertools.chain(*map(ast.walk, statements))
    return any(
        isinstance(x, ast.Attribute)
        and ('store' in x.attr or x.attr.startswith(('atomic', 'debug')))
        for x in nodes
    )


def _truth(value) -> bool:
    return bool(value.items if isinstance(value, _Tuple) else value.value)


def _compare(op, a, b) -> bool:
    if isinstance(op, ast.In):
        return a in b
    if isinstance(op, ast.NotIn):
        return a not in b
    return _OPERATORS[type(op)](a, b)


def _same(a, b) -> bool:
    """Whether two values are the same code or constant."""
    if type(a) is not type(b):
        return False
    if isinstance(a, _Tuple):
        return len(a.items) == len(b.items) and all(map(_same, a.items, b.items))
    if isinstance(a, _Known):
        return type(a.value) is type(b.value) and (a.value is b.value or a.value == b.value)
    return ast.dump(a.node) == ast.dump(b.node)


def _reassigned(statements) -> set[str]:
    """Names that get another value than a moved one (p += n)."""
    nodes = list(itertools.chain(*map(ast.walk, statements)))
    moved = {id(x.target) for x in nodes if isinstance(x, ast.AugAssign)}
    return {
        x.id
        for x in nodes
        if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store) and id(x) not in moved
    }


def _counters(statements) -> list[str]:
    """Variables of the loops among statements."""
    nodes = itertools.chain(*map(ast.walk, statements))
    return [x.target.id for x in nodes if isinstance(x, ast.For) and isinstance(x.target, ast.Name)]


def _assigned(statements) -> list[str]:
    """Names that statements assign to, in order."""
    found = {}
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found[node.id] = None
    return list(found)
