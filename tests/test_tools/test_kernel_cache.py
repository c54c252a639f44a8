"""Kernels compiled without a GPU are found where they are moved, with what launches them."""

import importlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest import mock

import pytest

from mmhybrid.ops import triton_support

triton = pytest.importorskip('triton', reason='the kernels need Triton')
if triton_support.interpreting():
    pytest.skip('interpreted kernels are not compiled', allow_module_level=True)
if not hasattr(triton, 'knobs'):
    pytest.skip('this Triton is older than the kernels', allow_module_level=True)

FOLDER = Path(__file__).resolve().parents[2] / 'tools' / 'benchmark'
KERNEL = """
import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < n), mask=i < n)
"""


@pytest.fixture
def cache(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module('kernel_cache')


def launched(cache, source, folder, monkeypatch):
    """Launch the kernel under the driver that takes notes; names of the files in the cache."""
    import torch

    host = importlib.import_module('host')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(folder))
    namespace = importlib.util.spec_from_file_location('moved_kernel', source)
    module = importlib.util.module_from_spec(namespace)
    namespace.loader.exec_module(module)
    stub, x = host.Stub(build_launchers=True), torch.ones(32)
    with cache.launchers_built(), stub.installed():
        module.copy_kernel[(1,)](x, torch.empty(32), 32, BLOCK=32)
    assert stub.launches == stub.binaries == 1
    return sorted(path.name.split('.')[0] + path.suffix for path in folder.rglob('*.*'))


def test_a_moved_cache_is_used(cache, tmp_path, monkeypatch):
    source = tmp_path / 'moved_kernel.py'
    source.write_text(KERNEL)
    first, then, archive = tmp_path / 'first', tmp_path / 'then', tmp_path / 'kernels.tar.gz'
    names = launched(cache, source, first, monkeypatch)
    kept = ['__grp__copy_kernel.json', '__triton_launcher.so', 'copy_kernel.cubin',
            'copy_kernel.json', 'cuda_utils.so']
    assert set(kept) < set(names) and 'copy_kernel.ptx' in names
    assert cache.pack(first, archive) == 3
    first.rename(tmp_path / 'away')
    assert cache.unpack(archive, then) == 3
    before = {path: path.stat().st_mtime_ns for path in then.rglob('*') if path.is_file()}
    from triton.runtime import build

    with mock.patch.object(build, '_build', side_effect=AssertionError('built again')):
        assert launched(cache, source, then, monkeypatch) == kept
    assert cache.unpack(archive, then) == 3  # what is there stays
    assert before == {path: path.stat().st_mtime_ns for path in then.rglob('*') if path.is_file()}


@pytest.mark.parametrize('name', ['../evil.json', 'entry/../../evil.json', 'entry/kernel.py',
                                  '/entry/kernel.json', 'entry'])
def test_other_archives_are_refused(cache, tmp_path, name):
    archive = tmp_path / 'kernels.tar.gz'
    with tarfile.open(archive, 'w:gz') as tar:
        member = tarfile.TarInfo(name)
        member.size = 2
        tar.addfile(member, io.BytesIO(b'{}'))
    with pytest.raises(ValueError, match='which is not a file of a cache of kernels'):
        cache.unpack(archive, tmp_path / 'cache')
    assert not list(tmp_path.rglob('*evil*'))


def test_layers_give_shapes_and_gradients_alone(cache):
    import torch
    import torch.nn.functional as F

    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    last = weight.detach().contiguous(memory_format=torch.channels_last)
    with cache.only_shapes():
        y = F.conv2d(x, weight, None, 2, padding=1)
        y.sum().backward()
        assert F.conv2d(x, last, padding=1).is_contiguous(memory_format=torch.channels_last)
        with torch.autocast('cpu', torch.float16):
            assert F.linear(x, torch.ones(5, 8)).dtype == torch.float16
    assert y.shape == (2, 4, 5, 4) and x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape


@pytest.mark.slow
def test_a_scan_is_filled_in(tmp_path):
    archive = tmp_path / 'kernels.tar.gz'
    done = subprocess.run(
        [sys.executable, FOLDER / 'kernel_cache.py', 'fill', archive, '--only',
         'scan segmentation MambaVision-T s4 torch.bfloat16'], capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'entries' in done.stdout and archive.stat().st_size > 10000
