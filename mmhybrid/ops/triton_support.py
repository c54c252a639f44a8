"""Where the Triton kernels of this package can run: the one gate that all of them pass.

Importing this file needs no Triton.
"""

import functools
import importlib.util
import os

import torch

__all__ = [
    'MINIMUM_TRITON', 'first_line', 'interpreting', 'not_default_reason', 'reason',
    'unavailable_reason', 'unsupported_reason',
]

#: The lowest Triton that has passed cases of all families of kernels and compiled them
#: (tools/benchmark/results/triton_versions.csv), as they are written. 3.0 has done so, too, with
#: kernels that ``unrolled.py`` wrote out; the whole test suite has not run with it.
MINIMUM_TRITON = (3, 3)
#: The lowest compute capability of an NVIDIA GPU for which all kernels have been compiled.
MINIMUM_CAPABILITY = (7, 0)


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, so that the kernels run on CPU tensors."""
    return os.environ.get('TRITON_INTERPRET', '0') == '1'


@torch.compiler.assume_constant_result  # the compiler asks once while it traces
def unavailable_reason() -> str | None:
    """Why this machine cannot run the Triton kernels, with the remedy; None when it can."""
    return _unavailable_reason()


@functools.cache
def _unavailable_reason() -> str | None:
    wanted = '.'.join(map(str, MINIMUM_TRITON))
    if importlib.util.find_spec('triton') is None:
        return f"Triton is not installed; install triton >= {wanted}, or use backend='torch'"
    try:
        import triton
    except Exception as error:  # a broken installation, of which pip knows nothing
        return (
            f'Triton is installed and cannot be imported ({first_line(error)}); install '
            f"triton >= {wanted} again, or use backend='torch'"
        )
    found = tuple(int(part) for part in triton.__version__.split('.')[:2])
    if found < MINIMUM_TRITON:
        return (
            f'the installed Triton is {triton.__version__} and the scan kernels are proven from '
            f"{wanted} on; upgrade PyTorch (with its Triton), or use backend='torch'"
        )
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU; use backend='torch'"
    try:
        # Triton compiles a small C module of its own before anything else.
        triton.runtime.driver.active  # noqa: B018
    except Exception as error:
        return (
            f'Triton cannot start on this machine ({first_line(error)}); it needs a C compiler, '
            "Python's headers, the driver's libcuda.so.1 and a writable cache (on Ubuntu: apt "
            'install gcc python3-dev; TRITON_CACHE_DIR names another cache), or use '
            "backend='torch'"
        )
    return None


def not_default_reason() -> str | None:
    """Why the kernels are used only by those who ask for them, on a machine that could run them."""
    if torch.version.hip:
        return (
            'the kernels compile for AMD GPUs but have never run on one; try them with '
            "backend='triton'"
        )
    return None


def first_line(error: Exception) -> str:
    """Kind and first line of an error, for a sentence."""
    lines = str(error).strip().splitlines() or ['no message']
    return f'{type(error).__name__}: {lines[0]}'


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take a call with this device and this dtype of the state."""
    if device.type == 'cpu' and not interpreting():
        return "Triton kernels run on a GPU and the tensors are on the CPU; use backend='torch'"
    if dtype != torch.float32:
        return "the Triton kernels compute in float32; use backend='torch' for float64"
    if device.type == 'cuda':
        return _too_old(device.index)
    return None


def reason(device: torch.device) -> str | None:
    """Why kernels in float32 cannot run on this machine and device; None when they can."""
    return unavailable_reason() or unsupported_reason(device, torch.float32)


@torch.compiler.assume_constant_result
def _too_old(index: int | None) -> str | None:
    return _too_old_once(torch.cuda.current_device() if index is None else index)


@functools.cache
def _too_old_once(index: int) -> str | None:
    found = torch.cuda.get_device_capability(index)
    if found >= MINIMUM_CAPABILITY:
        return None
    return (
        f'{torch.cuda.get_device_name(index)} has compute capability {found[0]}.{found[1]} and the '
        f"kernels compile from {'.'.join(map(str, MINIMUM_CAPABILITY))} on; use backend='torch'"
    )
