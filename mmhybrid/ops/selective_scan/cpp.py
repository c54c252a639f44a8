"""The selective scan as a compiled CPU kernel: builds scan.cpp on first use and calls it.

Nothing depends on it: without a compiler `unavailable_reason()` says so and `auto` takes another
backend.

B batch, D channels, L tokens, N state, G groups, H = D / G, NP = N padded to whole parts.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ...private_files import alone, exposure, exposure_of, open_regular
from .. import library as operators
from .operator import REFUSAL, apply_gate, gate_gradients, make_operator

__all__ = ['distrusts_cache', 'normed_means', 'scaled_sum', 'scan_ordered', 'selective_scan_cpp',
           'unavailable_reason', 'unsupported_reason']

#: Environment variable: the folder for compiled files, in place of the user's cache folder.
CACHE_VARIABLE = 'MMHYBRID_CACHE'
_SOURCE = Path(__file__).with_name('scan.cpp')
# No -ffast-math: it would remove the rounding in the exponential.
_FLAGS = ('-std=c++17', '-O3', '-ffp-contract=fast', '-fno-math-errno', '-fPIC', '-shared')
_PATIENCE = 300  # seconds that one run of a compiler may take
_TILE = 32  # tokens between two states kept for the backward pass; TILE in scan.cpp
# State values per thread below which waking another thread costs more than it brings.
_WORK_PER_THREAD = 64 * 1024


# Building -----------------------------------------------------------------------------------------


class BuildError(Exception):
    """The kernel cannot be built or loaded; the message says why and what to do."""


class UnsafeCache(BuildError):
    """What lies in the cache folder may be from somebody else, and loading it would run it."""


def _cache_folder() -> Path:
    general = os.environ.get('XDG_CACHE_HOME', '')
    if not os.path.isabs(general):
        general = '~/.cache'  # the specification tells programs to ignore relative paths
    try:
        folder = Path(os.environ.get(CACHE_VARIABLE) or f'{general}/mmhybrid').expanduser()
    except RuntimeError as error:
        raise BuildError('no home folder is known to keep the compiled kernel in; name a folder '
                         f'with the environment variable {CACHE_VARIABLE}') from error
    return folder.absolute()


def _compiler() -> list[str]:
    """The command of CXX: a path, which may have spaces in it, or a program and its options."""
    wanted = os.environ.get('CXX', '').strip() or 'g++'
    command = [wanted]
    if shutil.which(wanted) is None:
        try:
            command = shlex.split(wanted)
        except ValueError as error:
            raise BuildError(f'CXX={wanted} is no command ({error}); correct it') from error
    found = shutil.which(command[0])
    if found is None:
        raise BuildError(
            f"there is no C++ compiler ('{wanted}'); install g++ for a faster CPU scan, or go on "
            'without it'
        )
    return [found, *command[1:]]


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


def _run(command: list[str]) -> tuple[int, str]:
    """Run a compiler, with all processes that it starts; gives its exit status and first error."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    except OSError as error:
        raise BuildError(f'the compiler {command[0]} did not run ({error})') from error
    try:
        said, _ = process.communicate(timeout=_PATIENCE)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if isinstance(error, subprocess.TimeoutExpired):
            raise BuildError(f'the compiler {command[0]} did not end within {_PATIENCE} s; try '
                             'another with the environment variable CXX') from error
        raise
    lines = said.decode(errors='replace').strip().splitlines() or ['it printed nothing']
    line = next((x for x in lines if 'error:' in x), lines[-1])
    return process.returncode, ''.join(x for x in line if x.isprintable())[:300]


def _compile(compiler: list[str], source: Path, folder: Path, stem: str) -> Path:
    """Build in a private folder, then rename: readers never see half a file.

    The new name has the checksum of the content, by which a damaged file is known.
    """
    for left in folder.glob('build-*'):  # by a process that was killed, as we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix='build-', dir=folder) as work:
        output = Path(work) / 'scan.so'
        for flags in _attempts():
            options = [x for x in flags if x.startswith('-')]
            libraries = [x for x in flags if not x.startswith('-')]
            status, said = _run([*compiler, *_FLAGS, *options, str(source), *libraries,
                                 '-o', str(output)])
            if status == 0:
                break
        else:
            if os.strerror(errno.ENOSPC) in said:
                raise BuildError(f'a disk is full ({said}); make room, or name another folder '
                                 f'than {folder} with the environment variable {CACHE_VARIABLE}')
            raise BuildError(
                f'{shlex.join(compiler)} could not compile {source.name} ({said}); try another '
                'compiler with the environment variable CXX'
            )
        content = output.read_bytes() if output.is_file() else b''
        if not content:
            raise BuildError(f'{shlex.join(compiler)} ended without an error and without a '
                             'library; try another compiler with the environment variable CXX')
        output.chmod(0o755)
        target = folder / f'{stem}-{hashlib.sha256(content).hexdigest()}.so'
        for damaged in folder.glob(f'{stem}-*.so'):
            damaged.unlink(missing_ok=True)
        return output.replace(target)


def _open_checked(library: Path) -> int | None:
    """Open a library that is this user's and has the checksum of its name; None if it has not.

    Raises:
        UnsafeCache: if somebody else could have written it.
    """
    try:
        handle = open_regular(library, os.O_RDONLY)
    except FileNotFoundError:  # another process builds it anew
        return None
    except OSError as error:
        raise UnsafeCache(f'{library} is not loaded: {error.strerror}; remove it') from error
    with open(handle, 'rb', closefd=False) as file:
        exposed = exposure_of(os.fstat(handle), library)
        if exposed is None and library.stem.endswith(hashlib.sha256(file.read()).hexdigest()):
            return handle
    os.close(handle)
    if exposed:
        raise UnsafeCache(f'{exposed}, or remove it, because loading it would run what is in it')
    return None


def _find(folder: Path, stem: str) -> Path | None:
    for library in sorted(folder.glob(f'{stem}-*.so')):
        handle = _open_checked(library)
        if handle is not None:
            os.close(handle)
            return library
    return None


def build(source: Path | None = None) -> Path:
    """Path of the compiled library for a source (None for the scan's), compiler and processor.

    It is built if need be.

    Raises:
        BuildError: with the reason and the remedy.
    """
    if os.name != 'posix':
        raise BuildError('it is only built on Linux and macOS')
    compiler, source = _compiler(), source or _SOURCE
    identity = hashlib.sha256(source.read_bytes())
    parts = (*compiler, os.path.getmtime(compiler[0]), _processor(), *_attempts())
    for part in parts:
        identity.update(str(part).encode())
    stem = f'{source.stem}-{identity.hexdigest()[:20]}'
    folder = _cache_folder()
    try:
        for missing in (x for x in (*reversed(folder.parents), folder) if not x.exists()):
            missing.mkdir(mode=0o700, exist_ok=True)  # whatever the umask allows
        exposed = exposure(folder)
        if exposed:
            raise UnsafeCache(f'{exposed}, or name a folder of your own with the environment '
                              f'variable {CACHE_VARIABLE}, because a compiled kernel from there '
                              "could be anybody's")
        found = _find(folder, stem)
        if found is None:
            with alone(folder / 'scan.lock'):
                found = _find(folder, stem) or _compile(compiler, source, folder, stem)
    except TimeoutError as error:
        raise BuildError(error.strerror) from error
    except OSError as error:
        raise BuildError(
            f'{folder} cannot be written ({error.strerror}); name another folder with the '
            f'environment variable {CACHE_VARIABLE}'
        ) from error
    return found


class _View(ctypes.Structure):
    _fields_ = [('data', ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ('batch', 'group', 'channel', 'token')
    ]


class _Rows(ctypes.Structure):
    _fields_ = [('data', ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ('batch', 'group', 'token')
    ]


class _Arguments(ctypes.Structure):
    """Mirror of Arguments in scan.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in (
            'batch', 'groups', 'group_dim', 'length', 'tokens', 'padded_state', 'rank', 'softplus',
            'threads', 'reverse', 'shared', 'merged')]
        + [('order', ctypes.c_void_p), ('order_stride', ctypes.c_int64)]
        + [(name, _View) for name in ('u', 'delta', 'y')]
        + [(name, _Rows) for name in ('B', 'C', 'low')]
        + [(name, ctypes.c_void_p) for name in ('weight', 'A', 'D', 'bias', 'starts', 'last')]
        + [(name, _View) for name in ('grad_y', 'grad_u', 'grad_delta')]
        + [(name, ctypes.c_void_p) for name in ('grad_last', 'grad_A', 'grad_B', 'grad_C',
                                                'grad_D', 'grad_bias')]
    )


class _Unsafe(str):
    """Why there is no kernel, where the reason is one that a user must hear of."""


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded kernel, or why there is none."""
    try:
        library = load(build())
        for function in ('forward', 'backward'):
            function = getattr(library, f'mmhybrid_scan_{function}')
            function.argtypes, function.restype = [ctypes.POINTER(_Arguments)], None
        library.mmhybrid_scan_arguments.restype = ctypes.c_int64
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.mmhybrid_normed_means.argtypes = [
            pointer, *[number] * 4, ctypes.c_float, pointer, number]
        library.mmhybrid_scaled_sum.argtypes = [*[pointer] * 2, *[number] * 4, pointer, number]
        for function in (library.mmhybrid_normed_means, library.mmhybrid_scaled_sum):
            function.restype = None
        fits = library.mmhybrid_scan_order_fits
        fits.argtypes, fits.restype = [ctypes.c_void_p, *[ctypes.c_int64] * 2], ctypes.c_int64
    except (BuildError, OSError, AttributeError) as error:
        kind = _Unsafe if isinstance(error, UnsafeCache) else str
        return kind(f'the compiled scan kernel is not available: {error}')
    assert library.mmhybrid_scan_arguments() == ctypes.sizeof(_Arguments)
    return library


def load(path: Path) -> ctypes.CDLL:
    """Open what :func:`build` gave."""
    handle = _open_checked(path)
    if handle is None:
        raise BuildError(f'{path} changed while it was loaded; try again')
    # By its number in Linux: another file could get the name after the check. It stays open,
    # because the loader remembers names, and another file would get the same number.
    opened = f'/proc/self/fd/{handle}'
    try:
        return ctypes.CDLL(opened if os.path.exists(opened) else str(path))
    except OSError as error:
        os.close(handle)
        raise BuildError(f'{path} cannot be loaded ({error}); remove it, and it is built again'
                         ) from error


@torch.compiler.assume_constant_result  # the compiler asks once while it traces
def unavailable_reason() -> str | None:
    """Why the kernel cannot be used on this machine; None when it can. Builds it on first use."""
    library = _library()
    return library if isinstance(library, str) else None


def distrusts_cache() -> bool:
    """Whether the kernel is left aside because others could have put it into its folder."""
    return isinstance(_library(), _Unsafe)


def unsupported_reason(call) -> str | None:
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


def _side_by_side(x: Tensor) -> Tensor:
    """The same (B, G, H, L) in float32 with the channels of a token side by side in memory."""
    x = x.float()
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.mT.contiguous().mT


def _token_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of (B, G, H, L) that lies as (B, L, G, H)."""
    _, groups, channels, tokens = shape
    row = groups * channels
    return tokens * row, channels, 1, row


def _state_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of (B, G, N, L) that lies as (B, G, L, N)."""
    _, groups, state, tokens = shape
    return groups * tokens * state, tokens * state, 1, state


def _empty(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=torch.float32)


def _rows_of(x: Tensor, padded: int) -> Tensor:
    """(B, G, N, L) in float32 so that the NP values of a token are neighbours; (B, G, L, NP)."""
    x = x.transpose(-1, -2).float()
    if padded != x.shape[-1]:
        return torch.nn.functional.pad(x, (0, padded - x.shape[-1]))
    return x if x.stride(-1) == 1 or padded == 1 else x.contiguous()


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

    The tensors are kept as attributes, because the struct holds only their addresses. Sequences are
    (B, G, H, L) here, or (B, 1, H, L) for u that all groups share. With ``weight`` (G, H, R) delta
    is (B, G, R, L), and the kernel expands it.
    """

    def __init__(
        self, u, delta, weight, A, B, C, D, delta_bias, softplus, *, order=None, reverse=False
    ):
        self.batch, self.groups, self.state, self.tokens = B.shape
        self.group_dim, self.padded = u.shape[2], _padded_state(self.state)
        self.u, self.delta = u.float(), delta.float()
        self.A = _pack_state(A, self.groups, self.padded)
        self.B, self.C = _rows_of(B, self.padded), _rows_of(C, self.padded)
        self.D, self.bias = (x if x is None else x.contiguous() for x in (D, delta_bias))
        length = self.tokens if order is None else order.shape[1]
        work = self.batch * self.groups * self.group_dim * length * self.padded
        self.arguments = _Arguments(
            batch=self.batch,
            groups=self.groups,
            group_dim=self.group_dim,
            length=length,
            tokens=self.tokens,
            padded_state=self.padded,
            softplus=softplus,
            threads=max(1, min(torch.get_num_threads(), work // _WORK_PER_THREAD)),
            reverse=reverse,
            shared=u.shape[1] < self.groups,
            B=_rows(self.B),
            C=_rows(self.C),
        )
        self.view(u=self.u)
        self.point(A=self.A, D=self.D, bias=self.bias)
        if weight is None:
            self.view(delta=self.delta)
        else:
            self.weight, self.low = weight.float().mT.contiguous(), _rows_of(delta, weight.shape[2])
            self.arguments.rank, self.arguments.low = weight.shape[2], _rows(self.low)
            self.point(weight=self.weight)
        if order is not None:
            self.order = order
            self.arguments.order = order.data_ptr()
            self.arguments.order_stride = length if order.shape[0] > 1 else 0

    def point(self, **tensors: Tensor | None) -> None:
        """Enter contiguous tensors by their address; None stays null."""
        for name, x in tensors.items():
            if x is not None:
                assert x.is_contiguous() and x.dtype == torch.float32, name
                setattr(self.arguments, name, x.data_ptr())

    def view(self, **tensors: Tensor) -> None:
        """Enter (B, G or 1, H, L) tensors with their strides."""
        for name, x in tensors.items():
            assert x.dtype == torch.float32 and x.shape[2:] == (self.group_dim, self.tokens), name
            batch, group, channel, token = x.stride()
            group = 0 if x.shape[1] < self.groups else group
            # A single channel or token may have any stride.
            channel = 1 if x.shape[2] == 1 and token != 1 else channel
            setattr(self.arguments, name, _View(x.data_ptr(), batch, group, channel, token))

    def call(self, function: str) -> None:
        """Run one of the kernel's functions."""
        getattr(_library(), f'mmhybrid_scan_{function}')(ctypes.byref(self.arguments))

    def forward(self, y: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """Fill y; give the last state (B, D, N), and if ``keep`` the states before the tiles."""
        size = self.batch, self.groups, self.padded, self.group_dim
        starts = torch.empty(-(-self.arguments.length // _TILE) if keep else 0, *size)
        last = torch.empty(size)
        self.arguments.merged = y.shape[1] < self.groups
        self.view(y=y)
        self.point(starts=starts if keep else None, last=last)
        self.call('forward')
        return _unpack_state(last, self.state), starts

    def backward(
        self, grad_y: Tensor, grad_last: Tensor | None, starts: Tensor, grad_u: Tensor,
        grad_delta: Tensor,
    ) -> tuple[Tensor, ...]:
        """Fill grad_u and the grad_delta of all channels; give those of A, B, C, D and bias."""
        grad_A = torch.empty(self.batch, *self.A.shape)
        rows = self.batch, self.groups, self.tokens, self.padded
        grad_B, grad_C = torch.empty(rows), torch.empty(rows)
        sums = self.batch, self.groups * self.group_dim
        grad_D, grad_bias = torch.empty(sums), torch.empty(sums)
        if grad_last is not None:
            grad_last = _pack_state(grad_last, self.groups, self.padded)
        self.view(grad_y=grad_y, grad_u=grad_u, grad_delta=grad_delta)
        self.point(starts=starts.contiguous(), grad_last=grad_last, grad_A=grad_A, grad_B=grad_B,
                   grad_C=grad_C, grad_D=grad_D, grad_bias=grad_bias)
        self.call('backward')
        grad_B, grad_C = (x[..., : self.state].transpose(-1, -2) for x in (grad_B, grad_C))
        return (
            _unpack_state(grad_A.sum(0), self.state), grad_B, grad_C, grad_D.sum(0),
            grad_bias.sum(0),
        )


def _rows(x: Tensor) -> _Rows:
    batch, group, token, _ = x.stride()
    return _Rows(x.data_ptr(), batch, group, token)


def _problem(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse) -> _Problem:
    u, delta = (x.unflatten(1, (B.shape[1], -1)) for x in (u, delta))
    return _Problem(u, delta, None, A, B, C, D, delta_bias, delta_softplus, reverse=reverse)


def _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    p = _problem(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    y = torch.empty(u.shape)
    last_state, starts = p.forward(y.unflatten(1, (p.groups, -1)), True)
    ungated = torch.empty(0)
    if z is not None:
        ungated, y = y, apply_gate(y, z)
    return y.to(u.dtype), last_state, starts, ungated


def _backward(
    grad_y, grad_last_state, starts, ungated,
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse,
):
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    p = _problem(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    grad_y = torch.zeros(u.shape) if grad_y is None else grad_y.float()
    grad_z = None
    if z is not None:
        grad_y, grad_z = gate_gradients(grad_y, ungated, z)
    grad_u, grad_delta = torch.empty(u.shape), torch.empty(u.shape)
    grouped = (x.unflatten(1, (p.groups, -1)) for x in (grad_u, grad_delta))
    grad_A, grad_B, grad_C, grad_D, grad_bias = p.backward(
        grad_y.unflatten(1, (p.groups, -1)), grad_last_state, starts, *grouped
    )
    grads = grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias
    return tuple(
        torch.empty(0) if x is None else grad.to(x.dtype).contiguous()
        for x, grad in zip(inputs, grads, strict=True)
    )


def _starts_shape(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    batch, channels, length = u.shape
    groups = B.shape[1]
    return -(-length // _TILE), batch, groups, _padded_state(A.shape[1]), channels // groups


selective_scan_cpp = make_operator(
    'selective_scan_cpp', _forward, _backward, _starts_shape, keys=('CPU',)
)


# In an order --------------------------------------------------------------------------------------

_INPUTS = (
    'Tensor u, Tensor delta, Tensor? weight, Tensor A, Tensor B, Tensor C, Tensor? D, '
    'Tensor? delta_bias, Tensor? order, bool softplus, bool reverse'
)


def _forward_ordered(
    u, delta, weight, A, B, C, D, delta_bias, order, softplus, reverse, merge, gradients
):
    fits = _library().mmhybrid_scan_order_fits
    if order is not None and not fits(order.data_ptr(), order.numel(), B.shape[3]):
        raise ValueError(
            f'selective_scan_ordered expects order with values from -1 to L - 1 = '
            f'{B.shape[3] - 1}, got {order.min().item()} to {order.max().item()}.'
        )
    p = _ordered_problem(u, delta, weight, A, B, C, D, delta_bias, order, softplus, reverse)
    shape = _y_shape(u, B, merge)
    y = _empty(shape, _token_major(shape))
    return y, *p.forward(y, gradients)


def _ordered_problem(
    u, delta, weight, A, B, C, D, delta_bias, order, softplus, reverse
) -> _Problem:
    delta = delta if weight is not None else _side_by_side(delta)
    return _Problem(_side_by_side(u), delta, weight, A, B, C, D, delta_bias, softplus,
                    order=order, reverse=reverse)


def _y_shape(u: Tensor, B: Tensor, merge: bool) -> tuple[int, ...]:
    return u.shape[0], 1 if merge else B.shape[1], *u.shape[2:]


def _backward_ordered(
    grad_y, grad_last, starts, u, delta, weight, A, B, C, D, delta_bias, order, softplus, reverse
):
    inputs = (u, delta, weight, A, B, C, D, delta_bias)
    p = _ordered_problem(*inputs, order, softplus, reverse)
    full = p.batch, p.groups, p.group_dim, p.tokens
    grad_y = torch.zeros(1).expand(full) if grad_y is None else _side_by_side(grad_y)
    grad_u, grad_delta = (_empty(shape, _token_major(shape)) for shape in (u.shape, full))
    sums = p.backward(grad_y, grad_last, starts, grad_u, grad_delta)
    grad_weight = None
    if weight is not None:
        grad_weight = torch.matmul(grad_delta, p.low).sum(0)
        grad_delta = torch.matmul(p.weight, grad_delta)
    return tuple(
        A.new_empty(0) if x is None else _laid_out(grad.to(x.dtype), strides)
        for x, grad, strides in zip(
            inputs, (grad_u, grad_delta, grad_weight, *sums), _gradient_strides(*inputs),
            strict=True,
        )
    )


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same with these strides, in memory of its own."""
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


def _gradient_strides(u, delta, weight, A, B, C, D, delta_bias) -> list[tuple[int, ...] | None]:
    """Of the gradients, None for those of absent tensors."""
    layouts = (_token_major, _token_major if weight is None else _state_major, None, None,
               _state_major, _state_major, None, None)
    return [
        None if x is None else layout(x.shape) if layout else _contiguous(x.shape)
        for x, layout in zip((u, delta, weight, A, B, C, D, delta_bias), layouts, strict=True)
    ]


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _fake_ordered(
    u, delta, weight, A, B, C, D, delta_bias, order, softplus, reverse, merge, gradients
):
    batch, groups = B.shape[:2]
    shape = _y_shape(u, B, merge)
    length = u.shape[3] if order is None else order.shape[1]
    tiles = -(-length // _TILE) if gradients else 0
    return (
        A.new_empty_strided(shape, _token_major(shape)),
        A.new_empty(batch, *A.shape),
        A.new_empty(tiles, batch, groups, _padded_state(A.shape[1]), u.shape[2]),
    )


def _fake_backward_ordered(
    grad_y, grad_last, starts, u, delta, weight, A, B, C, D, delta_bias, order, softplus, reverse
):
    inputs = (u, delta, weight, A, B, C, D, delta_bias)
    return tuple(
        A.new_empty(0) if x is None else x.new_empty_strided(x.shape, strides)
        for x, strides in zip(inputs, _gradient_strides(*inputs), strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *inputs[:9])
    ctx.mark_non_differentiable(output[2])
    ctx.flags = inputs[9:11]


def _differentiate(ctx, grad_y, grad_last, _):
    if grad_y is None and grad_last is None:
        return (None,) * 13
    starts, *inputs = ctx.saved_tensors
    grads = torch.ops.mmhybrid.selective_scan_cpp_ordered_backward(
        grad_y, grad_last, starts, *inputs, *ctx.flags
    )
    kept = (None if x is None else grad for x, grad in zip(inputs[:8], grads, strict=True))
    return (*kept, *(None,) * 5)


operators.register(
    'selective_scan_cpp_ordered',
    schema=f'({_INPUTS}, bool merge, bool gradients) -> (Tensor, Tensor, Tensor)',
    forward=torch.compiler.disable(_forward_ordered),
    fake=_fake_ordered,
    setup_context=_setup_context,
    differentiate=_differentiate,
    backward_schema=(
        f'(Tensor? grad_y, Tensor? grad_last_state, Tensor starts, {_INPUTS}) -> '
        f'({", ".join(["Tensor"] * 8)})'
    ),
    backward=torch.compiler.disable(_backward_ordered),
    backward_fake=_fake_backward_ordered,
    refusal=REFUSAL,
    keys=('CPU',),
)


def scan_ordered(
    u: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: Tensor | None,
    softplus: bool,
    merge: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The compiled scan of tensors whose channels lie side by side, in an order or as they lie.

    Gives y in float32 and the last state (B, D, N).

    Args:
        u: (B, G, H, L), or (B, 1, H, L) for one that all groups share.
        delta: (B, G, H, L), or with ``weight`` (B, G, R, L).
        weight: (G, H, R), expands delta, or None.
        order: int32 (G, L') or (1, L'), contiguous; None for the tokens as they lie.
        merge: whether y is the sum over groups, (B, 1, H, L).
        reverse: without an order: visit the tokens from right to left.

    The rest is as in :func:`mmhybrid.ops.selective_scan.ordered.selective_scan_ordered`, whose
    tensors these are once they are checked.
    """
    A, D, delta_bias = (x if x is None else x.float() for x in (A, D, delta_bias))
    tensors = (u, delta, weight, A, B, C, D, delta_bias, order)
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return torch.ops.mmhybrid.selective_scan_cpp_ordered(
        *tensors, softplus, reverse, merge, gradients)[:2]


# Channel attention over directions, in inference --------------------------------------------------


def normed_means(x: Tensor, eps: float) -> Tensor:
    """Mean over the tokens of what layer norm without weights makes of float32 (B, L, K, D).

    Returns:
        (B, K, D), without a gradient.
    """
    x = x.contiguous()
    batch, tokens, directions, channels = x.shape
    out = torch.empty(batch, directions, channels)
    _library().mmhybrid_normed_means(
        x.data_ptr(), *x.shape, eps, out.data_ptr(), torch.get_num_threads())
    return out


def scaled_sum(x: Tensor, scale: Tensor) -> Tensor:
    """Sum over K of float32 (B, L, K, D) times (B, K, D): (B, L, D), without a gradient."""
    x, scale = x.contiguous(), scale.contiguous()
    batch, tokens, _, channels = x.shape
    out = torch.empty(batch, tokens, channels)
    _library().mmhybrid_scaled_sum(
        x.data_ptr(), scale.data_ptr(), *x.shape, out.data_ptr(), torch.get_num_threads())
    return out
