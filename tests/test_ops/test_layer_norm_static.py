"""What the kernels of sum and norm become on a GPU, read from the machine code."""

import pytest
import torch
from machine_code import Recorder, build, compiler, count, specialisation

from mmhybrid.ops.layer_norm import fused

KERNELS = ('add_norm_kernel', 'add_norm_backward_kernel')
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
    with compiler('mmhybrid.ops.layer_norm.triton_kernels', tmp_path_factory) as module:
        yield module


def launches(kernels, monkeypatch, size, x=BF16, branch=BF16, scale=False, factor=False, rms=False,
             first=False):
    """The launches of a forward and a backward pass; ``first`` for maps in NCHW."""
    calls = []
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), calls))
    with torch.device('meta'):
        def tokens(dtype):
            if not first:
                return torch.zeros(size, dtype=dtype)
            return torch.zeros(size[0], size[-1], *size[1:-1], dtype=dtype).movedim(1, -1)

        tensors = (
            tokens(x), None if branch is None else tokens(branch),
            torch.zeros(size[-1]) if scale else None, torch.zeros(size[0]) if factor else None,
            torch.zeros(size[-1]), None if rms else torch.zeros(size[-1]),
        )
    flags = 1e-5, BF16, rms, first
    total, out, stats = fused.Forward(tensors, *flags, True).run(tensors, (None,) * 6)
    needs = True, branch is not None, scale, True, not rms
    given = (
        out, None if branch is None else total, tensors[0] if branch is None else total, stats,
        tensors[1] if scale else None, *tensors[2:5],
    )
    fused.Backward(given, needs, (x, branch), rms, not rms).run(given, (None,) * 8)
    monkeypatch.undo()
    return calls


CASES = {
    'sum, MambaVision-T': dict(size=(2, 12544, 320)),
    'all, MambaVision-L': dict(size=(2, 196, 1568), x=FP32, scale=True, factor=True),
    'sum, VMamba-T in NCHW, last stage': dict(size=(2, 16, 16, 768), first=True),
    # the others with -m slow
    'norm, MambaVision-T': dict(size=(2, 196, 320), branch=None),
    'sum, wide': dict(size=(8, 49, 2048), x=FP32),
    'sum, VMamba-T': dict(size=(2, 128, 128, 96), factor=True),
    'sum, VMamba-T in NCHW': dict(size=(2, 128, 128, 96), factor=True, first=True),
    'RMS norm, Vim': dict(size=(1, 1024, 192), x=FP32, factor=True, rms=True),
}


@pytest.mark.parametrize('capability', [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize('case', [
    case if i < 3 else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(CASES)])
def test_machine_code(case, capability, kernels, monkeypatch, tmp_path):
    calls = launches(kernels, monkeypatch, **CASES[case])
    assert tuple(kernel.fn.__name__ for kernel, _ in calls) == KERNELS
    for (kernel, arguments), ceiling in zip(calls, (72, 168), strict=True):
        program = build(kernel, arguments, capability, tmp_path)
        name = kernel.fn.__name__
        assert program.stack == 0 and count(program.opcodes, 'LDL', 'STL') == 0, f'{name} spills'
        assert count(program.opcodes, 'ATOM', 'ATOMG', 'RED', 'REDG') == 0, name
        assert program.registers <= ceiling, f'{name}: {program.registers} registers'
        # Neighbours travel together: eight numbers of 16 bits, four of 32.
        assert program.opcodes['LDG.E.128'] and program.opcodes['STG.E.128'], name
        assert not any('16' in op for op in program.opcodes if op[:3] in ('LDG', 'STG')), name


def test_no_recompilation_for_another_image_size(kernels, monkeypatch):
    found = set()
    for size in ((1, 196, 192), (2, 1024, 192), (3, 4097, 192), (1, 49, 192), (64, 49, 192)):
        for kernel, arguments in launches(kernels, monkeypatch, size):
            found.add((kernel.fn.__name__, repr(specialisation(kernel, arguments))))
    assert len(found) == len(KERNELS), sorted(found)
