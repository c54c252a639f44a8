"""Launch plans against the plans that a GPU measured, and between and beyond those shapes.

What was measured were the kernels of one commit. The figures of the present ones are derived.
"""

import importlib.util
import itertools
from pathlib import Path

import pytest

from mmhybrid.ops.selective_scan.plan import KERNELS, LaunchPlan, launch_plan

FOLDER = Path(__file__).parents[2] / 'tools' / 'benchmark'
_spec = importlib.util.spec_from_file_location('plans', FOLDER / 'plans.py')
plans = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plans)
SHAPES = plans.read_rows()


def test_the_sweep_is_whole():
    assert sum(map(len, SHAPES.values())) == 492 and len(SHAPES) == 10
    assert plans.read_rows(kernels='another commit') == {}
    assert sum(map(len, plans.read_rows(kernels='6bdc1ab').values())) == 7
    kernels = {line.split(',')[1] for line in plans.SWEEP.read_text().splitlines()[1:]}
    assert kernels == {KERNELS, '6bdc1ab'}


@pytest.mark.parametrize('shape', SHAPES)
def test_within_ten_percent_of_the_best_measured(shape):
    forward, training = plans.over_best(SHAPES[shape])
    assert 1 <= forward <= 1.1
    assert 1 <= training <= 1.1


def test_figures_come_from_the_rows():
    """The written figures describe the rows as well as a new fit does.

    Single figures hang on the version of SciPy: some rows hardly tell a wait from a work.
    """
    pytest.importorskip('scipy')
    rows = [row for shape in SHAPES.values() for row in shape]
    _, fitted = plans.fit_both(SHAPES)
    written = [plans.error_as_written(which, rows)
               for which in (plans.plans.FORWARD, plans.plans.BACKWARD)]
    assert max(fitted) < 0.11
    assert written == pytest.approx(fitted, rel=0.03)


# Classification s4 is the only sequence of fewer than 64 tokens.
SURPRISES = {'T cls s4': (1.1, 1.35)}


@pytest.mark.parametrize('shape', SHAPES)
def test_a_shape_that_was_not_measured(shape):
    """What the model says of a shape from the other shapes alone."""
    pytest.importorskip('scipy')
    others = {name: rows for name, rows in SHAPES.items() if name != shape}
    found = plans.over_best(SHAPES[shape], plans.chooser(plans.fit_both(others)[0]))
    limits = SURPRISES.get(shape, (1.1, 1.1))
    assert all(ratio <= limit for ratio, limit in zip(found, limits, strict=True)), found


def test_what_is_expected_is_written_down():
    page = (FOLDER / 'results' / 'README.md').read_text()
    assert '\n'.join(plans.expectations(SHAPES)) in page, (
        'put there: python tools/benchmark/plans.py --expect')
    for measured, expected in zip((plans.plans.FORWARD, plans.plans.BACKWARD),
                                  plans.plans.EXPECTED, strict=True):
        for block, cost in expected.cut.items():
            assert all(a < b for a, b in zip(cost.wait, measured.cut[block].wait, strict=True))


SIZES = itertools.product((1, 2, 128), (1, 4), (1, 5, 96, 160, 3072), (1, 3, 49, 6085, 100_000),
                          (1, 3, 8, 16), (8, 132))


def test_every_plan_covers_the_sequence():
    for sizes in SIZES:
        for gradients, chunk in ((False, 0), (True, 0), (True, 1), (True, 50), (False, 10**6)):
            plan = launch_plan(*sizes, gradients=gradients, chunk=chunk)
            length, state = sizes[3:5]
            assert plan.chunk % 4 == plan.chunk % plan.forward.unroll == 0, (sizes, plan)
            assert (plan.n_chunks - 1) * plan.chunk < length <= plan.n_chunks * plan.chunk
            assert plan.chunk < length + 8
            assert plan.forward.block == 32 or state <= 8
            assert plan.backward.block == 32 or state <= 2
            if chunk:
                assert plan.n_chunks == -(-length // (-(-chunk // 4) * 4))


def test_plans_between_and_beyond_the_measured_shapes():
    # A long lonely sequence is cut, whatever N; many short ones are not.
    for state in (1, 2, 8, 16):
        assert launch_plan(1, 1, 64, 50_000, state, 132, gradients=True).n_chunks >= 132
        assert launch_plan(512, 1, 320, 16, state, 132, gradients=True).n_chunks == 1
    # A GPU with fewer multiprocessors needs no shorter chunks.
    chunks = [launch_plan(2, 1, 160, 12544, 8, n, gradients=False).chunk for n in (16, 132)]
    assert chunks[0] > chunks[1]
    # The time of a training step counts both passes, that of a forward pass one.
    detection = [launch_plan(2, 1, 320, 3136, 8, 132, gradients=g) for g in (False, True)]
    assert detection[0] != detection[1]


def test_a_plan_is_a_value_with_names():
    plan = launch_plan(2, 1, 320, 3136, 8, 132, gradients=True)
    assert isinstance(plan, LaunchPlan)
    assert plan._fields == ('chunk', 'n_chunks', 'forward', 'backward', 'overlap')
    assert plan.forward._fields == ('block', 'unroll', 'registers')
    # What no GPU has compared is in no plan.
    assert (plan.overlap, plan.forward.registers, plan.backward.registers) == (False, 0, 0)
    with pytest.raises(ValueError, match='got -8'):
        launch_plan(2, 1, 320, 3136, 8, 132, gradients=True, chunk=-8)
