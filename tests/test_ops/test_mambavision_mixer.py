"""The fused MambaVision mixer: what it keeps, when it is taken, and (interpreted) its results."""

from pathlib import Path

import pytest
import torch
from interpreter import run_cases
from torch._subclasses.fake_tensor import FakeTensorMode

from mmhybrid.layers import MambaVisionMixer
from mmhybrid.ops import mambavision_mixer

CASES = Path(__file__).parent / 'mixer_cases.py'


def test_results_gradients_and_operators():
    assert run_cases(CASES) >= 23


def test_asking_for_the_kernels_on_a_cpu_says_what_to_do():
    x = torch.randn(1, 4, 8)
    with pytest.raises(RuntimeError, match="fused=True, but .* on a GPU.*fused='auto'"):
        MambaVisionMixer(8, fused=True)(x)
    mixer = MambaVisionMixer(8)
    assert mixer.fused == 'auto' and mixer.path(x) == 'plain'
    assert mixer(x).shape == x.shape
    # Named shapes without memory, as tools that count operations use them.
    assert mixer.path(x.to('meta')) == 'plain'


def test_arguments_that_contradict():
    with pytest.raises(ValueError, match="fused='on', expected True, False or 'auto'"):
        MambaVisionMixer(8, fused='on')
    with pytest.raises(ValueError, match="fused=True with backend='torch'.*fused=False"):
        MambaVisionMixer(8, fused=True, backend='torch')
    assert MambaVisionMixer(8, fused=False, backend='torch').path(torch.ones(1, 2, 8)) == 'plain'


def test_auto_follows_the_scan(monkeypatch):
    """With kernels that can run, 'auto' takes them unless another scan was asked for."""
    x = torch.randn(1, 4, 8)
    monkeypatch.setattr(mambavision_mixer, 'unsupported_reason', lambda *_: None)
    chosen = {'auto': 'triton', 'torch': 'torch', 'triton': 'triton'}
    monkeypatch.setattr('mmhybrid.layers.mixers.mambavision.choose_backend',
                        lambda name, *_: chosen[name])
    for backend, path in (('auto', 'fused'), ('torch', 'plain'), ('triton', 'fused')):
        assert MambaVisionMixer(8, backend=backend).path(x) == path
        assert MambaVisionMixer(8, backend=backend, fused=False).path(x) == 'plain'
    assert MambaVisionMixer(8).path(x[:0]) == 'plain'


def test_parameters_are_those_of_the_plain_module():
    plain, fused = (MambaVisionMixer(16, fused=f) for f in (False, True))
    assert [(k, v.shape) for k, v in plain.state_dict().items()] == [
        (k, v.shape) for k, v in fused.state_dict().items()]


SHAPES = {  # batch, tokens, channels
    'detection stage 3': (2, 12544, 320),
    'detection stage 4': (2, 3136, 640),
    'segmentation stage 3': (2, 4096, 512),
    'segmentation stage 4': (2, 1024, 640),
    'classification stage 3': (128, 196, 320),
    'classification stage 4': (128, 49, 640),
    'few short sequences': (1, 196, 320),
}


def kept_bytes(shape, lean, autocast):
    """Bytes per token and channel that a mixer keeps for the backward pass, weights apart."""
    kept, batch, length, dim = {}, *shape
    with FakeTensorMode():
        mixer = MambaVisionMixer(dim)
        dtype = torch.float32 if autocast else torch.bfloat16
        x = torch.randn(shape, dtype=dtype)
        weights = [
            p.detach().flatten(1).to(dtype) if p.dim() > 1 else p.detach() for p in (
                mixer.in_proj.weight, mixer.conv1d_x.weight, mixer.conv1d_z.weight,
                mixer.x_proj.weight, mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log,
                mixer.D, mixer.out_proj.weight)]
        of_weights = {w.requires_grad_().shape for w in weights}

        def pack(x):
            if x.shape not in of_weights:
                kept[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        with torch.autocast('cpu', torch.bfloat16, enabled=autocast), \
                torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = mambavision_mixer.fused_mixer(x.requires_grad_(), *weights, lean)
        assert y.dtype == torch.bfloat16 and y.shape == shape
        y.sum().backward()  # the fake backward pass knows all shapes
        assert all(w.grad.shape == w.shape for w in (x, *weights))
    return sum(storage.nbytes() for storage in kept.values()) / (batch * length * dim)


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('name', SHAPES)
def test_what_is_kept_for_the_backward_pass(name, autocast):
    assert 6 < kept_bytes(SHAPES[name], False, autocast) <= 7.5
    assert 3.9 < kept_bytes(SHAPES[name], True, autocast) <= 4.5
