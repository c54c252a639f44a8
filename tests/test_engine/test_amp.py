"""Mixed precision starts on a CPU too, in float32."""
import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn

from mmhybrid.engine import AmpOptimWrapper
from mmhybrid.engine.amp import has_accelerator


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def step(model, wrapper):
    with wrapper.optim_context(model):
        out = model(torch.ones(2, 3))
    wrapper.update_params(out.sum())
    return out


@pytest.mark.skipif(has_accelerator(), reason='what happens without an accelerator')
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', None])
def test_cpu_trains_in_float32(model, dtype):
    twin = nn.Linear(3, 1)
    twin.load_state_dict(model.state_dict())
    amp = AmpOptimWrapper(torch.optim.AdamW(model.parameters()), dtype=dtype)
    plain = OptimWrapper(torch.optim.AdamW(twin.parameters()))
    assert step(model, amp).dtype == torch.float32
    step(twin, plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(),
                                                 strict=True))
    assert 'loss_scaler' not in amp.state_dict()


@pytest.mark.skipif(has_accelerator(), reason='what happens without an accelerator')
def test_checkpoint_of_an_accelerator_loads_on_a_cpu(model):
    amp = AmpOptimWrapper(torch.optim.AdamW(model.parameters()))
    step(model, amp)
    state = amp.state_dict()
    state['loss_scaler'] = dict(scale=65536.0)
    amp.load_state_dict(state)
    assert 'loss_scaler' in state  # the caller's dict is left alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_gpu_computes_in_half_precision(model, dtype):
    model = model.cuda()
    amp = AmpOptimWrapper(torch.optim.AdamW(model.parameters()), dtype=dtype)
    with amp.optim_context(model):
        out = model(torch.ones(2, 3, device='cuda'))
    assert out.dtype == getattr(torch, dtype)
    before = model.weight.detach().clone()
    amp.update_params(out.float().sum())
    assert not torch.equal(before, model.weight)
    amp.load_state_dict(amp.state_dict())
    assert amp.loss_scaler.is_enabled() == (dtype == 'float16')


def test_mistakes(model):
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match='float16, bfloat16'):
        AmpOptimWrapper(optimizer, dtype='float8')
    with pytest.raises(ValueError, match='loss_scale'):
        AmpOptimWrapper(optimizer, loss_scale='static')
    with pytest.raises(TypeError):
        AmpOptimWrapper(optimizer, los_scale='dynamic')
