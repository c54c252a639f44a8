"""What training steps launch must not grow, and what counts it sees what a GPU would see."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mmhybrid.analysis.launches import count_launches
from mmhybrid.analysis.pretended_gpu import MINIMUM_TORCH
from mmhybrid.ops import triton_support

pytest.importorskip('triton', reason='the kernels need Triton')
if triton_support.interpreting():
    pytest.skip('interpreted kernels are not launched', allow_module_level=True)
if tuple(map(int, torch.__version__.split('.')[:2])) < MINIMUM_TORCH:
    pytest.skip('fake tensors on a GPU ask this PyTorch for a driver', allow_module_level=True)

pytestmark = pytest.mark.plain_empty

SCRIPT = Path(__file__).parents[2] / 'tools' / 'benchmark' / 'launches.py'
_spec = importlib.util.spec_from_file_location('launches_script', SCRIPT)
script = importlib.util.module_from_spec(_spec)
sys.modules['launches_script'] = script
_spec.loader.exec_module(script)

TABLE = script.read_table()
QUICK = ('mambavision_t_det', 'mambavision_t_tight_det', 'vmamba_t_seg', 'vim_ti_seg',
         'localvim_t_seg', 'localvmamba_t_seg')


def check(name, launches, columns):
    """Neither launches nor bytes above the table's."""
    for what, got, column in zip(
        ('launches', 'MB'), script.total([vars(x) for x in launches]), columns, strict=True
    ):
        kept = int(TABLE[name][column])
        assert got <= kept, (
            f'{name} takes {got} {what} a step and took {kept}; find what was added with '
            f'tools/benchmark/launches.py --case {name} --by module, and if it is worth it, '
            'rewrite the table with --write'
        )


@pytest.mark.parametrize('name', QUICK)
def test_few_blocks_launch_no_more_than_they_did(name):
    launches = script.counted(script.CASES[name], shallow=True)
    check(name, launches, ('shallow_launches', 'shallow_MB'))


@pytest.mark.slow
@pytest.mark.parametrize('name', script.CASES)
def test_backbones_launch_no_more_than_they_did(name):
    check(name, script.counted(script.CASES[name]), ('launches', 'MB'))


def test_the_table_has_every_case():
    assert list(TABLE) == list(script.CASES)


def step_of(module, size, dtype=torch.float16):
    """{operator: launches} of a step of one module."""
    found = {}
    for one in count_launches(module, size, dtype):
        name = one.operator.removeprefix('aten::')
        found[name] = found.get(name, 0) + one.launches
    return found


# every step has the loss: a mean with its gradient, and the start of the backward pass
LOSS = {'mean': 1, 'div': 1, 'ones_like': 1}


def test_stochastic_depth_is_drawn_together():
    """Four launches for all blocks, the others use the factors: 13 where 24 drew them apart."""
    case = script.CASES['mambavision_t_tight_det']
    dropping = case._replace(arguments=case.arguments | {'drop_path_rate': 0.2})
    found = {}
    for one in script.counted(dropping, shallow=True):
        found[one.operator] = found.get(one.operator, 0) + one.launches
    assert not any('bernoulli' in name for name in found) and found['aten::uniform_'] == 1
    most = int(TABLE['mambavision_t_tight_det']['shallow_launches']) + 13
    assert sum(found.values()) <= most, f'{sum(found.values())} launches, and {most} were enough'


def test_a_linear_layer_under_autocast():
    found = step_of(nn.Linear(8, 4), (6, 8))
    # casts: x, weight, bias and the result for the loss; its gradient, and those of the weights
    assert found == LOSS | {'_to_copy': 7, 'addmm': 1, 'mm': 1, 'sum': 1}
    assert step_of(nn.Linear(8, 4), (6, 8), torch.float32) == LOSS | {
        'addmm': 1, 'mm': 1, 'sum': 1}


def test_a_layer_norm_stays_in_float32():
    found = step_of(nn.LayerNorm(8), (6, 8))
    assert found == LOSS | {'native_layer_norm': 1, 'native_layer_norm_backward': 2}


def test_weights_are_cast_once_a_step():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.inner(self.inner(x))

    found = step_of(Twice(), (6, 8))
    # x, weight, result; gradients of the result and of the weight
    assert found['_to_copy'] == 5
    assert found['mm'] == 2 + 3 and found['add'] == 1


def test_attention_is_flash_in_16_bits_and_efficient_in_32():
    attend = nn.functional.scaled_dot_product_attention

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            x = x * self.scale
            return attend(x, x, x)

    half = step_of(Self(), (1, 2, 16, 64))
    assert half['_scaled_dot_product_flash_attention'] == 1
    assert half['_scaled_dot_product_flash_attention_backward'] == 3
    whole = step_of(Self(), (1, 2, 16, 64), torch.float32)
    assert whole['_scaled_dot_product_efficient_attention'] == 1


def test_the_gradient_is_the_engines():
    """Each parameter gets one, in its own shape and dtype, and launches go to its module."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(),
                          nn.Linear(144, 2))
    launches = count_launches(model, (2, 3, 8, 8), torch.bfloat16)
    for parameter in model.parameters():
        assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == torch.float32
    where = {one.operator: one.module for one in launches}
    assert where['aten::convolution_backward'] == '0'
    assert where['aten::native_batch_norm_backward'] == '1'
    assert where['aten::gelu_backward'] == '2'


def test_views_and_empty_tensors_launch_nothing():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))

        def forward(self, x):
            torch.empty(5)
            return self.weight.view(2, 6)[:, 1:].unsqueeze(0).expand(7, -1, -1)

    # the gradient: of the expanded axis a sum, of the slice zeros and a copy
    with_views = step_of(Views(), (1,))
    assert {k: v for k, v in with_views.items() if k not in LOSS} == {
        'sum': 1, 'slice_backward': 2}


def test_bytes_of_an_expanded_tensor_are_read_once():
    class Expanded(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10, 100))

        def forward(self, x):
            return self.weight.expand(50, 10, 100).exp()

    (exp,) = (x for x in count_launches(Expanded(), (1,), torch.float16)
              if x.operator == 'aten::exp')
    assert exp.bytes == 4 * 1000 + 4 * 50 * 1000


def test_nothing_pretended_stays_behind():
    """Tables, kinds of calls and answers about the GPU are of the real world afterwards."""
    from mmhybrid.ops.cross_scan import orders
    from mmhybrid.ops.selective_scan import passes, triton_backend

    before = dict(triton_backend._CALLS), dict(passes._FORWARD), dict(orders._TABLES)
    script.counted(script.CASES['vmamba_t_seg'], shallow=True)
    assert before == (triton_backend._CALLS, passes._FORWARD, dict(orders._TABLES))
    assert not torch.cuda.is_available() or torch.cuda.get_device_properties(0).name != 'pretended'
    assert triton_support._unavailable_reason.__name__ == '_unavailable_reason'
