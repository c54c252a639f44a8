"""What the kernels of the fused mixer become on a GPU, read from the machine code."""

import collections
import importlib
import itertools

import pytest
import torch
from machine_code import Recorder, build, compiler, count, specialisation
from torch.utils._python_dispatch import TorchDispatchMode

from mmhybrid.layers import MambaVisionMixer
from mmhybrid.ops.mambavision_mixer import fused, passes
from mmhybrid.ops.selective_scan.plan import launch_plan

KERNELS = ('prescan_kernel', 'prescan_backward_kernel')
SCAN_KERNELS = (
    'scan_forward_kernel', 'scan_carry_kernel', 'scan_backward_kernel',
    'scan_backward_aggregate_kernel', 'sum_gradients_kernel',
)


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
    with compiler('mmhybrid.ops.mambavision_mixer.triton_kernels', tmp_path_factory) as module:
        yield module


def launches(kernels, monkeypatch, batch, length, dim, dtype=torch.bfloat16, lean=False, taps=3):
    """The launches of one forward and backward pass: two lists of (kernel, arguments)."""
    calls = []
    of_scan = importlib.import_module('mmhybrid.ops.selective_scan.kernels')
    for module, names in ((kernels, KERNELS), (of_scan, SCAN_KERNELS)):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), calls))
    with torch.device('meta'):
        mixer = MambaVisionMixer(dim, conv_size=taps)
        x = torch.zeros(batch, length, dim, dtype=dtype)
    half = [w.detach().to(dtype) for w in (
        mixer.in_proj.weight, mixer.x_proj.weight, mixer.dt_proj.weight, mixer.out_proj.weight)]
    weights = (half[0], mixer.conv1d_x.weight.flatten(1), mixer.conv1d_z.weight.flatten(1), half[1],
               half[2], mixer.dt_proj.bias, mixer.A_log, mixer.D, half[3])
    weights = [w.detach() for w in weights]
    out, *kept = fused._forward(x, *weights, lean)
    forward = calls[:]
    fused._backward(out, x, *kept, *weights, lean)
    monkeypatch.undo()
    return forward, calls[len(forward):]


def names(calls):
    return [kernel.fn.__name__.removesuffix('_kernel') for kernel, _ in calls]


class Log(TorchDispatchMode):
    """Counts PyTorch's operations that are neither views nor allocations."""

    FREE = {'t', 'view', '_unsafe_view', 'as_strided', 'slice', 'split_with_sizes', 'transpose',
            'unsqueeze', 'squeeze', 'permute', 'select', 'detach', 'new_empty', 'empty',
            'empty_like', 'new_empty_strided'}

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        nothing = args and isinstance(args[0], torch.Tensor) and args[0].numel() == 0
        if name not in self.FREE and not nothing:
            self.seen[name] += 1
        return function(*args, **kwargs or {})


@pytest.mark.plain_empty
def test_nothing_is_copied_turned_or_concatenated(kernels, monkeypatch):
    logs = []
    for name in ('_forward', '_backward'):
        function = getattr(fused, name)

        def logged(*arguments, function=function):
            with Log() as log:
                result = function(*arguments)
            logs.append(log.seen)
            return result

        monkeypatch.setattr(fused, name, logged)
    launches(kernels, monkeypatch, 2, 3136, 640)
    forward, backward = logs
    assert forward == {'mm': 4}
    # Seven gradients and the step again; the sum over the shares of the taps.
    assert backward == {'mm': 8, 'addmm_': 1, 'sum': 1}


def test_launches(kernels, monkeypatch):
    """Beside the matrix products: one kernel before the scan, and the scan's own."""
    forward, backward = launches(kernels, monkeypatch, 2, 12544, 320)  # detection
    assert names(forward) == ['prescan', 'scan_forward', 'scan_carry', 'scan_forward']
    in_scan = ['scan_backward_aggregate', 'scan_carry', 'scan_backward', 'sum_gradients']
    assert names(backward) == ['prescan', *in_scan, 'prescan_backward']
    forward, backward = launches(kernels, monkeypatch, 128, 49, 640)  # classification
    assert names(forward) == ['prescan', 'scan_forward']
    assert names(backward) == ['prescan', *in_scan[2:], 'prescan_backward']
    # Chunk starts that were not kept are computed in two launches.
    forward, backward = launches(kernels, monkeypatch, 2, 1024, 640, lean=True)
    assert names(forward) == ['prescan', 'scan_forward', 'scan_carry', 'scan_forward']
    starts = ['scan_forward', 'scan_carry']
    assert names(backward) == ['prescan', *starts, *in_scan, 'prescan_backward']


QUICK = {(80, torch.float32, 320), (90, torch.bfloat16, 640), (100, torch.bfloat16, 320)}
ALL = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product((80, 90, 100), (torch.bfloat16, torch.float32), (320, 640))
]


@pytest.mark.parametrize(('capability', 'dtype', 'dim'), ALL)
def test_machine_code(capability, dtype, dim, kernels, monkeypatch, tmp_path):
    forward, backward = launches(kernels, monkeypatch, 2, 3136, dim, dtype)
    own = [call for call in forward + backward if call[0].fn.__name__ in KERNELS]
    assert names(own) == ['prescan', 'prescan', 'prescan_backward']
    for kernel, arguments in own:
        program = build(kernel, arguments, capability, tmp_path)
        assert program.stack == 0 and count(program.opcodes, 'LDL', 'STL') == 0, 'spills'
        assert count(program.opcodes, 'ATOM', 'ATOMG', 'RED', 'REDG') == 0
        assert program.registers <= {'prescan_kernel': 128}.get(kernel.fn.__name__, 255)
        elements = arguments['ROWS'] * arguments['BLOCK'] // (32 * arguments['num_warps'])
        halves = 1 + arguments.get('WITH_Z', True)
        taps = arguments['K']
        if kernel.fn.__name__ == 'prescan_kernel':
            (loop,) = program.loops
            assert loop['MUFU.EX2'] == halves * elements  # one sigmoid each
            assert count(loop, 'BAR', 'STS', 'LDS', 'SHFL') == 0
        else:
            (loop,) = program.loops
            assert loop['MUFU.EX2'] == halves * taps * elements
            assert count(loop, 'BAR', 'STS', 'LDS', 'SHFL') == 0  # sums over tokens come after


def test_neighbouring_channels_are_loaded_together(kernels, monkeypatch, tmp_path):
    forward, backward = launches(kernels, monkeypatch, 2, 3136, 640)
    # Eight bfloat16 are 16 bytes: a load per tap and half, a store per half, no other memory.
    (loop,) = build(*forward[0], 90, tmp_path).loops
    assert count(loop, 'LDG') == loop['LDG.E.128'] == 2 * 3
    assert count(loop, 'STG') == loop['STG.E.128'] == 2
    (loop,) = build(*backward[-1], 90, tmp_path).loops
    assert count(loop, 'LDG') == loop['LDG.E.128'] == 2 * (5 + 3)
    assert count(loop, 'STG') == loop['STG.E.128'] == 2


def test_no_recompilation_for_another_image_size(kernels, monkeypatch):
    found = set()
    for batch, length in ((1, 49), (2, 3136), (3, 97), (128, 49), (1, 12543), (8, 1)):
        forward, backward = launches(kernels, monkeypatch, batch, length, 320)
        for kernel, arguments in forward + backward:
            if kernel.fn.__name__ in KERNELS:
                found.add((kernel.fn.__name__, repr(specialisation(kernel, arguments))))
    assert sorted(name for name, _ in found) == [
        'prescan_backward_kernel', 'prescan_kernel', 'prescan_kernel']  # with and without z


def test_plan_keeps_few_states():
    for batch, length, dim in ((1, 196, 320), (2, 1024, 640), (2, 12544, 320), (1, 300, 1024)):
        weights = passes.Weights(*[None] * 9)._replace(
            A_log=torch.empty(dim // 2, 8, device='meta'), w_dt=torch.empty(dim // 2, 20))
        x = torch.empty(batch, length, dim, device='meta')
        shape = passes.shape_of(x, weights)
        assert shape.chunk >= passes._MIN_CHUNK
        if shape.n_kept:
            assert (shape.n_kept - 1) * shape.chunk < length <= shape.n_kept * shape.chunk
        again = launch_plan(
            batch, 1, dim // 2, length, 8, 132, gradients=True, chunk=shape.chunk
        )
        assert (again.n_chunks if again.n_chunks > 1 else 0) == shape.n_kept
