"""Compiles Triton kernels for a GPU that is not there, and reads the machine code.

Launchers run on meta tensors with recorders in place of the kernels; every recorded launch is
compiled as Triton would compile it. Importing this skips the tests where that is impossible.
"""

import collections
import contextlib
import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from mmhybrid.ops import triton_support

triton = pytest.importorskip('triton', reason='the kernels need Triton')
if tuple(int(x) for x in triton.__version__.split('.')[:2]) < (3, 6):
    reason = f'the counts are those of Triton 3.6, not {triton.__version__}'
    pytest.skip(reason, allow_module_level=True)
if triton_support.interpreting():
    pytest.skip('TRITON_INTERPRET=1 replaces the compiler', allow_module_level=True)
CUOBJDUMP = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
if not CUOBJDUMP.exists():
    pytest.skip('this Triton has no disassembler for NVIDIA GPUs', allow_module_level=True)

TYPES = {
    torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.int32: '*i32',
}


@contextlib.contextmanager
def compiler(module, tmp_path_factory):
    """A module of kernels, to be compiled into an empty cache."""
    previous = os.environ.get('TRITON_CACHE_DIR')
    os.environ['TRITON_CACHE_DIR'] = str(tmp_path_factory.mktemp('triton'))
    try:
        yield importlib.import_module(module)
    finally:
        if previous is None:
            del os.environ['TRITON_CACHE_DIR']
        else:
            os.environ['TRITON_CACHE_DIR'] = previous


class Recorder:
    """Stands in for a kernel and appends (kernel, arguments) to ``calls`` at every launch."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda **arguments: self.calls.append((self.kernel, arguments))


def specialisation(kernel, arguments):
    """Signature, constants and attributes, by the rules of Triton's launcher."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        special = not parameter.do_not_specialize
        one = special and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = 'constexpr', value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = 'i32' if value < 2**31 else 'i64'
        if special and (isinstance(value, torch.Tensor) or value % 16 == 0):
            attributes[(i,)] = [['tt.divisibility', 16]]
    return signature, constants, attributes


Program = collections.namedtuple('Program', 'registers stack shared loops opcodes bodies')


def build(kernel, arguments, capability, folder):
    signature, constants, attributes = specialisation(kernel, arguments)
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, attributes),
        target=triton.backends.compiler.GPUTarget('cuda', capability, 32),
        options={name: arguments[name] for name in OPTIONS if name in arguments},
    )
    path = folder / 'kernel.cubin'
    path.write_bytes(compiled.asm['cubin'])

    def dump(what):
        done = subprocess.run([CUOBJDUMP, what, path], capture_output=True, text=True, check=True)
        return done.stdout

    usage = dump('--dump-resource-usage')
    line = r'/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);'
    code = [(int(at, 16), op, rest) for at, op, rest in re.findall(line, dump('--dump-sass'))]
    assert code, 'the disassembly has no instructions: has its format changed?'
    bodies = []
    for at, op, rest in code:
        target = re.search(r'0x([0-9a-f]+)', rest) if op.startswith('BRA') else None
        if target and int(target[1], 16) < at:
            body = [line[1:] for line in code if int(target[1], 16) <= line[0] <= at]
            bodies.append(body)
    bodies.sort(key=len)
    return Program(
        *(int(re.search(name + r':(\d+)', usage)[1]) for name in ('REG', 'STACK', 'SHARED')),
        [collections.Counter(op for op, _ in body) for body in bodies],
        collections.Counter(op for _, op, _ in code),
        bodies,
    )


OPTIONS = ('num_warps', 'maxnreg', 'launch_pdl')
WORDS = {'64': 2, '128': 4}
# Instructions of which no operand is written.
SINKS = {'STG', 'STS', 'STL', 'BRA', 'BAR', 'EXIT', 'ISETP', 'FSETP', 'PLOP3', 'R2UR', 'WARPSYNC'}


def registers(operand, wide=False):
    """Numbers of the registers that an operand names, the second of a pair included."""
    found = set()
    for number, pair in re.findall(r'\bR(\d+)(\.64)?', operand):
        found |= {int(number), int(number) + bool(pair or wide)}
    return found


def use_distances(body):
    """For every global load of a loop, the instructions until its result is first read.

    The loop goes round: a result that is read in the next iteration is as far as both parts of the
    way together.
    """
    reads, writes = [], []
    for op, rest in body:
        family, *forms = op.split('.')
        operands = rest.split(',')
        to = [] if family in SINKS else operands[:1]
        size = max((WORDS.get(form, 1) for form in forms), default=1)
        if family in ('STG', 'STL', 'STS'):
            values = registers(operands[-1])
            values = {value + i for value in values for i in range(size)}
            reads.append(registers(operands[0]) | registers(operands[1]) | values)
        else:
            # The third factor of a wide product is a pair.
            last = registers(operands[-1], wide='WIDE' in forms) if len(operands) > 1 else set()
            reads.append(last.union(*map(registers, operands[len(to) : -1] or [''])))
        written = set().union(*map(registers, to))
        if family in ('LDG', 'LDC', 'LDS', 'LDL') or 'WIDE' in forms:
            size = max(size, 2 if 'WIDE' in forms else 1)
            written = {value + i for value in written for i in range(size)}
        writes.append(written)
    found = []
    for i, (op, _) in enumerate(body):
        if op.startswith('LDG'):
            after = (j % len(body) for j in range(i + 1, i + 1 + len(body)))
            read = (n for n, j in enumerate(after, 1) if reads[j] & writes[i])
            found.append(next(read, len(body)))
    return found


def count(opcodes, *families):
    return sum(n for op, n in opcodes.items() if op.split('.')[0] in families)


