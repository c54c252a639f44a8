"""What the kernels of the convolution along walks become on a GPU, read from the machine code."""

import pytest
import torch
from machine_code import Recorder, build, compiler, count, specialisation

from mmhybrid.ops.walk_conv import conv

KERNELS = ('walk_conv_kernel', 'walk_conv_weights_kernel', 'walk_conv_input_kernel')


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
    with compiler('mmhybrid.ops.walk_conv.triton_kernels', tmp_path_factory) as module:
        yield module


def launches(kernels, monkeypatch, batch=2, walks=4, channels=384, tokens=1024, steps=1225,
             dtype=torch.bfloat16):
    """The launches of a forward and a backward pass in a LocalVim of 512 x 512 pixels."""
    calls = []
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), calls))
    with torch.device('meta'):
        # half of what the input projection makes, as in the mixers
        u = torch.zeros(batch, tokens, 2 * channels, dtype=dtype).mT[:, :channels]
        weight, bias = torch.zeros(walks, channels, 4), torch.zeros(walks, channels)
        slots = torch.zeros(walks, steps, dtype=torch.int32)
    out = conv._forward(u, weight, bias, slots, slots)
    conv._backward(out, u, weight, bias, slots, slots)
    monkeypatch.undo()
    return calls


@pytest.mark.parametrize('capability', [
    pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)])
def test_machine_code(capability, kernels, monkeypatch, tmp_path):
    calls = launches(kernels, monkeypatch)
    assert tuple(kernel.fn.__name__ for kernel, _ in calls) == KERNELS
    for kernel, arguments in calls:
        program = build(kernel, arguments, capability, tmp_path)
        name = kernel.fn.__name__
        assert program.stack == 0 and count(program.opcodes, 'LDL', 'STL') == 0, f'{name} spills'
        assert count(program.opcodes, 'ATOM', 'ATOMG', 'RED', 'REDG') == 0, name
        # Twelve warps for the kernel with the sums of all taps, sixteen for the others.
        ceiling = 168 if name == 'walk_conv_weights_kernel' else 128
        assert program.registers <= ceiling, f'{name}: {program.registers} registers'
        for loop in program.loops:  # sums over steps are made once, behind the loop
            assert count(loop, 'BAR', 'STS', 'LDS', 'SHFL') == 0, name
        # Eight neighbouring channels of bfloat16 travel together.
        assert program.opcodes['LDG.E.128'] >= arguments['T'], name
        assert program.opcodes['STG.E.128'] >= 1, name


def test_no_recompilation_for_another_image_size(kernels, monkeypatch):
    found = set()
    for batch, tokens, steps in ((1, 196, 196), (2, 1024, 1225), (3, 4097, 4097), (1, 1, 49)):
        for kernel, arguments in launches(kernels, monkeypatch, batch, tokens=tokens, steps=steps):
            found.add((kernel.fn.__name__, repr(specialisation(kernel, arguments))))
    assert len(found) == len(KERNELS), sorted(found)
