"""What the kernels around SS2D become on a GPU, read from the machine code."""

import pytest
import torch
from machine_code import Recorder, build, compiler, count, specialisation

from mmhybrid.ops.map_conv import conv
from mmhybrid.ops.merge_norm import attend, merge

CONVOLUTION = ('map_conv_kernel', 'map_conv_weights_kernel', 'map_conv_input_kernel')
MERGE = ('merge_norm_kernel', 'merge_norm_backward_kernel')
ATTENTION = ('token_sums_kernel', 'merge_norm_kernel', 'direction_gradients_kernel')
#: Name: folder of the kernels, and their names.
MODULES = {
    'map_conv': ('map_conv', CONVOLUTION), 'merge_norm': ('merge_norm', MERGE),
    'attend_norm': ('merge_norm', ATTENTION),
}


@pytest.fixture(scope='module', params=MODULES)
def recorded(request, tmp_path_factory):
    """Names, module of the kernels, and a function that gives their launches."""
    folder, names = MODULES[request.param]
    with compiler(f'mmhybrid.ops.{folder}.triton_kernels', tmp_path_factory) as module:
        yield names, module, globals()[f'run_{request.param}']


def run_map_conv(batch, channels, height, width, gate):
    """A forward and a backward pass on a map of a network."""
    shape = (batch, height, width)
    # half of what the input projection makes, as in a gated mixer
    u = torch.zeros(*shape, channels * (1 + gate), dtype=torch.bfloat16)[..., :channels]
    weight = torch.zeros(channels, 1, 3, 3)
    bias = torch.zeros(channels) if gate else None
    conv._backward(conv._forward(u, weight, bias), u, weight, bias)


def run_merge_norm(batch, channels, height, width, gate):
    """Likewise."""
    length, dtype = height * width, torch.float32 if gate else torch.bfloat16
    y = torch.zeros(batch, length, 4, channels, dtype=dtype).permute(0, 2, 3, 1)
    weight, bias = torch.zeros(channels), torch.zeros(channels)
    z = None
    if gate:
        z = torch.zeros(batch, length, 2 * channels, dtype=torch.bfloat16)[..., channels:]
    out, total, stats = merge._forward(y, weight, bias, z, 1e-5, torch.bfloat16)
    merge._backward(out, total, stats, weight, bias, z)


def run_attend_norm(batch, channels, height, width, gate):
    """The kernels of a merge under attention, in its float32."""
    length = height * width
    y = torch.zeros(batch, length, 4, channels).permute(0, 2, 3, 1)
    weight, bias, logit = torch.zeros(channels), torch.zeros(channels), y[..., 0]
    z = torch.zeros(batch, length, 2 * channels, dtype=torch.bfloat16)[..., channels:]
    attend._sums(y, None, None, 1e-5)
    _, total, _ = attend._merged(y, logit, weight, bias, z, 1e-5, torch.bfloat16)
    attend._sums(y, total, logit, 1e-5)
    attend._gradients(y, total, logit, logit, 1e-5)


def launches(recorded, monkeypatch, *arguments):
    names, module, run = recorded
    calls = []
    for name in names:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), calls))
    forget()
    with torch.device('meta'):
        run(*arguments)
    monkeypatch.undo()
    forget()
    return calls


def forget():
    for module in (conv, merge, attend):
        module.forget()


@pytest.mark.parametrize('gate', [False, True], ids=['current', 'gated'])
@pytest.mark.parametrize('capability', [pytest.param(80, marks=pytest.mark.slow), 90])
def test_machine_code(capability, gate, recorded, monkeypatch, tmp_path):
    calls = launches(recorded, monkeypatch, 2, 768 if gate else 96, 32, 32, gate)
    assert {kernel.fn.__name__ for kernel, _ in calls} == set(recorded[0])
    for kernel, arguments in calls:
        program = build(kernel, arguments, capability, tmp_path)
        name = kernel.fn.__name__
        assert program.stack == 0 and count(program.opcodes, 'LDL', 'STL') == 0, f'{name} spills'
        assert count(program.opcodes, 'ATOM', 'ATOMG', 'RED', 'REDG') == 0, name
        assert program.registers <= 168, f'{name}: {program.registers} registers'


def test_no_recompilation_for_another_image_size(recorded, monkeypatch):
    found = set()
    for batch, height, width in ((1, 14, 14), (2, 32, 32), (3, 17, 241), (1, 1, 1)):
        for kernel, arguments in launches(recorded, monkeypatch, batch, 96, height, width, False):
            found.add((kernel.fn.__name__, repr(specialisation(kernel, arguments))))
    # sums over tokens before and after the merge are two forms of one kernel
    assert len(found) == len(recorded[0]) + ('token_sums_kernel' in recorded[0]), sorted(found)
