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
from .operator import apply_gate, gate_gradients, make_operator

__all__ = ['distrusts_cache', 'selective_scan_cpp', 'unavailable_reason', 'unsupported_reason']

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
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
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


def _compile(compiler: list[str], folder: Path, stem: str) -> Path:
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
            status, said = _run([*compiler, *_FLAGS, *options, str(_SOURCE), *libraries,
                                 '-o', str(output)])  # fmt: skip
            if status == 0:
                break
        else:
            if os.strerror(errno.ENOSPC) in said:
                raise BuildError(f'a disk is full ({said}); make room, or name another folder '
                                 f'than {folder} with the environment variable {CACHE_VARIABLE}')
            raise BuildError(
                f'{shlex.join(compiler)} could not compile {_SOURCE.name} ({said}); try another '
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


def build() -> Path:
    """Path of the compiled library for this source, compiler and processor; built if need be.

    Raises:
        BuildError: with the reason and the remedy.
    """
    if os.name != 'posix':
        raise BuildError('it is only built on Linux and macOS')
    compiler = _compiler()
    identity = hashlib.sha256(_SOURCE.read_bytes())
    parts = (*compiler, os.path.getmtime(compiler[0]), _processor(), *_attempts())
    for part in parts:
        identity.update(str(part).encode())
    stem = f'scan-{identity.hexdigest()[:20]}'
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
                found = _find(folder, stem) or _compile(compiler, folder, stem)
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
        (name, ctypes.c_int64) for name in ('batch', 'channel', 'token')
    ]


class _Arguments(ctypes.Structure):
    """Mirror of Arguments in scan.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ('batch', 'groups', 'group_dim', 'length',
                                             'padded_state', 'softplus', 'threads')]
        + [(name, _View) for name in ('u', 'delta', 'y')]
        + [(name, ctypes.c_void_p) for name in ('A', 'B', 'C', 'D', 'bias', 'starts')]
        + [(name, _View) for name in ('grad_y', 'grad_u', 'grad_delta')]
        + [(name, ctypes.c_void_p) for name in ('grad_last', 'grad_A', 'grad_B', 'grad_C',
                                                'grad_D', 'grad_bias')]
    )  # fmt: skip


class _Unsafe(str):
    """Why there is no kernel, where the reason is one that a user must hear of."""


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded kernel, or why there is none."""
    try:
        library = _load(build())
        for function in ('forward', 'backward'):
            function = getattr(library, f'mmhybrid_scan_{function}')
            function.argtypes, function.restype = [ctypes.POINTER(_Arguments)], None
        library.mmhybrid_scan_arguments.restype = ctypes.c_int64
    except (BuildError, OSError, AttributeError) as error:
        kind = _Unsafe if isinstance(error, UnsafeCache) else str
        return kind(f'the compiled scan kernel is not available: {error}')
    assert library.mmhybrid_scan_arguments() == ctypes.sizeof(_Arguments)
    return library


def _load(path: Path) -> ctypes.CDLL:
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
            group_dim=channels // self.groups,
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
    chunk_states = torch.empty(_chunk_states_shape(u, A, B))
    y = torch.empty(u.shape)
    p.view(y=y)
    p.point(starts=chunk_states)
    p.call('forward')
    last_state = _unpack_state(chunk_states[-1], p.state)
    ungated = torch.empty(0)
    if z is not None:
        ungated, y = y, apply_gate(y, z)
    return y.to(u.dtype), last_state, chunk_states, ungated


def _backward(
    grad_y, grad_last_state, chunk_states, ungated,
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
    p.point(starts=chunk_states.contiguous(), grad_last=grad_last, grad_A=grad_A, grad_B=grad_B,
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


def _chunk_states_shape(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    batch, channels, length = u.shape
    groups = B.shape[1]
    tiles = -(-length // _TILE)
    return tiles + 1, batch, groups, _padded_state(A.shape[1]), channels // groups


selective_scan_cpp = make_operator(
    'selective_scan_cpp', _forward, _backward, _chunk_states_shape, keys=('CPU',)
)
