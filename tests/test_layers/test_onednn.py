"""oneDNN in the place of PyTorch's layers: the same numbers, and only where nobody looks."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmhybrid.layers import SS2D, ConvBlock, ConvStem, Downsample, Mlp, onednn, token_linear

ACTIVATIONS = {None: lambda y: y, 'relu': F.relu, 'gelu': F.gelu,
               'gelu_tanh': lambda y: F.gelu(y, approximate='tanh')}


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """Names of oneDNN's functions that were called."""
    found = []
    for name in ('linear', 'convolution'):
        monkeypatch.setattr(onednn, name, noting(found, getattr(onednn, name)))
    return found


def noting(found, function):
    def noted(*inputs, **more):
        found.append(function.__name__)
        return function(*inputs, **more)

    return noted


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('bias', [True, False])
def test_linear(activation, bias):
    layer, x = nn.Linear(12, 20, bias), torch.randn(2, 7, 12)
    with torch.no_grad():
        y = onednn.linear(x, layer.weight, layer.bias, activation)
        near(y, ACTIVATIONS[activation](layer(x)))
        strided = torch.randn(2, 12, 7).transpose(1, 2)
        near(onednn.linear(strided, layer.weight, layer.bias), layer(strided))


def norm_of(channels):
    norm = nn.BatchNorm2d(channels).eval()
    for x in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(x)
    norm.running_var.uniform_(0.1, 3)
    return norm


@pytest.mark.parametrize('activation', [*ACTIVATIONS, 'residual'])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
def test_convolution(activation, bias, memory):
    conv = nn.Conv2d(6, 6, 3, padding=1, bias=bias).to(memory_format=memory)
    norm, x = norm_of(6), torch.randn(2, 6, 9, 5).contiguous(memory_format=memory)
    before = x.clone()
    with torch.no_grad():
        if activation == 'residual':
            near(onednn.convolution(x, conv, norm, residual=x), x + norm(conv(x)))
        else:
            near(onednn.convolution(x, conv, norm, activation),
                 ACTIVATIONS[activation](norm(conv(x))))
    assert torch.equal(x, before)


LAYERS = {
    'linear': (lambda: token_linear(8, 12), (2, 5, 8), ['linear']),
    'mlp': (lambda: Mlp(8, 16), (2, 5, 8), ['linear'] * 2),
    'stem': (lambda: ConvStem(3, 6, 8), (2, 3, 17, 12), ['convolution'] * 2),
    'block': (lambda: ConvBlock(8, 0.5), (2, 8, 9, 6), ['convolution'] * 2),
}
each_layer = pytest.mark.parametrize('name', LAYERS)


def built(name):
    build, shape, expected = LAYERS[name]
    module = build()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.load_state_dict(norm_of(norm.num_features).state_dict())
    return module.eval(), torch.randn(shape), expected


@each_layer
def test_layers_take_it_in_inference_and_give_the_same(name, calls):
    module, x, expected = built(name)
    wanted = module(x)
    assert not calls and wanted.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        calls.clear()
        with context():
            near(module(x), wanted.detach())
        assert calls == expected


@each_layer
def test_layers_leave_it_where_somebody_looks(name, calls):
    module, x, _ = built(name)
    wanted = module(x).detach()
    with torch.no_grad():
        with torch.backends.mkldnn.flags(enabled=False):
            near(module(x), wanted)
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(module(x).float(), wanted, rtol=0.1, atol=0.1)
        near(copy.deepcopy(module).double()(x.double()).float(), wanted)
        near(torch.jit.trace(module, x, check_trace=False)(x), wanted)
        near(torch.compile(module, fullgraph=True, backend='eager')(x), wanted)
        with FlopCounterMode(display=False) as counter:
            module(x)
        assert counter.get_total_flops() > 0
        assert module(x[:0]).shape == (0, *wanted.shape[1:])
        with FakeTensorMode():
            assert LAYERS[name][0]().eval()(torch.empty(x.shape)).shape == wanted.shape
    assert not calls


def test_hooks_see_what_the_layers_give(calls):
    mlp, x = Mlp(8, 16), torch.randn(2, 5, 8)
    seen = []
    mlp.fc1.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        mlp(x)
        near(seen[0], F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
        block, image = ConvBlock(4).eval(), torch.randn(1, 4, 5, 5)
        handle = block.norm2.register_forward_hook(lambda module, args, y: 2 * y)
        calls.clear()
        near(block(image) - image, 2 * block.norm2.forward(block.conv2(
            F.gelu(block.norm1(block.conv1(image)), approximate='tanh'))))
        assert not calls
        handle.remove()
        block(image)
    assert calls == ['convolution'] * 2


def test_a_gated_mixer_projects_into_dense_parts(calls):
    mixer, x = SS2D(8, gate=True, conv_bias=True).eval(), torch.randn(2, 5, 6, 8)
    wanted, seen = mixer(x).detach(), []
    with torch.no_grad():
        assert all(part.is_contiguous() for part in mixer.project(x))
        calls.clear()
        near(mixer(x), wanted)
        assert calls == ['linear'] * 3  # what is scanned, the gate, the output
        for name in ('in_proj', 'out_norm'):  # and what hooks were given stays what it was
            getattr(mixer, name).register_forward_hook(
                lambda module, args, y: seen.append((y, y.clone())))
        near(mixer(x), wanted)
    assert len(seen) == 2 and all(torch.equal(*pair) for pair in seen)


def test_statistics_of_a_batch_are_still_taken(calls):
    """Training without gradients, as when BatchNorm is calibrated, and norms of other kinds."""
    block, x = ConvBlock(4).train(), torch.randn(2, 4, 5, 5) + 3
    before = block.norm1.running_mean.clone()
    with torch.no_grad():
        block(x)
        assert not torch.equal(block.norm1.running_mean, before)
        block.norm1 = nn.BatchNorm2d(4, track_running_stats=False)
        block.eval()(x)
        block.norm1 = nn.SyncBatchNorm(4).eval()
        block.norm2 = nn.BatchNorm2d(4, affine=False).eval()
        near(block(x), x + block.norm2(block.conv2(
            F.gelu(block.norm1(block.conv1(x)), approximate='tanh'))))
    assert not calls


@pytest.mark.parametrize('build', [lambda: ConvStem(3, 6, 8), lambda: ConvBlock(3),
                                   lambda: Downsample(3, 8)])
def test_maps_have_channels_last(build):
    module, last = build(), torch.channels_last
    image = torch.randn(2, 3, 12, 9)
    sums = isinstance(module, ConvBlock)  # lie as what comes in
    for x in [image.to(memory_format=last), *([] if sums else [image])]:
        x = x.detach().requires_grad_()
        y = module(x)
        assert y.is_contiguous(memory_format=last)
        y.square().sum().backward()
        for name, p in module.named_parameters():
            assert p.grad.stride() == p.stride(), name
    other = build()
    other.load_state_dict({k: v.clone(memory_format=torch.contiguous_format)
                           for k, v in module.state_dict().items()})
    assert [p.stride() for p in other.parameters()] == [p.stride() for p in module.parameters()]
    assert copy.deepcopy(module)(x).is_contiguous(memory_format=last)
