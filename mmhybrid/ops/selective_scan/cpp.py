"""The selective scan as a compiled CPU kernel: builds scan.cpp on first use and calls it.

Nothing depends on it: without a compiler `problem()` says so and `auto` takes another backend.

B batch, D channels, L tokens, N state, G groups, H = D / G, NP = N padded to whole parts.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .operator import apply_gate, gate_gradients, make_operator

__all__ = ['problem', 'refusal', 'selective_scan_cpp']

#: Environment variable: the folder for compiled files, in place of the user's cache folder.
CACHE_VARIABLE = 'MMHYBRID_CACHE'
_SOURCE = Path(__file__).with_name('scan.cpp')
# No -ffast-math: it would remove the rounding in the exponential.
_FLAGS = ('-std=c++17', '-O3', '-ffp-contract=fast', '-fno-math-errno', '-fPIC', '-shared')
_TILE = 32  # tokens between two states kept for the backward pass; TILE in scan.cpp
# State values per thread below which waking another thread costs more than it brings.
_WORK_PER_THREAD = 64 * 1024


# Building -----------------------------------------------------------------------------------------


class BuildError(Exception):
    """The kernel cannot be built or loaded; the message says why and what to do."""


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'mmhybrid'


def _compiler() -> str:
    wanted = os.environ.get('CXX') or 'g++'
    found = shutil.which(wanted)
    if found is None:
        raise BuildError(
            f"there is no C++ compiler ('{wanted}'); install g++ for a faster CPU scan, or go on "
            'without it'
        )
    return found


def _processor() -> str:
    """What -march=native depends on; a cache may be shared by machines that differ in it."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith(('flags', 'Features')):
                return line
    return f'{platform.machine()} {platform.processor()}'


def _openmp_of_torch() -> str | None:
    """The OpenMP library that PyTorch has loaded, if it is GNU's.

    Linking to this very file lets kernel and PyTorch share one team of threads; two teams would
    keep each other from the cores.
    """
    found = []
    with contextlib.suppress(OSError):
        for line in Path('/proc/self/maps').read_text().splitlines():
            path = Path(line.split()[-1])
            if path.name.startswith('libgomp') and path.exists():
                found.append(path)
    # Other packages may have brought their own; PyTorch's lies with PyTorch, or is the system's.
    home = Path(torch.__file__).parent
    homes = (home, home.with_name('torch.libs'))
    found.sort(key=lambda path: not any(x in path.parents for x in homes))
    return str(found[0]) if found else None


def _attempts() -> list[tuple[str, ...]]:
    """Flag sets to try in order: with PyTorch's OpenMP, any OpenMP, none; each may fail."""
    openmp = _openmp_of_torch()
    linked = [('-march=native', '-fopenmp', openmp)] if openmp else []
    return [*linked, ('-march=native', '-fopenmp'), ('-march=native',), ()]


def _compile(compiler: str, target: Path) -> None:
    """Build into a temporary file beside the target, then rename: readers never see half a file."""
    handle, name = tempfile.mkstemp(suffix='.so', dir=target.parent)
    os.close(handle)
    output = Path(name)
    try:
        errors = ''
        for flags in _attempts():
            options = [x for x in flags if x.startswith('-')]
            libraries = [x for x in flags if not x.startswith('-')]
            command = [compiler, *_FLAGS, *options, str(_SOURCE), *libraries, '-o', name]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f'the compiler {compiler} did not run ({error})') from error
            if done.returncode == 0:
                output.chmod(0o755)
                os.replace(output, target)
                return
            errors = done.stderr.strip() or done.stdout.strip()
        last_line = errors.splitlines()[-1] if errors else 'it printed nothing'
        raise BuildError(
            f'{compiler} could not compile {_SOURCE.name} ({last_line}); try another compiler with '
            'the environment variable CXX'
        )
    finally:
        output.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path):
    """Hold a lock file; several processes may want to build at once."""
    try:
        import fcntl
    except ImportError as error:
        raise BuildError('it is only built on Linux and macOS') from error
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def build() -> Path:
    """Path of the compiled library for this source, compiler and processor; built if need be.

    Raises:
        BuildError: with the reason and the remedy.
    """
    compiler = _compiler()
    identity = hashlib.sha256(_SOURCE.read_bytes())
    for part in (compiler, str(os.path.getmtime(compiler)), _processor(), *map(str, _attempts())):
        identity.update(part.encode())
    folder = _cache_folder()
    target = folder / f'scan-{identity.hexdigest()[:20]}.so'
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / 'scan.lock'):
            if not target.exists():
                _compile(compiler, target)
    except OSError as error:
        raise BuildError(
            f'{folder} cannot be written ({error.strerror}); name another folder with the '
            f'environment variable {CACHE_VARIABLE}'
        ) from error
    return target


class _View(ctypes.Structure):
    _fields_ = [('data', ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ('batch', 'channel', 'token')
    ]


class _Arguments(ctypes.Structure):
    """Mirror of Arguments in scan.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ('batch', 'groups', 'heads', 'length', 'padded_state',
                                             'softplus', 'threads')]
        + [(name, _View) for name in ('u', 'delta', 'y')]
        + [(name, ctypes.c_void_p) for name in ('A', 'B', 'C', 'D', 'bias', 'starts')]
        + [(name, _View) for name in ('grad_y', 'grad_u', 'grad_delta')]
        + [(name, ctypes.c_void_p) for name in ('grad_last', 'grad_A', 'grad_B', 'grad_C',
                                                'grad_D', 'grad_bias')]
    )  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded kernel, or why there is none."""
    try:
        library = ctypes.CDLL(str(build()))
        for function in ('forward', 'backward'):
            function = getattr(library, f'mmhybrid_scan_{function}')
            function.argtypes, function.restype = [ctypes.POINTER(_Arguments)], None
        library.mmhybrid_scan_arguments.restype = ctypes.c_int64
    except (BuildError, OSError, AttributeError) as error:
        return f'the compiled scan kernel is not available: {error}'
    assert library.mmhybrid_scan_arguments() == ctypes.sizeof(_Arguments)
    return library


@torch.compiler.assume_constant_result  # the compiler asks once while it traces
def problem() -> str | None:
    """Why the kernel cannot be used on this machine; None when it can. Builds it on first use."""
    library = _library()
    return library if isinstance(library, str) else None


def refusal(call) -> str | None:
    """Why the kernel does not take a call; None when it does."""
    if call.device.type != 'cpu':
        return f"the compiled kernel runs on the CPU and the tensors are on '{call.device}'"
    if call.dtype != torch.float32:
        return f"the compiled kernel computes in float32, not {call.dtype}; use backend='torch'"
    return None


# Calling ------------------------------------------------------------------------------------------


def _padded_state(state: int) -> int:
    for part in (1, 2, 4):
        if state <= part:
            return part
    return -(-state // 8) * 8


def _view(x: Tensor, reverse: bool) -> _View:
    batch, channel, token = x.stride()
    first = x.data_ptr()
    if reverse:
        first += (x.shape[2] - 1) * token * x.element_size()
        token = -token
    return _View(first, batch, channel, token)


def _pack_weights(x: Tensor, padded: int, reverse: bool) -> Tensor:
    """(B, G, N, L) to (B, G, L, NP) in scan order."""
    x = x.transpose(-1, -2)
    if reverse:
        x = x.flip(-2)
    if padded != x.shape[-1]:
        x = torch.nn.functional.pad(x, (0, padded - x.shape[-1]))
    return x.float().contiguous()


def _pack_state(x: Tensor, groups: int, padded: int) -> Tensor:
    """(..., D, N) to (..., G, NP, H)."""
    x = x.unflatten(-2, (groups, -1)).transpose(-1, -2)
    if padded != x.shape[-2]:
        x = torch.nn.functional.pad(x, (0, 0, 0, padded - x.shape[-2]))
    return x.float().contiguous()


def _unpack_state(x: Tensor, state: int) -> Tensor:
    """Undo `_pack_state`, into new memory."""
    out = x[..., :state, :].transpose(-1, -2).flatten(-3, -2)
    return out.clone(memory_format=torch.contiguous_format)


class _Problem:
    """The tensors of one call in the kernel's layouts, and the struct that points to them.

    The tensors are kept as attributes, because the struct holds only their addresses.
    """

    def __init__(self, u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
        batch, channels, length = u.shape
        self.groups, self.state = B.shape[1:3]
        self.padded = _padded_state(self.state)
        self.reverse = reverse
        self.u, self.delta = u.float(), delta.float()
        self.A = _pack_state(A, self.groups, self.padded)
        self.B = _pack_weights(B, self.padded, reverse)
        self.C = _pack_weights(C, self.padded, reverse)
        self.D = None if D is None else D.contiguous()
        self.bias = None if delta_bias is None else delta_bias.contiguous()
        work = batch * channels * length * self.padded
        self.arguments = _Arguments(
            batch=batch,
            groups=self.groups,
            heads=channels // self.groups,
            length=length,
            padded_state=self.padded,
            softplus=delta_softplus,
            threads=max(1, min(torch.get_num_threads(), work // _WORK_PER_THREAD)),
            u=_view(self.u, reverse),
            delta=_view(self.delta, reverse),
        )
        self.point(A=self.A, B=self.B, C=self.C, D=self.D, bias=self.bias)

    def point(self, **tensors: Tensor | None) -> None:
        """Enter contiguous tensors by their address; None stays null."""
        for name, x in tensors.items():
            if x is not None:
                assert x.is_contiguous() and x.dtype == torch.float32, name
                setattr(self.arguments, name, x.data_ptr())

    def view(self, **tensors: Tensor) -> None:
        """Enter (B, D, L) tensors with their strides, in scan order."""
        for name, x in tensors.items():
            assert x.dtype == torch.float32, name
            setattr(self.arguments, name, _view(x, self.reverse))

    def call(self, function: str) -> None:
        """Run one of the kernel's functions."""
        getattr(_library(), f'mmhybrid_scan_{function}')(ctypes.byref(self.arguments))


def _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    p = _Problem(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    starts = torch.empty(_starts_shape(u, A, B))
    y = torch.empty(u.shape)
    p.view(y=y)
    p.point(starts=starts)
    p.call('forward')
    last_state = _unpack_state(starts[-1], p.state)
    ungated = torch.empty(0)
    if z is not None:
        ungated, y = y, apply_gate(y, z)
    return y.to(u.dtype), last_state, starts, ungated


def _backward(
    grad_y, grad_last_state, starts, ungated,
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse,
):  # fmt: skip
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    p = _Problem(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    grad_y = torch.zeros(u.shape) if grad_y is None else grad_y.float()
    grad_z = None
    if z is not None:
        grad_y, grad_z = gate_gradients(grad_y, ungated, z)
    grad_u, grad_delta = torch.empty(u.shape), torch.empty(u.shape)
    grad_A = torch.empty(u.shape[0], *p.A.shape)
    grad_B, grad_C = torch.empty_like(p.B), torch.empty_like(p.C)
    grad_D, grad_bias = torch.empty(u.shape[:2]), torch.empty(u.shape[:2])
    grad_last = None
    if grad_last_state is not None:
        grad_last = _pack_state(grad_last_state, p.groups, p.padded)
    p.view(grad_y=grad_y, grad_u=grad_u, grad_delta=grad_delta)
    p.point(starts=starts.contiguous(), grad_last=grad_last, grad_A=grad_A, grad_B=grad_B,
            grad_C=grad_C, grad_D=grad_D, grad_bias=grad_bias)  # fmt: skip
    p.call('backward')

    def unpack_weights(x):
        x = x[..., : p.state].transpose(-1, -2)
        return x.flip(-1) if reverse else x

    grads = (
        grad_u,
        grad_delta,
        _unpack_state(grad_A.sum(0), p.state),
        unpack_weights(grad_B),
        unpack_weights(grad_C),
        grad_D.sum(0),
        grad_z,
        grad_bias.sum(0),
    )
    return tuple(
        torch.empty(0) if x is None else grad.to(x.dtype).contiguous()
        for x, grad in zip(inputs, grads, strict=True)
    )


def _starts_shape(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    batch, channels, length = u.shape
    groups = B.shape[1]
    tiles = -(-length // _TILE)
    return tiles + 1, batch, groups, _padded_state(A.shape[1]), channels // groups


selective_scan_cpp = make_operator(
    'selective_scan_cpp', _forward, _backward, _starts_shape, device_types='cpu'
)
