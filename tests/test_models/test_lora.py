"""Adapters: whoever reads a weight sees them, and nothing else of a backbone changes or learns."""

import copy
import pickle
import re

import pytest
import torch
from backbone_cases import CASES, build, loss_of
from fill import make_input
from graph_stand_in import Recorder
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmhybrid import models
from mmhybrid.engine.graphs import use_cuda_graphs
from mmhybrid.layers import weight_casts
from mmhybrid.models import lora as lora_module
from mmhybrid.models.lora import TARGETS, Lora
from mmhybrid.weights import WeightsError
from mmhybrid.weights.adapters import adapters_of, fit_adapters, merge_adapters

PICTURE = (2, 3, 64, 48)
PLAIN = dict(arch=dict(dim=16, depth=3), out_indices=(0, 1, 2), pyramid=False, img_size=64)
NORMS = nn.LayerNorm, nn.RMSNorm, _NormBase
each_backbone = pytest.mark.parametrize(('cls', 'arguments'), CASES)


def adapted(cls, arguments, grown=True, **settings):
    """A backbone with the weights of ``build`` and adapters that have learned something."""
    settings = dict(rank=4) | settings
    model = cls(**arguments, lora=settings)
    model.load_state_dict(build(cls, arguments).state_dict())
    if grown:
        grow(model)
    return model


@torch.no_grad()
def grow(model):
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith('lora_B'):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05)


@torch.no_grad()
def maps_of(model, seed=0):
    training = model.training
    found = model.eval()(make_input(seed, PICTURE))
    model.train(training)
    return found


def close(some, others):
    for a, b in zip(some, others, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1, float(b.abs().max()))


def gradients(model):
    torch.manual_seed(0)
    loss_of(model(make_input(0, PICTURE))).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@each_backbone
def test_maps_and_files(cls, arguments):
    plain = build(cls, arguments)
    before = maps_of(plain)
    model = adapted(cls, arguments, grown=False)
    close(maps_of(model), before)
    grow(model)
    found = maps_of(model)
    assert float((found[-1] - before[-1]).abs().max()) > 0.1  # what follows is no matter of 0
    # merged, and merged while it is loaded, strictly
    for state in (merge_adapters(model.state_dict()), model.state_dict()):
        plain.load_state_dict(state)
        close(maps_of(plain), found)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(maps_of(twin), found)
    other = cls(**arguments, lora=dict(rank=2, alpha=3))  # has others: those of the file are merged
    other.load_state_dict(model.state_dict())
    close(maps_of(other), found)
    model.load_state_dict(plain.state_dict())  # an ordinary file puts them out of force
    close(maps_of(model), found)
    assert not any(t.any() for name, t in model.state_dict().items() if name.endswith('lora_B'))


@each_backbone
def test_what_learns(cls, arguments):
    model = adapted(cls, arguments).train()
    found = gradients(model)
    for path, owner in model.named_modules():
        for leaf, p in owner.named_parameters(recurse=False):
            name = f'{path}.{leaf}'.lstrip('.')
            learns = path != 'norm_f' and (  # which Vim does not use
                isinstance(owner, NORMS) or bool(re.search(r'_lora_[AB]$|^fpn\d', name)))
            assert p.requires_grad == learns == (name in found), name
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    targets = {re.sub(r'(_b|_\d+|_weight)$', '', name.removesuffix('.weight').rpartition('.')[2])
               for name in adapters_of(model.state_dict())}
    wanted = {'MambaVision': {'qkv', 'proj', 'in_proj', 'x_proj', 'dt_proj', 'out_proj', 'fc1',
                              'fc2'},
              'Vim': {'in_proj', 'x_proj', 'dt_proj', 'out_proj'}}
    wanted['LocalVim'] = wanted['Vim']
    if cls.__name__ in wanted:
        assert targets == wanted[cls.__name__]
    else:
        assert targets >= {'in_proj', 'x_proj', 'dt_projs', 'out_proj'}


@each_backbone
def test_recomputing_changes_nothing(cls, arguments):
    """With norms that stay, what comes into the first block with adapters asks for no gradient."""
    results = []
    for with_cp in (False, True):
        model = adapted(cls, dict(arguments, with_cp=with_cp), norms=False).train()
        runs = []
        for name, module in model.named_modules():
            if name.endswith(('.in_proj', '.qkv')):
                module.register_forward_hook(lambda *_, name=name, runs=runs: runs.append(name))
        results.append(gradients(model))
        assert {runs.count(name) for name in runs} == {2 if with_cp else 1}
    same(*results[::-1])


@pytest.mark.parametrize('with_cp', [False, True])
def test_mixed_precision(with_cp, monkeypatch):
    """Adapters are added in float32, beside weights that are cast together and one by one."""
    monkeypatch.setattr(weight_casts, 'KINDS', {'cpu'})
    found, model = [], models.Vim(**PLAIN, lora=dict(rank=4), with_cp=with_cp, drop_path_rate=0.)
    grow(model.train())
    for together in '01':
        monkeypatch.setenv(weight_casts.VARIABLE, together)
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            found.append(gradients(model))
            assert model.layers[0].mixer.in_proj.weight.dtype == torch.float32
    same(*found[::-1])


def test_a_young_adapter_is_not_lost_in_half_precision():
    model = models.Vim(**PLAIN, lora=dict(rank=1, alpha=1))
    layer = model.layers[0].mixer.in_proj
    with torch.no_grad():
        layer._parameters['weight'].uniform_(1, 2)
        layer.weight_lora_A.fill_(1.)
        layer.weight_lora_B.fill_(2 ** -11)  # less than half of the last digit of bfloat16
        with torch.autocast('cpu', torch.bfloat16):
            change = layer.weight.bfloat16().float() - layer._parameters['weight'].bfloat16()
    assert float(change.mean()) == pytest.approx(2 ** -11, rel=0.3)


def test_graphs_replay_adapters():
    net = models.MambaVision(dict(
        dim=8, stem_width=4, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 2), window_size=(8, 8, 4, 2)),
        lora=dict(rank=2), drop_path_rate=0.).train()
    grow(net)
    eager = copy.deepcopy(net)
    use_cuda_graphs(net, recorder=Recorder())
    for seed in range(4):  # of which the later ones are replayed, with adapters that have moved
        x, results = make_input(seed, (1, 3, 32, 32)), []
        for model in (eager, net):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
            loss = loss_of(model(x))
            loss.backward()
            optimizer.step()
            results.append((loss.item(), model.levels[3].blocks[0].mixer.x_proj.weight))
        assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.slow
def test_one_graph_of_the_compiler():
    torch._dynamo.reset()
    model = models.VMamba(dict(dim=8, depths=(1, 1, 1, 1)), lora=dict(rank=2), drop_path_rate=0.)
    grow(model.train())
    expected = gradients(model)
    model.zero_grad()
    same(gradients_of_compiled(model), expected)
    torch._dynamo.reset()


def gradients_of_compiled(model):
    compiled = torch.compile(model, backend='eager', fullgraph=True, dynamic=False)
    loss_of(compiled(make_input(0, PICTURE))).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- settings -------------------------------------------------------------------------------------

# Three percent of the weights of full-size models; the two of seven million values need rank 4.
SHARES = [
    ('MambaVision', 'tiny2', 8), ('VMamba', 'v0_small', 8), ('LocalVMamba', 'small', 8),
    ('Vim', 'small', 8), ('Vim', 'tiny', 4), ('LocalVim', 'small', 8), ('LocalVim', 'tiny', 4)]


@pytest.mark.parametrize(('name', 'arch', 'rank'), SHARES)
def test_little_learns(name, arch, rank):
    with torch.device('meta'):
        model = getattr(models, name)(arch, lora=dict(rank=rank))
    new = re.compile(r'(outnorm|fpn)')
    sizes = {n: (p.numel(), p.requires_grad) for n, p in model.named_parameters() if
             not new.match(n)}
    learns = sum(size for size, wanted in sizes.values() if wanted)
    whole = sum(size for n, (size, _) in sizes.items() if '_lora_' not in n)
    assert 0.005 * whole < learns < 0.03 * whole


def test_norms_dynamics_and_others():
    def learning(**settings):
        model = copy.deepcopy(models.Vim(**PLAIN, lora=dict(rank=2, **settings))).train()
        return {name for name, p in model.named_parameters() if p.requires_grad}

    least = learning(norms=False)
    assert least and all(re.search('_lora_[AB]$', name) for name in least)
    assert {re.sub(r'.*\.', '', name) for name in learning() - least} == {'weight'}
    assert all('.norm.' in name for name in learning() - least)
    moved = {name.partition('.mixer.')[2] for name in learning(dynamics=True) - learning()}
    assert moved == {'A_log', 'A_b_log', 'D', 'D_b', 'dt_proj.bias', 'dt_proj_b.bias'}
    assert learning(train=['pos_embed', 'patch_embed']) - learning() == {
        'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias'}
    few = learning(norms=False, targets=['x_proj'])
    assert {name.partition('.mixer.')[2] for name in few} == {
        f'{name}.weight_lora_{part}' for name in ('x_proj', 'x_proj_b') for part in 'AB'}


@pytest.mark.parametrize('wanted', [False, True])
def test_dynamics_of_maps(wanted):
    model = models.VMamba(dict(dim=8, depths=(1, 1, 1, 1)),
                          lora=dict(rank=2, dynamics=wanted))
    learns = {name.rpartition('.')[2] for name, p in model.named_parameters()
              if p.requires_grad and '.op.' in name and '_lora_' not in name}
    assert learns - {'weight', 'bias'} == (
        {'A_logs', 'Ds', 'dt_projs_bias'} if wanted else set())


def test_frozen_and_unused_parts_have_no_adapters():
    model = models.VMamba(dict(dim=8, depths=(1, 1, 1, 1)), lora=dict(rank=2), frozen_stages=1,
                          out_indices=(0, 2))
    stages = {name.split('.')[1] for name in adapters_of(model.state_dict())}
    assert stages == {'1', '2'}
    with pytest.raises(ValueError, match='or all of them are frozen .frozen_stages.; leave lora'):
        models.VMamba(dict(dim=8, depths=(1, 1, 1, 1)), lora=dict(rank=2), frozen_stages=4)


@pytest.mark.parametrize('name', ['MambaVisionClassifier', 'VMambaClassifier', 'VimClassifier',
                                  'LocalVimClassifier', 'LocalVMambaClassifier'])
def test_the_head_of_a_classifier_learns(name):
    arch = dict(dim=16, depth=2) if 'Vim' in name else dict(dim=16, depths=(1, 1, 1, 1))
    if name == 'MambaVisionClassifier':
        arch.update(stem_width=4, num_heads=(1, 1, 2, 2), window_size=(8, 8, 4, 2))
    more = dict(directions='unsearched') if name.startswith('Local') else {}
    more |= dict(img_size=32) if 'Vim' in name else {}
    model = getattr(models, name)(arch, num_classes=3, lora=dict(rank=2), **more)
    for _ in range(2):  # when it is built, and when a training begins
        model(make_input(0, (2, 3, 32, 32))).square().sum().backward()
        head = {n for n, p in model.named_parameters() if 'head' in n and p.grad is not None}
        assert len(head) == 2
        still = [n for n, p in model.named_parameters() if p.grad is None]
        assert any(n.endswith('in_proj.weight') for n in still)
        model.zero_grad()
        model.train()


def test_modes_stay_what_they_are():
    """Statistics of BatchNorm go on counting, unless they would not without adapters either."""
    arch = dict(dim=8, stem_width=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
                window_size=(8, 8, 4, 2))
    for norms in (True, False):
        for norm_eval in (False, True):
            model = models.MambaVision(arch, lora=dict(rank=2, norms=norms), norm_eval=norm_eval)
            before = copy.deepcopy(dict(model.train().named_buffers()))
            model(make_input(0, PICTURE))
            moved = {name for name, b in model.named_buffers() if not torch.equal(b, before[name])}
            assert bool(moved) != norm_eval
            assert norm_eval or len(moved) == len([n for n in before if 'lora' not in n])


def test_heads_start_as_without():
    def weight(**settings):
        torch.manual_seed(0)
        models.Vim(**PLAIN, **settings)
        return torch.rand(3)

    assert torch.equal(weight(), weight(lora=dict(rank=2)))


@pytest.mark.parametrize(('settings', 'error', 'words'), [
    (8, TypeError, 'got lora=8, expected a dictionary such as dict.rank=8.'),
    (dict(), TypeError, 'lora has no rank'),
    (dict(rank=8, alphas=2), TypeError, "unknown key 'alphas'; did you mean 'alpha'"),
    (dict(rank=0), ValueError, 'lora rank 0, expected an integer of at least 1'),
    (dict(rank=2.5), ValueError, 'lora rank 2.5'),
    (dict(rank=2, alpha=0), ValueError, 'lora alpha 0, expected a number above 0'),
    (dict(rank=2, targets='qkv'), TypeError, "lora targets 'qkv', expected a list of names"),
    (dict(rank=2, targets=['qvk']), ValueError, "got 'qvk' in lora targets; did you mean 'qkv'"),
    (dict(rank=2, targets=['qkv']), ValueError, 'Vim has none of the layers that lora adapts'),
    (dict(rank=2, targets=[]), ValueError, 'Vim has none of the layers that lora adapts'),
    (dict(rank=2, norms='yes'), TypeError, "lora norms 'yes', expected True or False"),
    (dict(rank=2, train=['pos_embedding']), ValueError,
     "'pos_embedding' in lora train, .*did you mean 'pos_embed'"),
    (dict(rank=32), ValueError, 'rank 32, but the weights of layers.0.mixer have rank 32'),
])
def test_wrong_settings(settings, error, words):
    with pytest.raises(error, match=words):
        models.Vim(**PLAIN, lora=settings)


def test_narrow_weights_have_smaller_ranks():
    with torch.device('meta'):
        ranks = adapters_of(models.Vim('small', lora=dict(rank=8)).state_dict())
    mixer = {name.removeprefix('layers.0.mixer.'): rank for name, rank in ranks.items()
             if name.startswith('layers.0.')}
    assert mixer == {'in_proj.weight': 8, 'out_proj.weight': 8, 'x_proj.weight': 2,
                     'x_proj_b.weight': 2, 'dt_proj.weight': 1, 'dt_proj_b.weight': 1}
    assert str(Lora.of(dict(rank=8, norms=False))) == 'rank=8, norms=False'
    assert Lora(8).scale == 2 and Lora(8, alpha=4).scale == 0.5
    assert Lora(8).targets == tuple(TARGETS)


# --- files ----------------------------------------------------------------------------------------

def file_of(weight=(6, 4), down=(2, 4), up=(6, 2), scale=2.0):
    return {'a.weight': torch.randn(weight), 'a.weight_lora_A': torch.randn(down),
            'a.weight_lora_B': torch.randn(up), 'lora_scale': torch.tensor(scale)}


def test_merging():
    state = file_of()
    merged = merge_adapters(state)
    assert set(merged) == {'a.weight'}
    torch.testing.assert_close(merged['a.weight'], state['a.weight'] + 2 * state[
        'a.weight_lora_B'] @ state['a.weight_lora_A'])
    half = {name: tensor.half() for name, tensor in state.items()}
    assert merge_adapters(half)['a.weight'].dtype == torch.float16
    stacked = file_of((3, 6, 4), (3, 2, 4), (3, 6, 2))
    assert merge_adapters(stacked)['a.weight'].shape == (3, 6, 4)
    two = {f'{part}.{name}': tensor for part, factor in (('one', 1.), ('two', 5.))
           for name, tensor in (state | dict(lora_scale=torch.tensor(factor))).items()}
    torch.testing.assert_close(merge_adapters(two)['two.a.weight'], state['a.weight'] + 5 * state[
        'a.weight_lora_B'] @ state['a.weight_lora_A'])
    plain = {'a.weight': torch.zeros(2), 'lora_scales': torch.zeros(1)}
    assert fit_adapters(plain, plain) == plain == merge_adapters(plain)


@pytest.mark.parametrize('lost', ['a.weight', 'a.weight_lora_A', 'a.weight_lora_B', 'lora_scale'])
def test_files_that_are_not_whole(lost):
    state = file_of()
    del state[lost]
    with pytest.raises(WeightsError, match=f'a.weight has an adapter, but the file has no {lost}'):
        merge_adapters(state)


@pytest.mark.parametrize('shapes', [
    dict(down=(2, 5)), dict(up=(6, 3)), dict(up=(5, 2)), dict(weight=(6,)), dict(down=(4,)),
    dict(weight=()), dict(scale=[1., 2.]), dict(weight=(1, 6, 4))], ids=str)
def test_files_of_other_shapes(shapes):
    with pytest.raises(WeightsError, match='the adapter of a.weight has the shapes'):
        merge_adapters(file_of(**shapes))


def test_classes_are_made_once():
    first, second = (models.Vim(**PLAIN, lora=dict(rank=2)) for _ in range(2))
    assert type(first.layers[0].mixer.in_proj) is type(second.layers[1].mixer.in_proj)
    assert lora_module._adapted.cache_info().currsize < 20
