"""What every backbone must do, whatever its family.

The registry is the list of what is tested: a new class or a new entry of a module's
``ARCHITECTURES`` is covered without a new test (see backbone_cases.py).
"""
import inspect

import pytest
import torch
from backbone_cases import CASES, backbone_classes, build, loss_of
from fill import make_input
from torch import nn

from mmhybrid.models.backbones.base import DenseBackbone, checked_recomputation

SIZES = [(131, 99), (197, 131), (511, 511)]


each_backbone = pytest.mark.parametrize(('cls', 'arguments'), CASES)


def test_all_families_are_there():
    names = {cls.__name__ for cls, _ in backbone_classes()}
    assert names >= {'MambaVision', 'VMamba', 'Vim', 'LocalVMamba', 'LocalVim'}


@each_backbone
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_any_size(cls, arguments, size):
    model = build(cls, arguments).eval()
    x = make_input(0, (1, 3, *size))
    with torch.no_grad():
        maps = model(x)
    assert isinstance(maps, tuple) and len(maps) == len(model.out_channels)
    for y, channels, stride in zip(maps, model.out_channels, model.out_strides, strict=True):
        assert y.shape[:2] == (1, channels) and y.is_contiguous()
        assert bool(torch.isfinite(y).all())
        for side, whole in zip(y.shape[2:], size, strict=True):
            # plain backbones pad images to whole patches of 16 before they refine the grid
            assert whole // stride <= side <= -(-whole // 16) * 16 // min(stride, 16) + 1


@each_backbone
def test_images_of_a_batch_do_not_mix(cls, arguments):
    model = build(cls, arguments).eval()
    x = make_input(0, (2, 3, 67, 50))
    with torch.no_grad():
        both, first, second = model(x), model(x[:1]), model(x[1:])
    for y, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(y, torch.cat([a, b]), rtol=1e-4, atol=1e-4)


@each_backbone
def test_every_parameter_gets_a_gradient(cls, arguments):
    model = build(cls, arguments).train()
    loss_of(model(make_input(0, (2, 3, 72, 50)))).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    unused = [name for name, p in model.named_parameters() if not p.requires_grad]
    # Only Vim's final norm, which the published segmentor has and does not use.
    assert [name for name in unused if name != 'norm_f.weight'] == []


@each_backbone
def test_gradients_agree_with_the_float64_reference(cls, arguments):
    x = make_input(1, (1, 3, 66, 50))
    fast = build(cls, arguments, scan_backend='auto').eval()
    slow = cls(**arguments | dict(scan_backend='reference')).double().eval()
    slow.load_state_dict(fast.state_dict())
    inputs = []
    for model, image in ((fast, x), (slow, x.double())):
        image = image.clone().requires_grad_()
        loss_of(model(image)).backward()
        inputs.append(image)
    pairs = {name: (p.grad, q.grad) for (name, p), (_, q) in zip(
        fast.named_parameters(), slow.named_parameters(), strict=True) if p.requires_grad}
    pairs['image'] = inputs[0].grad, inputs[1].grad
    for name, (got, want) in pairs.items():
        error = float((got.double() - want).norm() / want.norm().clamp_min(1e-3))
        assert error < 1e-4, f'{name}: relative error {error:.1e}'


@each_backbone
def test_recomputing_changes_nothing(cls, arguments):
    x = make_input(0, (2, 3, 64, 48))
    results, runs = [], []
    for with_cp in (False, True):
        model = build(cls, arguments, with_cp=with_cp, drop_path_rate=0.3).train()
        for name, module in model.named_modules():
            if name.endswith(('.in_proj', '.qkv', '.conv1')):  # every block begins with one
                module.register_forward_hook(lambda *_, name=name: runs.append(name))
        torch.manual_seed(3)
        runs.clear()
        maps = model(x)
        loss_of(maps).backward()
        assert runs and {runs.count(name) for name in runs} == {2 if with_cp else 1}
        results.append((maps, {n: p.grad for n, p in model.named_parameters()},
                        dict(model.named_buffers())))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for part in (1, 2):
        for name, a in results[0][part].items():
            if a is not None:
                torch.testing.assert_close(a, results[1][part][name], msg=name)


@each_backbone
def test_recomputing_chosen_stages(cls, arguments):
    count = len(build(cls, arguments).layers if cls.__name__ != 'MambaVision' else 'four')
    runs = []
    for with_cp in ([1, 3], tuple(i in (1, 3) for i in range(count))):
        runs.clear()
        model = build(cls, arguments, with_cp=with_cp).train()
        for name, module in model.named_modules():
            if name.endswith(('.in_proj', '.qkv', '.conv1')):
                module.register_forward_hook(lambda *_, name=name: runs.append(name))
        loss_of(model(make_input(0, (1, 3, 64, 48)))).backward()
        assert {(name.split('.')[1], runs.count(name)) for name in runs} == {
            (str(i), 2 if i in (1, 3) else 1) for i in range(count)}


@pytest.mark.parametrize(('with_cp', 'error', 'words'), [
    ('yes', TypeError, "with_cp='yes', expected True or False, one of these for each stage"),
    (1, TypeError, 'with_cp=1, expected True or False'),
    ([True, 2], TypeError, 'or the numbers of the stages to recompute, from 0'),
    ([True] * 3, ValueError, 'got 3 flags for with_cp .*expected 4, one per stage'),
    ([4], ValueError, 'got 4 for with_cp, expected an integer from 0 to 3'),
])
def test_wrong_choices_of_stages(with_cp, error, words):
    with pytest.raises(error, match=words):
        checked_recomputation(with_cp, 4)
    assert checked_recomputation([], 4) == checked_recomputation(False, 4) == (False,) * 4


@each_backbone
@pytest.mark.parametrize('way', ['autocast', 'whole'])
def test_half_precision(cls, arguments, way):
    model = build(cls, arguments).train()
    x = make_input(0, (2, 3, 64, 48))
    with torch.no_grad():
        exact = model(x)
    if way == 'whole':
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=way == 'autocast'):
        maps = model(x)
    for y, want in zip(maps, exact, strict=True):
        error = float((y.detach().float() - want).norm() / want.norm())
        assert error < 0.1, f'off by {error:.3f}'
    loss_of([y.float() for y in maps]).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert bool(torch.isfinite(parameter.grad).all()), name


@each_backbone
@pytest.mark.parametrize('frozen', [-1, 0, 2, 4])
def test_frozen_stages(cls, arguments, frozen):
    model = build(cls, arguments, frozen_stages=frozen, drop_path_rate=0.2)
    model.train()
    loss_of(model(make_input(0, (2, 3, 64, 48)))).backward()
    stages = getattr(model, 'layers', None) or model.levels
    parts = [model.patch_embed, *stages[:max(frozen, 0)]] if frozen >= 0 else []
    still = {id(p) for part in parts for p in part.parameters()}
    if frozen >= 0 and hasattr(model, 'pos_embed'):
        still.add(id(model.pos_embed))
    for name, parameter in model.named_parameters():
        if name.startswith('norm_f'):
            continue
        assert parameter.requires_grad == (id(parameter) not in still), name
        assert (parameter.grad is None) == (id(parameter) in still), name
    assert all(not m.training for part in parts for m in part.modules())
    assert model.training and stages[-1].training == (frozen < len(stages))


@each_backbone
@pytest.mark.parametrize('subset', [(0,), (1, 3), (2,), (0, 1, 2)], ids=str)
def test_subsets_of_the_maps(cls, arguments, subset):
    plain = {'pyramid': False} if 'pyramid' in inspect.signature(
        cls.__init__).parameters else {}
    whole = build(cls, arguments, **plain).eval()
    indices = tuple(whole.out_indices[i] for i in subset)
    part = cls(**arguments | plain | dict(out_indices=indices)).eval()
    own = part.state_dict()
    given = whole.state_dict()
    for name in own:
        if name.startswith('outnorm_'):  # LocalVim numbers its norms by output
            digits = int(name[8:].split('.')[0])
            given[name] = whole.state_dict()[name.replace(f'_{digits}', f'_{subset[digits]}', 1)]
    part.load_state_dict({name: given[name] for name in own})
    x = make_input(0, (1, 3, 64, 80))
    with torch.no_grad():
        all_maps, some = whole(x), part(x)
    assert len(some) == len(subset) == len(part.out_channels) == len(part.out_strides)
    for y, i in zip(some, subset, strict=True):
        torch.testing.assert_close(y, all_maps[i])
    part.train()
    loss_of(part(make_input(0, (2, 3, 64, 80)))).backward()
    for name, parameter in part.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@each_backbone
def test_declared_depth(cls, arguments):
    model = cls(**arguments)
    depths, counts = {}, set()
    for name, _ in model.named_parameters():
        depth, count = model.get_layer_depth(f'backbone.{name}', 'backbone.')
        depths[name] = depth
        counts.add(count)
        assert (depth, count) == model.get_layer_depth(name)
    arch = arguments['arch']
    blocks = sum(arch['depths']) if 'depths' in arch else arch['depth']
    assert counts == {blocks + 2}
    assert set(depths.values()) >= set(range(blocks + 1))
    for name, depth in depths.items():
        assert (depth == 0) == name.startswith(('patch_embed', 'pos_embed')), name
    assert model.get_layer_depth('decode_head.conv.weight', 'backbone.') == (blocks + 1, blocks + 2)


@each_backbone
def test_conduct_in_a_toolkit(cls, arguments):
    with pytest.raises(TypeError, match="unknown argument 'out_indice'; did you mean 'out_indices"):
        cls(**arguments, out_indice=(0,))
    model = cls(**arguments)
    assert not hasattr(model, 'num_classes') and isinstance(model, nn.Module)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_cfg = None
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_base_class_asks_for_its_parts():
    with pytest.raises(NotImplementedError):
        DenseBackbone().freeze()
