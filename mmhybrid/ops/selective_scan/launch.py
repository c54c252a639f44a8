"""Launches of Triton kernels that are prepared once and repeated with new pointers.

An ordinary launch looks at every argument again: its type, its alignment, whether it is one or
divisible by sixteen. Where all of that is known to be as before, only pointers and the stream are
new, and a call of the launcher that Triton compiled is all that is left.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    'Launch', 'Place', 'Prepared', 'Program', 'describe', 'eager', 'fast_apply', 'intercepted',
    'prepared',
]

logger = logging.getLogger(__name__)

# Tensors of these classes are plain memory; others (fake, functional, distributed, ...) are not.
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_watching = threading.Lock()
#: Kinds of devices on which launchers are called at once.
DIRECT = {'cuda'}
#: Environment variable that leaves every launch to Triton when it is 0; read when a kind of call is
#: first met.
VARIABLE = 'MMHYBRID_DIRECT_LAUNCH'
#: The lowest Triton whose launchers are known; before it every launch is Triton's own.
DIRECT_TRITON = (3, 6)


def wanted() -> bool:
    """Whether launches may go past Triton's ordinary path.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    wish = os.environ.get(VARIABLE, '1')
    if wish not in ('0', '1'):
        raise ValueError(
            f'{VARIABLE}={wish}, and it may be 1 (launch kernels directly once they are known, as '
            "without it) or 0 (leave every launch to Triton's ordinary path); set one of them."
        )
    return wish == '1'


@functools.cache
def unknown_launchers() -> str | None:
    """Why the installed Triton's launchers are not called directly; None where they can be."""
    import triton

    if tuple(int(part) for part in triton.__version__.split('.')[:2]) >= DIRECT_TRITON:
        return None
    known = '.'.join(map(str, DIRECT_TRITON))
    return f'the installed Triton is {triton.__version__} and launchers are known from {known} on'


def eager() -> bool:
    """Whether operations run as they are called: nothing traces, transforms or intercepts them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def intercepted() -> bool:
    """Whether something transforms or intercepts operations."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def describe(tensors: Sequence[Tensor | None]) -> tuple[list[int | None], list] | None:
    """Addresses of tensors, and all else that a launch depends on; None for other than memory.

    Equal descriptions take the same program. An address counts by its alignment alone.
    """
    # Written for few calls of functions: this runs at every call of the scan.
    pointers, description = [], []
    for x in tensors:
        if x is None:
            pointers += (None,)
            description += (None,)
            continue
        if x.__class__ not in _PLAIN:
            return None
        try:
            pointer = x.data_ptr()
            # A view may negate what it shows.
            if x.is_neg():
                return None
            description += (
                (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, pointer & 15),
            )
        except RuntimeError:  # sparse, or a wrapper of C++
            return None
        pointers += (pointer,)
    if 0 in pointers and not _may_be_nowhere(tensors, pointers):
        return None
    return pointers, description


def _may_be_nowhere(tensors, pointers) -> bool:
    """Whether every tensor without an address is empty or has none on purpose."""
    return all(
        x.is_meta or x.numel() == 0
        for x, pointer in zip(tensors, pointers, strict=True)
        if pointer == 0
    )


_tuple = tuple.__new__


class Prepared(NamedTuple):
    """A call from eager code, described.

    Attributes:
        tensors: the inputs.
        key: all that a call depends on but the values.
        pointers: addresses of the inputs.
        call: what has been worked out for this key, None at first.
    """

    tensors: tuple[Tensor | None, ...]
    key: tuple
    pointers: list[int | None]
    call: Any


def prepared(
    known: dict[tuple, Any], tensors: tuple[Tensor | None, ...], *flags
) -> Prepared | None:
    """Describe a call; None where the registered operator must take it.

    That is where something compiles, exports, transforms or intercepts operations, and for tensors
    that are not plain memory.

    Args:
        known: calls by key.
        tensors: the inputs as the caller got them.
        flags: everything else that decides what is computed and who computes it.
    """
    if not eager():
        return None
    found = describe(tensors)
    if found is None:
        return None
    pointers, description = found
    key = (flags, torch.is_grad_enabled(), *description)
    # Past the function that names the fields: this, too, runs at every call.
    return _tuple(Prepared, (tensors, key, pointers, known.get(key)))


def fast_apply(function: type[torch.autograd.Function]) -> Callable:
    """Its ``apply`` past the look for transforms, for callers who have asked :func:`eager`."""
    try:
        return super(torch.autograd.Function, function).apply
    except AttributeError:
        return function.apply


class Place(NamedTuple):
    """A pointer argument: memory in one of a program's tensors.

    Attributes:
        tensor: index of the tensor.
        offset: in bytes; other than 0 in flat float32 tensors only.
        dtype: of what lies there, None for the tensor's own.
    """

    tensor: int
    offset: int = 0
    dtype: torch.dtype | None = None

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The memory as a tensor."""
        x = tensors[self.tensor]
        if self.dtype is None:
            return x
        return x[self.offset // 4 :].view(self.dtype)


class Launch(NamedTuple):
    """One kernel with its arguments.

    Attributes:
        name: of the kernel in its module.
        grid: one to three numbers of programs.
        places: pointer arguments by name, None for absent ones.
        constants: all other arguments and the options of the launch.
    """

    name: str
    grid: tuple[int, ...]
    places: dict[str, Place | None]
    constants: dict[str, Any]

    def arguments(self, tensors: Sequence[Tensor | None]) -> dict[str, Any]:
        """All arguments of an ordinary launch on these tensors, by name."""
        pointers = {
            name: None if place is None else place.of(tensors)
            for name, place in self.places.items()
        }
        return pointers | self.constants


class _Bound(NamedTuple):
    """A compiled launcher with all that it takes; pointers and the stream are filled in."""

    launch: Callable
    kernel: Any
    arguments: list
    fills: tuple[tuple[int, int, int], ...]  # position, tensor, offset


class Program:
    """Launches that follow one another, for tensors of one description.

    The first run launches as Triton does, which compiles. The second notes what Triton hands to its
    launchers. From then on they are called at once, except while somebody listens to launches,
    where Triton works differently than expected, and where MMHYBRID_DIRECT_LAUNCH is 0.
    """

    def __init__(self, module, launches: Sequence[Launch]):
        self.module = module
        self.launches = launches
        self.compiled: list | None = None
        self.bound: list[_Bound] = []
        self.knobs: tuple = ()
        self.hooks: tuple = ()
        self.settings: tuple | None = None
        self.device = 0
        self.ordinary = not wanted() or unknown_launchers() is not None  # for good

    def run(self, tensors: Sequence[Tensor | None], pointers: Sequence[int | None]) -> None:
        """Launch on tensors, whose addresses are ``pointers``."""
        if self.bound and self._direct(pointers):
            return
        some = next(x for x in tensors if x is not None)
        with torch.cuda.device_of(some):
            kernels = [getattr(self.module, launch.name) for launch in self.launches]
            calls = [launch.arguments(tensors) for launch in self.launches]
            direct = not self.ordinary and some.device.type in DIRECT
            if self.compiled is not None and not self.bound and direct:
                self._bind(kernels, calls)
                return
            launched = [
                kernel[launch.grid](**arguments)
                for launch, kernel, arguments in zip(self.launches, kernels, calls, strict=True)
            ]
            if not self.bound:  # bound launchers need the kernels that they were bound with
                self.compiled = launched

    def _direct(self, pointers) -> bool:
        runtime, compilation = self.knobs
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if (
            enter is not self.hooks[0]
            or leave is not self.hooks[1]
            or (enter is not None and enter.calls)
            or (leave is not None and leave.calls)
            or self.settings != (runtime.debug, compilation.instrumentation_mode)
        ):
            return False
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self._direct(pointers)
        for bound in self.bound:
            if bound.kernel.pre_run_hooks:
                return False
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        for launch, _, template, fills in self.bound:
            arguments = [*template]
            arguments[3] = stream
            for position, tensor, offset in fills:
                arguments[position] = pointers[tensor] + offset
            launch(*arguments)
        return True

    def _bind(self, kernels, calls) -> None:
        """Launch as Triton does, and keep what reaches its launchers."""
        try:
            from triton.knobs import compilation, runtime
        except ImportError:
            runtime = compilation = None
        settings, found, now = _settings(runtime, compilation), [], []
        before = self.compiled
        for launch, kernel, arguments, compiled in zip(
            self.launches, kernels, calls, before, strict=True
        ):
            launched, seen = _launch_and_watch(kernel, launch.grid, arguments, compiled)
            now.append(launched)
            if settings is not None:
                found.append(_as_bound(launch, kernel, arguments, compiled, seen, runtime))
        if settings is None or any(kernel.pre_run_hooks for kernel in kernels):
            return
        if any(new is not old for new, old in zip(now, before, strict=True)):
            self.compiled = now  # compiled again, for other settings; the next run sees more
            return
        if None in found:
            self.ordinary = True
            _say_that_launches_stay_ordinary()
            return
        self.device = torch._C._cuda_getDevice()
        self.knobs = runtime, compilation
        self.hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
        self.settings, self.bound = settings, found


def _launch_and_watch(kernel, grid, arguments, compiled) -> tuple[Any, list[tuple]]:
    """Launch; the kernel that ran, and what the launcher of ``compiled`` was called with."""
    runner = getattr(compiled, 'run', None)
    if not hasattr(runner, 'launch'):
        return kernel[grid](**arguments), []
    seen, here = [], threading.get_ident()
    with _watching:
        launch = runner.launch  # not before: it could be another thread's `watch`

        def watch(*values):
            if threading.get_ident() == here:
                seen.append((launch, values))
            return launch(*values)

        runner.launch = watch
        try:
            launched = kernel[grid](**arguments)
        finally:
            runner.launch = launch
    return launched, seen


def _as_bound(launch: Launch, kernel, arguments, compiled, seen, runtime) -> _Bound | None:
    """The noted call, once every part of it has been recognised."""
    if len(seen) != 1:
        return None
    ((launcher, values),) = seen
    names = kernel.arg_names
    head, tail = values[: -len(names)], values[-len(names) :]
    expected = (
        *launch.grid, *(1,) * (3 - len(launch.grid)),
        torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice()), compiled.function,
    )
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    # The grid, the stream, the function, two flags, two buffers of which the kernels need none,
    # the launch's metadata for the compiled code and for hooks, and the hooks.
    recognised = (
        len(head) == 13
        and head[:5] == expected
        and head[7:10] == (None, None, compiled.packed_metadata)
        and head[11] is hooks[0]
        and head[12] is hooks[1]
        and all(
            value is arguments[name]
            or (not isinstance(value, Tensor) and value == arguments[name])
            for name, value in zip(names, tail, strict=True)
        )
    )
    if not recognised:
        return None
    fills = tuple(
        (len(head) + names.index(name), place.tensor, place.offset)
        for name, place in launch.places.items()
        if place is not None
    )
    # Tensors stay out: a record outlives the call, and would keep their memory.
    tail = [None if isinstance(value, Tensor) else value for value in tail]
    return _Bound(launcher, kernel, [*head[:10], None, None, None, *tail], fills)


def _settings(runtime, compilation) -> tuple | None:
    """What changes how Triton launches; None while somebody listens, or where it is unknown."""
    try:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if (enter is not None and enter.calls) or (leave is not None and leave.calls):
            return None
        return runtime.debug, compilation.instrumentation_mode
    except AttributeError:
        return None


@functools.cache
def _say_that_launches_stay_ordinary() -> None:
    logger.warning(
        'the installed Triton launches kernels in another way than 3.6 does; every launch takes '
        "Triton's ordinary path, which is right and costs several times the host time"
    )
