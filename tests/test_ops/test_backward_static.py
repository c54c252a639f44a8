"""What the backward sweeps of the Triton scan become on a GPU, read from the machine code.

Launchers run on meta tensors with recorders in place of the kernels; see machine_code.py.
"""

import pytest
import torch
from machine_code import Recorder, build, compiler, count, use_distances

from mmhybrid.ops.selective_scan import passes

KERNELS = ('scan_backward_aggregate_kernel', 'scan_carry_kernel', 'scan_backward_kernel',
           'sum_gradients_kernel')
# As the models call it: MambaVision, Vim, VMamba.
MAMBAVISION = dict(batch=2, group_dim=160, length=12544, state=8, softplus=True, bias=True)
VIM = dict(batch=1, group_dim=768, length=6085, state=16, softplus=True, bias=True, gate=True)
VMAMBA = dict(batch=2, groups=4, group_dim=96, length=16384, state=1, softplus=True, bias=True,
              order=True)


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
    with compiler('mmhybrid.ops.selective_scan.kernels', tmp_path_factory) as module:
        yield module


def launches(
    kernels, monkeypatch, *, batch, group_dim, length, state, block=32, groups=1,
    dtype=torch.bfloat16, token_major=True, gate=False, bias=False, softplus=False, order=False,
    reverse=False, last=False,
):
    """The launches of a backward pass of programs of ``block`` channels: (kernel, arguments)."""
    calls = []
    own_choice = passes.plans.launch_plan

    def plan(*sizes, **options):
        found = own_choice(*sizes, **options)
        return found._replace(backward=found.backward._replace(block=block))

    passes.forget()
    monkeypatch.setattr(passes.plans, 'launch_plan', plan)
    monkeypatch.setattr(passes, '_COPY_ABOVE', 1 << 62)  # strides as they come
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), calls))

    def tokens(channels):
        if not token_major:
            return torch.zeros(batch, groups, channels, length, dtype=dtype, device='meta')
        x = torch.zeros(batch, length, groups, channels, dtype=dtype, device='meta')
        return x.movedim(1, -1)

    def parameter(*shape):
        return torch.zeros(shape, device='meta')

    u, B, channels = tokens(group_dim), tokens(state), groups * group_dim
    table = torch.zeros(1, length, dtype=torch.int32, device='meta') if order else None
    inputs = (u, u, parameter(channels, state), B, B, parameter(channels), u if gate else None,
              parameter(channels) if bias else None, table)
    shape = passes.state_shape(u, inputs[2], B, table, True, 0)
    dlast = parameter(batch, channels, state) if last else None
    passes.backward(u, dlast, inputs, parameter(*shape), softplus, reverse, True)
    monkeypatch.undo()
    passes.forget()
    return calls


def sweeps(kernels, monkeypatch, folder, capability=90, **shape):
    """Programs of the sweeps by kernel: no spills, no atomics."""
    found = {}
    for kernel, arguments in launches(kernels, monkeypatch, **shape):
        name = kernel.fn.__name__
        if name.startswith('scan_backward'):
            program = found[name] = build(kernel, arguments, capability, folder)
            assert program.stack == 0, name
            assert count(program.opcodes, 'LDL', 'STL') == 0, name
            assert count(program.opcodes, 'ATOM', 'ATOMG', 'RED', 'REDG') == 0, name
            for loop in program.loops:
                assert count(loop, 'STS', 'LDS', 'LDSM') == 0, name
    return found


# Registers of both kernels, and loads of a run of four tokens in the loops: the sweep over what is
# added, the forward sweep, the loop over four states at once, and the sweep around it, which holds
# those once. MambaVision: 16 rows of u, delta and dout and words of B and C, and twice 4 noted
# states, of which loading one by one took 40, 40 and 116 (12 for each of 8 states, and 20).
LAYOUTS = {
    'MambaVision': (MAMBAVISION, (72, 128), (16, 16, 12, 24)),
    'Vim': (VIM, (112, 255), (28, 24, 12, 28)),
    'VMamba': (VMAMBA, (64, 128), (16, 16, 25)),
    'VMamba, two channels a lane': (VMAMBA | dict(block=64), (66, 128), (16, 16, 25)),
}
# Instructions between a load and the first use of its result in the same loops, at least. The
# compiler moves the last loads of a sweep down to where the next turn begins. Two channels of 16
# bits are taken apart as they arrive. Of Vim's first sweep three loads are used before 100 other
# instructions. Loads one by one had a distance of 11 to 60.
NEAR = {
    'MambaVision': (80, 95, 85, 85),
    'Vim': (3, 150, 150, 150),
    'VMamba': (110, 110, 170),
    'VMamba, two channels a lane': (60, 150, 250),
}
# Most instructions of those loops, the inner one's once in the outer one's. Before softplus, its
# slope and a table without holes became cheaper: 361, 368, 526, 865, and 229, 215, 502.
MOST = {'MambaVision': (356, 362, 528, 832), 'VMamba': (205, 190, 445)}
NOW = [x if x == 'MambaVision' else pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS]


@pytest.mark.parametrize('layout', NOW)
def test_what_a_run_reads_is_loaded_one_run_ahead(layout, kernels, monkeypatch, tmp_path):
    shape, most, loads = LAYOUTS[layout]
    found = sweeps(kernels, monkeypatch, tmp_path, **shape)
    aggregate, main = (found[name] for name in (KERNELS[0], KERNELS[2]))
    assert aggregate.registers <= most[0] and main.registers <= most[1]
    bodies = (*aggregate.bodies, *main.bodies)
    assert len(bodies) == len(loads)
    for body, number, near in zip(bodies, loads, NEAR[layout], strict=True):
        distances = sorted(use_distances(body))
        assert len(distances) == number
        assert distances[0] >= near, distances
    for body, most_of in zip(bodies, MOST.get(layout, ()), strict=False):
        assert len(body) <= most_of


def test_eight_sums_share_their_exchanges(kernels, monkeypatch, tmp_path):
    """dB and dC of four tokens: nine exchanges between lanes for a state; one by one it is 40."""
    main = sweeps(kernels, monkeypatch, tmp_path, **MAMBAVISION | dict(length=64))[KERNELS[2]]
    *_, states, run = main.loops  # four states in one turn of the inner loop
    assert count(states, 'SHFL') == count(run, 'SHFL') == 9 * 4
    assert states['MUFU.EX2'] == 4 * 4
    assert run['MUFU.EX2'] == 4 * (4 + 1 + 1)  # decays, the step, and its derivative


VARIANTS = {
    'everything': MAMBAVISION | dict(gate=True, order=True, reverse=True, last=True),
    'float32': MAMBAVISION | dict(dtype=torch.float32),
    'channel-major': MAMBAVISION | dict(token_major=False),
    'ragged channels': MAMBAVISION | dict(group_dim=200, groups=2),
    'one launch': dict(batch=128, group_dim=320, length=49, state=8, last=True, gate=True),
    'three states': MAMBAVISION | dict(state=3),
}


@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 90, 100])
@pytest.mark.parametrize('variant', VARIANTS)
def test_no_layout_spills(variant, capability, kernels, monkeypatch, tmp_path):
    found = sweeps(kernels, monkeypatch, tmp_path, capability, **VARIANTS[variant])
    assert len(found) == (1 if variant == 'one launch' else 2)


def test_launches(kernels, monkeypatch):
    def names(**shape):
        return tuple(kernel.fn.__name__ for kernel, _ in launches(kernels, monkeypatch, **shape))

    assert names(**MAMBAVISION) == names(**VMAMBA) == KERNELS
    assert names(**VARIANTS['one launch']) == KERNELS[2:]


def test_words_are_taken_where_rows_allow_it(kernels, monkeypatch):
    for other, packed in ((dict(), 1), (dict(dtype=torch.float32), 0), (dict(state=6), 0),
                          (dict(token_major=False), 0)):
        calls = launches(kernels, monkeypatch, **MAMBAVISION | other)
        assert {x['PACK'] for _, x in calls if 'PACK' in x} == {bool(packed)}
