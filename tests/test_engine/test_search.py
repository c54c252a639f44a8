"""Choosing directions, and who trains the alphas."""
import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmhybrid.engine.search import (
    DirectionSearchHook,
    alphas_table,
    check_pick,
    choose_directions,
    direction_weights,
    make_supernet,
    supernet_blocks,
)
from mmhybrid.errors import UserError
from mmhybrid.models import LocalVim, LocalVMamba
from mmhybrid.ops.cross_scan import DIRECTIONS


def config(model):
    return Config(dict(default_scope='mmengine', model=model), cfg_text='#', filename='mine.py')


@pytest.mark.parametrize('alphas, pick, expected', [
    ([1, 2, 3, 4, 5, 6, 7, 8], 4, 'w2 w2_flip w7 w7_flip'),
    ([8, 1, 7, 2, 6, 3, 5, 4], 4, 'h v w2 w7'),  # in the order of the eight, not of the alphas
    ([0] * 8, 4, 'h h_flip v v_flip'),  # of equals the first
    ([0, 0, 1, 0, 0, 0, 0, 1], 4, 'h h_flip v w7_flip'),
    ([-3, -1, -2, -1, -1, -5, -1, -1], 4, 'h_flip v_flip w2 w7'),
    ([0, 0, 0, 0, 0, 0, 0, 1e-9], 1, 'w7_flip'),
    ([3, 1, 4, 1, 5, 9, 2, 6], 8, ' '.join(DIRECTIONS)),
])
def test_choice(alphas, pick, expected):
    assert choose_directions(alphas, pick) == tuple(expected.split())
    # adding a constant changes neither shares nor choice
    shifted = [value + 5 for value in alphas]
    assert choose_directions(shifted, pick) == tuple(expected.split())
    assert direction_weights(shifted) == pytest.approx(direction_weights(alphas))
    assert sum(direction_weights(alphas)) == pytest.approx(1)


@pytest.mark.parametrize('pick', [0, 9, -1, 2.0, True, '4'])
def test_pick_out_of_range(pick):
    with pytest.raises(UserError, match='1 to 8 directions'):
        check_pick(pick)
    with pytest.raises(UserError, match='1 to 8 directions'):
        DirectionSearchHook(pick=pick)


def test_table():
    head, first, second = alphas_table(
        {'layers.0': [0] * 8, 'layers.10': [0, 0, 0, 0, 0, 0, 0, 3]}, 2).splitlines()
    assert head.split() == ['block', *DIRECTIONS]
    assert first.split() == ['layers.0', '12.50', '*', '12.50', '*', *['12.50'] * 6]
    assert second.split() == ['layers.10', '3.69', '*', *['3.69'] * 6, '74.16', '*']
    # numbers stand under the ends of their names
    assert all(head.index(name) + len(name) + 2 >= first.index('12.50') for name in DIRECTIONS)


@pytest.mark.parametrize('backbone, blocks', [
    (dict(type='LocalVMamba', arch='tiny', init_cfg=dict(type='Pretrained', checkpoint='x.pth')),
     [f'layers.{i}.blocks.{j}' for i, depth in enumerate((2, 2, 9, 2)) for j in range(depth)]),
    (dict(type='mmhybrid.LocalVim', arch='tiny'), [f'layers.{i}' for i in range(20)]),
    (dict(type='MM_LocalVSSM', directions=[['h']] * 4, depths=[1] * 4, dims=16, pretrained='x.pth'),
     [f'layers.{i}.blocks.0' for i in range(4)]),
    (dict(type='MM_LocalVim', depth=3, embed_dim=16, out_indices=[2], directions=[['h']] * 3,
          pretrained_ckpt='x.pth'), [f'layers.{i}' for i in range(3)]),
    (dict(type='LocalVimClassifier', arch=dict(dim=8, depth=2)), ['layers.0', 'layers.1']),
    # no lists are published for these depths, so without a search it would not build
    (dict(type='LocalVMambaClassifier', arch=dict(dim=8, depths=(1, 1, 1, 1))),
     [f'layers.{i}.blocks.0' for i in range(4)]),
])
def test_every_backbone_with_directions_becomes_a_supernet(backbone, blocks):
    cfg = config(dict(backbone=backbone))
    assert supernet_blocks(cfg) == (blocks, [])
    weights = [key for key in ('init_cfg', 'pretrained', 'pretrained_ckpt') if key in backbone]
    notes = make_supernet(cfg)
    assert [f'model.backbone.{key} of the config is left out' in note
            for key, note in zip(weights, notes, strict=True)] == [True] * len(weights)
    assert cfg.model.backbone.directions is None and not set(weights) & set(cfg.model.backbone)


def test_blocks_that_do_not_run_are_told():
    backbone = dict(type='LocalVim', arch=dict(dim=8, depth=4), out_indices=[1])
    blocks, notes = supernet_blocks(config(dict(backbone=backbone)))
    assert len(blocks) == 4
    assert notes[0].startswith('layers.2, layers.3: not run')
    with pytest.raises(UserError, match='frozen_stages=2 keeps layers.0, layers.1'):
        supernet_blocks(config(dict(backbone=dict(backbone, frozen_stages=2))))


@pytest.mark.parametrize('model, expected', [
    (dict(), 'no model.backbone'),
    (dict(backbone=dict(type='VMamba')), 'is VMamba, whose scan directions cannot be searched'),
    (dict(backbone=dict(type='Local')), 'is Local, whose'),
    (dict(backbone=dict()), 'is None, whose'),
    (dict(backbone=dict(type='LocalVim', depth=3)), "unknown argument 'depth'"),
])
def test_backbones_that_cannot_be_searched(model, expected):
    with pytest.raises(UserError, match=expected):
        supernet_blocks(config(model))


def record(tmp_path, iteration, text):
    """What the hook leaves in the file when training starts at this iteration."""
    path = tmp_path / 'alphas.jsonl'
    path.write_text(text)
    model = Model(LocalVim(dict(dim=8, depth=1, state_dim=2), directions=None, out_indices=(0,)))
    shown = []
    DirectionSearchHook().before_train(SimpleNamespace(
        iter=iteration, epoch=0, work_dir=str(tmp_path), model=model,
        visualizer=SimpleNamespace(add_scalars=lambda scalars, step: shown.append(step))))
    lines = path.read_text().splitlines()
    assert shown in ([], [iteration])
    return lines, len(shown)


def test_record_begins_anew_or_goes_on(tmp_path):
    old = ''.join(f'{{"iter": {i}}}\n' for i in (0, 200, 400, 600))
    lines, new = record(tmp_path, 0, old)  # another search in the same folder
    assert new and len(lines) == 1 and json.loads(lines[0])['iter'] == 0
    lines, new = record(tmp_path, 400, old + '{"iter": 8')  # stopped while it wrote
    assert not new and lines == old.splitlines()[:3]
    lines, new = record(tmp_path, 500, old)  # a checkpoint between two records
    assert new and lines[:3] == old.splitlines()[:3] and json.loads(lines[3])['iter'] == 500
    assert list(json.loads(lines[3])['alphas']) == ['layers.0']


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


@pytest.mark.parametrize('policy', [None, 'published', 'ssm', '1d'])
@pytest.mark.parametrize('make', [
    lambda: LocalVMamba(dict(dim=8, depths=(1, 1, 1, 1), state_dim=2), directions=None),
    lambda: LocalVim(dict(dim=8, depth=2, state_dim=2), directions=None, out_indices=(1,))])
def test_alphas_learn_and_decay_like_matrices(policy, make):
    """The published search gives them the learning rate and the weight decay of the weights."""
    model = Model(make())
    wrapper = build_optim_wrapper(model, dict(
        type='OptimWrapper', constructor='mmhybrid.HybridOptimWrapperConstructor',
        paramwise_cfg=dict(no_decay=policy),
        optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.04)))
    groups = {id(param): group for group in wrapper.optimizer.param_groups
              for param in group['params']}
    alphas = [param for name, param in model.named_parameters() if 'multi_scan.weights' in name]
    assert len(alphas) == (4 if isinstance(model.backbone, LocalVMamba) else 2)
    for param in alphas:
        assert param.shape == (8, 1, 1, 1) and param.requires_grad
        assert (groups[id(param)]['lr'], groups[id(param)]['weight_decay']) == (0.001, 0.04)


@pytest.mark.parametrize('make', [
    lambda: LocalVMamba(dict(dim=8, depths=(1, 1, 1, 1), state_dim=2), directions=None),
    lambda: LocalVim(dict(dim=8, depth=2, state_dim=2), directions=None, out_indices=(1,))])
def test_shares_mix_normalised_directions(make):
    """With one share at 1 a supernet is the network of that direction alone, normalised."""
    net = make().eval()
    x = torch.randn(1, 3, 64, 48)
    alphas = [p for name, p in net.named_parameters() if 'multi_scan.weights' in name]
    outputs = []
    with torch.no_grad():
        for k in (0, 4):
            for alpha in alphas:
                alpha.zero_()
                alpha[k] = 200.0
            outputs.append(net(x)[-1])
            for alpha in alphas:
                alpha.add_(7.0)  # shares do not change
            torch.testing.assert_close(net(x)[-1], outputs[-1])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
