"""What the Triton scan becomes on a GPU, read from the machine code: no GPU is needed for that.

The launchers run on meta tensors with recorders in place of the kernels; every recorded launch is
compiled as Triton would compile it, and the program is disassembled.
"""

import collections

import pytest
import torch
from machine_code import Recorder, build, compiler, count, specialisation, use_distances

from mmhybrid.ops.selective_scan import passes

KERNELS = [
    'scan_forward_kernel', 'scan_carry_kernel', 'scan_backward_kernel',
    'scan_backward_aggregate_kernel', 'sum_gradients_kernel',
]
DETECTION = dict(batch=2, group_dim=320, length=3136, state=8)


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
    with compiler('mmhybrid.ops.selective_scan.kernels', tmp_path_factory) as module:
        yield module


def launches(
    kernels, monkeypatch, *, batch, group_dim, length, state, groups=1, dtype=torch.bfloat16,
    token_major=True, gate=False, bias=False, softplus=False, order=False, reverse=False, last=False
):
    """The launches of one forward and backward pass: a list of (kernel, arguments)."""
    calls = []

    passes.forget()
    monkeypatch.setattr(passes, '_COPY_ABOVE', 1 << 62)  # strides as they come
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), calls))

    def tokens(channels):
        shape = (batch, groups, channels, length)
        if token_major:
            shape = (batch, length, groups, channels)
        x = torch.zeros(shape, dtype=dtype, device='meta')
        return x.movedim(1, -1) if token_major else x

    def parameter(*shape):
        return torch.zeros(shape, device='meta')

    u, B = tokens(group_dim), tokens(state)
    inputs = (
        u, u, parameter(groups * group_dim, state), B, B, parameter(groups * group_dim),
        u if gate else None, parameter(groups * group_dim) if bias else None,
        torch.zeros(1, length, dtype=torch.int32, device='meta') if order else None,
    )
    flags = softplus, reverse, True
    out, state_last, states = passes.forward(inputs, *flags)
    dlast = state_last if last else None
    passes.backward(out, dlast, inputs, states, *flags)
    monkeypatch.undo()
    passes.forget()
    return calls


def exponentials(loop, arguments, tokens):
    """MUFU.EX2 per token and channel: an instruction serves 32 channels."""
    return loop['MUFU.EX2'] * 32 / (tokens * arguments['BLOCK'])


def check_forward(program, arguments, expected):
    """Registers and instructions of the forward sweeps."""
    # Of 16 states two registers may wait in memory for the end of the loop, nothing else.
    assert program.stack <= (8 if arguments['N'] > 8 else 0), 'spills'
    assert sum(count(loop, 'LDL', 'STL') for loop in program.loops) == 0, 'spills'
    # Channel-major, the two channels of a thread are far apart and need an address each, and the
    # states of a token are loaded one by one; 64 channels of many states need as many.
    narrow = arguments['delta_sd'] == 1 and (arguments['BLOCK'] == 32 or arguments['N'] <= 2)
    assert program.registers <= (128 if narrow else 168)
    assert count(program.opcodes, 'BAR', 'STS', 'LDS', 'LDSM') == 0
    assert program.shared == 0
    (loop,) = program.loops
    assert count(loop, 'SHFL') == 0  # parameters and last states may be shuffled, tokens not
    assert exponentials(loop, arguments, arguments['UNROLL']) == expected


VARIANTS = {
    'plain': {},
    'softplus': dict(softplus=True, bias=True),
    'everything': dict(gate=True, softplus=True, bias=True, order=True, reverse=True, last=True),
    'channel-major float32': dict(token_major=False, dtype=torch.float32),
    'ragged channels': dict(group_dim=200, groups=2),
    'one state': dict(state=1, softplus=True, bias=True),
    'sixteen states': dict(state=16, gate=True, softplus=True, bias=True),
    'one launch': dict(batch=128, length=49, last=True, gate=True),
}
QUICK = {('plain', 90), ('everything', 90), ('one state', 90), ('one launch', 90),
         ('softplus', 80), ('softplus', 100)}
ALL = [
    pytest.param(name, capability, marks=() if (name, capability) in QUICK else pytest.mark.slow)
    for name in VARIANTS
    for capability in (80, 90, 100)
]


@pytest.mark.parametrize(('variant', 'capability'), ALL)
def test_machine_code(variant, capability, kernels, monkeypatch, tmp_path):
    shape = DETECTION | VARIANTS[variant]
    calls = launches(kernels, monkeypatch, **shape)
    names = [kernel.fn.__name__ for kernel, _ in calls]
    assert len(names) == (1 + 2 if variant == 'one launch' else 3 + 4), names
    for kernel, arguments in calls:
        name = kernel.fn.__name__
        if name.startswith('scan_backward'):
            continue  # test_backward_static.py
        program = build(kernel, arguments, capability, tmp_path)
        step = shape['state'] + shape.get('softplus', False)
        gate = shape.get('gate', False)
        if name == 'scan_forward_kernel':
            final = arguments['MODE'] != kernels.AGGREGATE.value
            check_forward(program, arguments, step + (gate and final))
        else:
            assert program.stack == 0, f'{name} spills'


def test_distances_are_those_of_the_code():
    body = [
        ('LDG.E.64', ' R2, desc[UR4][R8.64]'),
        ('IMAD.WIDE', ' R8, R1, 0x2, R6'),
        ('FFMA', ' R5, R7, R7, R5'),
        ('FADD', ' R5, R5, R3'),  # the upper half of the pair
        ('LDG.E', ' R7, desc[UR4][R8.64+0x10]'),
        ('STG.E', ' desc[UR4][R10.64], R7'),
        ('LDG.E.U16', ' R1, desc[UR4][R8.64]'),  # used in the next turn
        ('BRA', ' 0x100'),
    ]
    assert use_distances(body) == [3, 1, 3]


# As the models call it: MambaVision, Vim and LocalVim, VMamba.
LAYOUTS = {
    'plain': dict(softplus=True, bias=True),
    'gate': dict(softplus=True, bias=True, gate=True),
    'order': dict(softplus=True, bias=True, gate=True, order=True),
    'one state': dict(state=1, softplus=True, bias=True, groups=4, group_dim=96, order=True),
    'sixteen states': dict(state=16, softplus=True, bias=True, gate=True, group_dim=768),
}
# Most instructions of the loop over four tokens, of both sweeps. Before softplus and a table
# without holes became cheaper they were 305 and 427, and 325 and 402.
MOST = {'plain': (299, 421), 'one state': (281, 383)}
LAYOUTS_NOW = [
    name if name in ('plain', 'one state') else pytest.param(name, marks=pytest.mark.slow)
    for name in LAYOUTS
]


@pytest.mark.parametrize('name', LAYOUTS_NOW)
def test_loads_lie_ahead_of_their_use(name, kernels, monkeypatch, tmp_path):
    """Both sweeps of a cut sequence on sm_90: registers, loads per token, and how far ahead.

    A group of AHEAD tokens is computed between the load of a value and its use, less what the
    compiler moves. Measured kernels had half of the loads used within 50 instructions. The bounds
    guard what is reached; the wish, 150 for every load, is not met for N = 8.
    """
    shape = DETECTION | LAYOUTS[name]
    calls = launches(kernels, monkeypatch, **shape)
    for kernel, arguments in calls:
        if kernel.fn.__name__ != 'scan_forward_kernel':
            continue
        program = build(kernel, arguments, 90, tmp_path)
        assert program.stack == 0
        assert program.registers <= (128 if shape['state'] > 8 else 96 if 'gate' in shape else 80)
        (loop,) = program.loops
        final = arguments['MODE'] == kernels.FINAL.value
        words = max(1, shape['state'] // 4)
        expected = 2 + words + final * (words + shape.get('gate', False)) + shape.get('order', 0)
        assert count(loop, 'LDG') == expected * arguments['UNROLL']
        distances = use_distances(program.bodies[0])
        assert len(distances) == count(loop, 'LDG')
        assert loop.total() <= MOST.get(name, (800, 800))[final]
        near = sorted(distances)
        assert near[0] >= 40 and near[len(near) // 10] >= 60 and near[len(near) // 2] >= 110, near


def test_a_few_chunks_take_two_launches(kernels, monkeypatch, tmp_path):
    calls = launches(kernels, monkeypatch, **DETECTION | dict(length=256, softplus=True, bias=True))
    forward = [call for call in calls if call[0].fn.__name__ == 'scan_forward_kernel']
    assert [arguments['MODE'] for _, arguments in forward] == [
        kernels.AGGREGATE.value, kernels.FEW.value]
    assert [kernel.fn.__name__ for kernel, _ in calls[:2]] == ['scan_forward_kernel'] * 2
    program = build(*forward[1], 90, tmp_path)
    assert program.stack == 0 and program.registers <= 96
    assert count(program.opcodes, 'BAR', 'STS', 'LDS') == 0


def overlapping(kernels, monkeypatch, **shape):
    """The launches of a plan that lets them overlap."""
    own = passes.plans.launch_plan
    with monkeypatch.context() as patch:
        patch.setattr(
            passes.plans, 'launch_plan', lambda *sizes, **x: own(*sizes, **x)._replace(overlap=True)
        )
        return launches(kernels, patch, **shape)


def test_launches_overlap_where_a_plan_says_so(kernels, monkeypatch):
    """All launches of a pass but its first may begin before the one before it has ended."""
    calls = overlapping(kernels, monkeypatch, **DETECTION)
    assert [arguments.get('launch_pdl', False) for _, arguments in calls] == [
        False, True, True, False, True, True, True]
    assert all(arguments['OVERLAP'] for _, arguments in calls)
    calls = launches(kernels, monkeypatch, **DETECTION)
    assert not any(x['OVERLAP'] or 'launch_pdl' in x for _, x in calls)


@pytest.mark.parametrize(
    'small', [True, pytest.param(False, marks=pytest.mark.slow)], ids=['small kernels', 'sweeps']
)
def test_what_overlaps_waits(small, kernels, monkeypatch, tmp_path):
    """The first launch lets the next begin, the last waits, those between do both."""
    calls = overlapping(kernels, monkeypatch, **DETECTION)
    for i, (kernel, arguments) in enumerate(calls):
        if small != kernel.fn.__name__.endswith(('carry_kernel', 'gradients_kernel')):
            continue
        program = build(kernel, arguments, 90, tmp_path)
        assert program.stack == 0
        assert program.opcodes['ACQBULK'] == (i not in (0, 3))
        assert program.opcodes['PREEXIT'] == (i != len(calls) - 1)


def test_a_table_as_long_as_the_map_has_no_holes(kernels, monkeypatch):
    for order in (False, True):
        calls = launches(kernels, monkeypatch, **DETECTION | dict(order=order))
        assert {x['ORDER'] for _, x in calls if 'ORDER' in x} == {int(order)}
    windows = torch.zeros(1, 21, dtype=torch.int32, device='meta')
    x, B = torch.zeros(1, 1, 4, 20, device='meta'), torch.zeros(1, 1, 2, 20, device='meta')
    shape = passes._Shape((x, x, x[0, 0, :, :2], B, B, None, None, None, windows), False, 0)
    assert shape.kind_of_order(windows) == 2


def test_states_that_are_no_words_are_loaded_one_by_one(kernels, monkeypatch, tmp_path):
    for other in (dict(state=6), dict(dtype=torch.float32), dict(token_major=False)):
        calls = launches(kernels, monkeypatch, **DETECTION | dict(group_dim=32) | other)
        kernel, arguments = next(call for call in calls if call[1].get('PACK') is not None)
        assert not arguments['PACK']
        (loop,) = build(kernel, arguments, 90, tmp_path).loops
        assert count(loop, 'LDG') == (2 + arguments['N']) * arguments['UNROLL']


def test_no_recompilation_for_another_image_size(kernels, monkeypatch):
    sizes = ((1, 49), (2, 3136), (3, 97), (2, 4096), (128, 49), (1, 12543), (8, 1000))

    def programs(token_major):
        found = set()
        for batch, length in sizes:
            shape = DETECTION | dict(batch=batch, length=length, token_major=token_major)
            for kernel, arguments in launches(kernels, monkeypatch, **shape):
                found.add((kernel.fn.__name__, repr(specialisation(kernel, arguments))))
        return collections.Counter(name for name, _ in found)

    # Four modes of the forward kernel, the last sweep of a few chunks among them, and two of the
    # backward one (whole or in chunks). The carry, which is small, goes either way and has one, 8
    # or 32 rows; forward there are more than 16 chunks.
    expected = dict.fromkeys(KERNELS, 1) | {
        'scan_forward_kernel': 4, 'scan_backward_kernel': 2, 'scan_carry_kernel': 5,
    }
    assert programs(token_major=True) == expected
    # Channel-major strides are the length: its divisibility by sixteen matters, nothing else.
    for name, number in programs(token_major=False).items():
        assert number <= 2 * expected[name], name


def test_neighbouring_channels_are_loaded_together(kernels, monkeypatch, tmp_path):
    calls = launches(kernels, monkeypatch, **DETECTION | dict(state=1))
    kernel, arguments = calls[2]
    assert arguments['MODE'] == kernels.FINAL.value and arguments['BLOCK'] == 64
    (loop,) = build(kernel, arguments, 90, tmp_path).loops
    # u and delta: pairs of bfloat16 in one 32-bit load per token; y: one 32-bit store.
    assert loop['LDG.E'] == 2 * arguments['UNROLL']
    assert loop['STG.E'] == arguments['UNROLL']


def test_one_channel(kernels, monkeypatch, tmp_path):
    """The compiler takes a size of one for a constant, which has no methods of a tensor."""
    calls = launches(kernels, monkeypatch, batch=1, group_dim=1, length=4096, state=1)
    calls = {kernel.fn.__name__: (kernel, arguments) for kernel, arguments in calls}
    for name in ('scan_carry_kernel', 'sum_gradients_kernel'):
        assert build(*calls[name], 90, tmp_path).stack == 0
