"""The Triton scan without a GPU: its kernels run in Triton's interpreter, in a fresh process.

The cases themselves are in triton_cases.py.
"""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreter import run_cases

from mmhybrid.ops import mambavision_mixer, triton_support
from mmhybrid.ops.selective_scan import available_backends, choose_backend

CASES = Path(__file__).parent / 'triton_cases.py'


def test_values_gradients_and_operators():
    assert run_cases(CASES, '-m', 'not slow') >= 50


@pytest.mark.slow
def test_full_product():
    assert run_cases(CASES, '-m', 'slow') >= 1000


def test_cases_draw_their_numbers_on_the_device():
    """A generator of the CPU makes nothing on a GPU, which a machine without one does not say."""
    found = [path.name for path in CASES.parent.glob('*_cases.py')
             if 'torch.Generator' in path.read_text()]
    assert not found, f"{found}: take interpreter.py's generator()"


def test_auto_says_why_it_falls_back():
    status = available_backends()['triton']
    if status.usable:
        pytest.skip('this machine can run the Triton kernels')
    assert status.reason
    assert choose_backend('auto', 'cuda') == 'torch'
    with pytest.raises(RuntimeError, match='Triton|GPU'):
        choose_backend('triton', 'cuda')


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have a GPU on which Triton starts."""
    triton = pytest.importorskip('triton')
    if tuple(int(x) for x in triton.__version__.split('.')[:2]) < triton_support.MINIMUM_TRITON:
        pytest.skip('this Triton is too old for the scan')
    from triton.backends.nvidia import driver

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: 'a GPU')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))
    monkeypatch.setattr(driver.CudaUtils, '__init__', lambda self: None)
    monkeypatch.setattr(triton.runtime.driver, '_default', None)
    monkeypatch.setattr(triton.runtime.driver, '_active', None)
    cached = triton_support._unavailable_reason, triton_support._too_old_once
    for function in cached:
        function.cache_clear()
    # the driver asks a GPU for a few functions of its own; only its start is of interest
    monkeypatch.setattr(driver.GPUDriver, '__init__', lambda self: None)
    yield monkeypatch
    for function in cached:
        function.cache_clear()


def test_auto_takes_a_gpu(gpu):
    assert choose_backend('auto', 'cuda') == choose_backend('triton', 'cuda:1') == 'triton'
    assert mambavision_mixer.unsupported_reason(torch.device('cuda', 0), torch.float16, 8) is None


def test_an_override_goes_around_every_kernel(gpu):
    from mmhybrid.layers import MambaVisionMixer
    from mmhybrid.ops.selective_scan.ordered import reads_tables

    x = SimpleNamespace(device=torch.device('cuda', 0), dtype=torch.float32, is_meta=False,
                        numel=lambda: 32)
    assert MambaVisionMixer(8).path(x) == 'fused'
    assert MambaVisionMixer(8, lean=True).path(x) == 'fused'
    assert MambaVisionMixer(8, fused=False).path(x) == 'plain'
    assert MambaVisionMixer(8, backend='torch').path(x) == 'plain'
    assert MambaVisionMixer(8, state_dim=17).path(x) == 'plain'
    assert reads_tables(choose_backend('auto', x.device))
    gpu.setenv('MMHYBRID_SCAN_BACKEND', 'torch')
    assert MambaVisionMixer(8).path(x) == 'plain'
    assert MambaVisionMixer(8, backend='triton').path(x) == 'fused'
    assert not reads_tables(choose_backend('auto', x.device))


@pytest.mark.parametrize('error', [
    RuntimeError('Failed to find C compiler. Please specify via CC environment variable.\nmore'),
    subprocess.CalledProcessError(1, ['gcc', 'main.c']),
    AssertionError('libcuda.so cannot found!'),
    PermissionError(13, 'Permission denied'),
], ids=lambda error: type(error).__name__)
def test_a_triton_that_cannot_start_is_passed_over(gpu, error, caplog):
    from triton.backends.nvidia import driver

    def start(self):
        raise error

    gpu.setattr(driver.CudaUtils, '__init__', start)
    with caplog.at_level('WARNING'):
        assert choose_backend('auto', 'cuda') == 'torch'
    assert 'gcc python3-dev' in caplog.text and 'more' not in caplog.text
    with pytest.raises(RuntimeError, match='Triton cannot start on this machine'):
        choose_backend('triton', 'cuda')


def test_old_and_foreign_gpus(gpu):
    gpu.setattr(torch.cuda, 'get_device_capability', lambda index: (6, 1) if index else (7, 5))
    assert choose_backend('auto', 'cuda:0') == 'triton'
    assert choose_backend('auto', 'cuda:1') == 'torch'
    with pytest.raises(RuntimeError, match=r'a GPU has compute capability 6\.1'):
        choose_backend('triton', 'cuda:1')
    assert '6.1' in mambavision_mixer.unsupported_reason(torch.device('cuda', 1), torch.float32, 8)
    gpu.setattr(torch.version, 'hip', '6.4')
    assert triton_support.not_default_reason() and 'AMD' in triton_support.not_default_reason()
    assert choose_backend('auto', 'cuda:0') == 'torch'
    assert choose_backend('triton', 'cuda:0') == 'triton'


def test_the_compiler_sees_through_the_choice(monkeypatch):
    monkeypatch.setattr(triton_support, '_too_old_once', lambda index: 'too old' if index else None)

    def f(x):
        return x + sum(
            triton_support.unsupported_reason(torch.device('cuda', index), torch.float32) is None
            for index in (0, 1)
        )

    assert torch.compile(f, fullgraph=True, backend='eager')(torch.zeros(2)).tolist() == [1, 1]
