"""What the gate behind a scan and the turned sum become on a GPU, read from the machine code."""

import pytest
import torch
from machine_code import Recorder, build, compiler, count, specialisation

from mmhybrid.ops.rotation import fused as rotation
from mmhybrid.ops.selective_scan.launch import Place
from mmhybrid.ops.walk_scan.passes import Forward

GATE = ('gate_kernel', 'gate_backward_kernel')
ROTATION = ('rotated_sum_kernel', 'rotated_sum_backward_kernel')


@pytest.fixture(scope='module')
def gate(tmp_path_factory):
    with compiler('mmhybrid.ops.walk_scan.triton_kernels', tmp_path_factory) as module:
        yield module


@pytest.fixture(scope='module')
def turned(tmp_path_factory):
    with compiler('mmhybrid.ops.rotation.triton_kernels', tmp_path_factory) as module:
        yield module


def gate_launches(kernels, monkeypatch, batch=2, tokens=1024, channels=384):
    """Those of Vim's mixer in a training step."""
    calls = []
    for name in GATE:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), calls))
    with torch.device('meta'):
        uz = torch.zeros(batch, tokens, 2 * channels, dtype=torch.bfloat16)
        slots = torch.zeros(2, tokens, dtype=torch.int32)
        of_channels = torch.zeros(2 * channels)
        weights = (torch.zeros(2, channels, 4), None, None, torch.zeros(2, channels, 12),
                   of_channels, torch.zeros(2 * channels, 16), of_channels, slots, slots)
        y = torch.zeros(batch, tokens, 2, channels, dtype=torch.bfloat16)
    one = Forward((uz, *weights), 0.5, True)
    names = ('p_y', 'p_z', 'p_out'), ('p_y', 'p_z', 'p_dout', 'p_dy', 'p_dz')
    for name, pointers in zip(GATE, names, strict=True):
        places = {pointer: Place(i) for i, pointer in enumerate(pointers)}
        one.gate_program(name, places).run((y,) * len(pointers), (0,) * len(pointers))
    monkeypatch.undo()
    return calls


def turned_launches(kernels, monkeypatch, batch=2, tokens=1024, channels=192):
    """Those of a block of LocalVim in a training step."""
    calls = []
    for name in ROTATION:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), calls))
    with torch.device('meta'):
        stream, cos = torch.zeros(batch, tokens, channels), torch.zeros(tokens, channels)
        factor = torch.zeros(batch)
        hidden = stream.to(torch.bfloat16)
    y = rotation._forward(stream, hidden, factor, cos, cos)
    rotation._backward(y, factor, cos, cos, stream.dtype, hidden.dtype, True)
    monkeypatch.undo()
    return calls


def check(calls, names, capability, tmp_path, wide):
    programs = []
    assert tuple(kernel.fn.__name__ for kernel, _ in calls) == names
    for kernel, arguments in calls:
        program = build(kernel, arguments, capability, tmp_path)
        name = kernel.fn.__name__
        assert program.stack == 0 and count(program.opcodes, 'LDL', 'STL') == 0, f'{name} spills'
        assert count(program.opcodes, 'ATOM', 'ATOMG', 'RED', 'REDG') == 0, name
        programs.append(program)
        assert program.registers <= 80, f'{name}: {program.registers} registers'
        # Eight neighbouring channels of bfloat16, or four of float32, travel together.
        assert program.opcodes['LDG.E.128'] >= wide, name
        assert program.opcodes['STG.E.128'] >= 1, name
    return programs


CAPABILITIES = [pytest.param(80, marks=pytest.mark.slow), 90]


@pytest.mark.parametrize('capability', CAPABILITIES)
def test_gate(capability, gate, monkeypatch, tmp_path):
    for program in check(gate_launches(gate, monkeypatch), GATE, capability, tmp_path, 3):
        assert count(program.opcodes, 'BAR', 'STS', 'LDS', 'SHFL') == 0


@pytest.mark.parametrize('capability', CAPABILITIES)
def test_turned_sum(capability, turned, monkeypatch, tmp_path):
    launches = turned_launches(turned, monkeypatch)
    for program in check(launches, ROTATION, capability, tmp_path, 3):
        # Factors of samples change places once; the halves of a pair never leave their thread.
        assert count(program.opcodes, 'SHFL') == 0 and count(program.opcodes, 'STS') <= 2


def test_no_recompilation_for_another_image_size(gate, turned, monkeypatch):
    found = set()
    for batch, tokens in ((1, 196), (2, 1024), (3, 4097), (1, 1)):
        for of, kernels in ((gate_launches, gate), (turned_launches, turned)):
            for kernel, arguments in of(kernels, monkeypatch, batch, tokens):
                found.add((kernel.fn.__name__, repr(specialisation(kernel, arguments))))
    assert len(found) == 4, sorted(found)
