"""What the command line does to a config."""
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmhybrid.engine.config import (
    apply_amp,
    apply_auto_scale_lr,
    apply_pretrained,
    apply_resume,
    ensure_hooks,
    load_config,
    redirect_data,
)
from mmhybrid.errors import UserError
from mmhybrid.registry import MODELS

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
COCO = str(CONFIGS / 'cascade_mambavision_t_coco.py')
ADE = str(CONFIGS / 'upernet_mambavision_t_ade20k.py')


def texts(node):
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from texts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from texts(value)


@pytest.mark.parametrize('path, old', [(COCO, 'data/coco'), (ADE, 'data/ade')])
@pytest.mark.parametrize('through', ['flag', 'options'])
def test_data_root_reaches_everything(path, old, through):
    if through == 'flag':
        cfg, _ = load_config(path, data_root='/somewhere/else')
    else:
        cfg, _ = load_config(path, dict(data_root='/somewhere/else'))
    content = cfg.to_dict()
    assert not [text for text in texts(content) if text.startswith(old)]
    for split in ('train', 'val', 'test'):
        assert content[f'{split}_dataloader']['dataset']['data_root'] == '/somewhere/else/'
    if path == COCO:
        for split in ('val', 'test'):
            assert content[f'{split}_evaluator']['ann_file'] == (
                '/somewhere/else/annotations/instances_val2017.json')


def test_data_root_below_the_old_one_is_moved_once():
    shared = dict(type='D', data_root='data/')
    cfg = Config(dict(data_root='data/', val_dataloader=dict(dataset=shared),
                      test_dataloader=dict(dataset=shared)))
    redirect_data(cfg, 'data/mini')
    assert cfg.val_dataloader.dataset.data_root == 'data/mini/'
    assert cfg.test_dataloader.dataset.data_root == 'data/mini/'


def test_data_root_in_nested_data_sets_and_lists():
    cfg = Config(dict(
        data_root='data/x',
        train_dataloader=dict(dataset=dict(type='Repeat', dataset=dict(type='Concat', datasets=[
            dict(type='D', data_root='data/x', ann_file='data/x/a.json'),
            dict(type='D', data_root='data/xyz')]))),
        test_evaluator=[dict(type='E', ann_file='./data/x/b.json')]))
    assert redirect_data(cfg, '/n/') == 4
    first, second = cfg.train_dataloader.dataset.dataset.datasets
    assert (first.data_root, first.ann_file) == ('/n', '/n/a.json')
    assert second.data_root == 'data/xyz'  # another folder that begins alike
    assert cfg.test_evaluator[0].ann_file == '/n/b.json'


def test_data_root_without_the_variable():
    cfg = Config(dict(train_dataloader=dict(dataset=dict(data_root='a/b')),
                      val_evaluator=dict(ann_file='a/b/c.json')))
    redirect_data(cfg, 'z')
    assert cfg.val_evaluator.ann_file == 'z/c.json'
    cfg.val_dataloader = dict(dataset=dict(data_root='q'))
    cfg.pop('data_root')
    with pytest.raises(UserError, match='Found: q, z'):
        redirect_data(cfg, 'y')


def test_explicit_options_come_after_the_redirection():
    cfg, _ = load_config(COCO, {'data_root': '/n', 'val_evaluator.ann_file': 'data/coco/mine.json'})
    assert cfg.val_evaluator.ann_file == 'data/coco/mine.json'


def test_config_mistakes():
    with pytest.raises(UserError, match='Did you mean .*cascade_mambavision_t_coco.py'):
        load_config(str(CONFIGS / 'cascade_mambavision_tiny_coco.py'))
    with pytest.raises(UserError, match='Give one of them'):
        load_config(COCO, dict(data_root='a'), data_root='b')
    with pytest.raises(UserError, match="nothing reads this. Did you mean 'model'"):
        load_config(COCO, {'modle.backbone.arch': 'small'})


def test_broken_config(tmp_path):
    path = tmp_path / 'broken.py'
    path.write_text('model = dict(\n')
    with pytest.raises(UserError, match='broken.py is not valid Python, line 1'):
        load_config(str(path))


def test_work_dir():
    assert load_config(COCO)[0].work_dir == 'work_dirs/cascade_mambavision_t_coco'
    assert load_config(COCO, dict(work_dir='a'))[0].work_dir == 'a'
    assert load_config(COCO, dict(work_dir='a'), work_dir='b')[0].work_dir == 'b'


def test_pretrained(tmp_path):
    cfg, _ = load_config(COCO)
    warning, = apply_pretrained(cfg, None)
    for part in ('random weights', 'mambavision_tiny_1k.pth.tar', 'https://', 'CC-BY-NC-SA',
                 '--pretrained mambavision-t-1k '):
        assert part in warning
    assert cfg.model.backbone.get('init_cfg') is None
    with pytest.raises(UserError, match='nowhere.pth does not exist'):
        apply_pretrained(cfg, 'nowhere.pth')
    file = tmp_path / 'weights.pth'
    file.touch()
    assert apply_pretrained(cfg, str(file)) == []
    assert cfg.pretrained == str(file)
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=str(file))
    for source in ('mambavision-t-1k', 'hf://org/repository', 'https://example.org/w.pth'):
        assert apply_pretrained(cfg, source) == []
        assert cfg.model.backbone.init_cfg.checkpoint == source


WINDOWS = dict(depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=[2, 2, 2, 2])


@pytest.mark.parametrize('backbone, argument', [
    (dict(type='MM_mamba_vision', dim=8, in_dim=8, **WINDOWS), 'pretrained'),
    (dict(type='mmhybrid.MM_VSSM', dims=8, depths=[1, 1, 1, 1], pretrained='old.pth'),
     'pretrained'),
    (dict(type='MM_LocalVSSM', dims=8, depths=[1] * 4, directions=[['h']] * 4), 'pretrained'),
    (dict(type='MM_LocalVim', embed_dim=8, depth=1, out_indices=[0], directions=[['h']]),
     'pretrained_ckpt'),
    (dict(type='VisionMambaSeg', embed_dim=8, depth=4, out_indices=[0, 1, 2, 3]), 'pretrained'),
    (dict(type='Vim', arch=dict(dim=8, depth=4), out_indices=[0, 1, 2, 3]), None),
])
def test_pretrained_is_loaded_by_every_kind_of_backbone(tmp_path, backbone, argument):
    # The released classes' configs inherit an init_cfg that these classes accept without effect.
    inherited = dict(init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'))
    cfg = Config(dict(model=dict(pretrained='old.pth', backbone=dict(backbone))))
    file = tmp_path / 'weights.pth'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        source = MODELS.build({**backbone, 'pretrained': None} if 'pretrained' in backbone
                              else dict(backbone))
        torch.save(source.state_dict(), file)
        assert apply_pretrained(cfg, str(file)) == []
        assert cfg.model.pretrained is None
        assert cfg.model.backbone.get('pretrained') == (
            str(file) if argument == 'pretrained' else None)
        if argument is not None:
            cfg.model.backbone.update(inherited)
        model = MODELS.build(cfg.model.backbone)
        model.init_weights()
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_an_init_cfg_without_effect_is_no_start():
    cfg = Config(dict(model=dict(backbone=dict(
        type='MM_mamba_vision', init_cfg=dict(type='Pretrained', checkpoint='x')))))
    assert 'random weights' in apply_pretrained(cfg, None)[0]
    cfg.model.backbone.pretrained = 'x'
    assert apply_pretrained(cfg, None) == []


def test_pretrained_as_an_option(tmp_path):
    file = tmp_path / 'weights.pth'
    file.touch()
    cfg, _ = load_config(COCO, dict(pretrained=str(file)))
    apply_pretrained(cfg, None)
    assert cfg.model.backbone.init_cfg.checkpoint == str(file)


@pytest.mark.parametrize('options', [dict(load_from='a.pth'), dict(resume=True)])
def test_no_warning_when_weights_come_from_elsewhere(options):
    cfg, _ = load_config(COCO, options)
    assert apply_pretrained(cfg, None) == []


def test_amp():
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD'))))
    apply_amp(cfg, False)
    assert 'type' not in cfg.optim_wrapper
    apply_amp(cfg, True)
    assert cfg.optim_wrapper.type == 'mmhybrid.AmpOptimWrapper'
    assert cfg.optim_wrapper.dtype == 'float16' and cfg.optim_wrapper.loss_scale == 'dynamic'
    cfg.optim_wrapper.dtype = 'bfloat16'
    apply_amp(cfg, True)
    assert cfg.optim_wrapper.dtype == 'bfloat16'
    cfg.optim_wrapper.dtype = None
    apply_amp(cfg, True)
    assert cfg.optim_wrapper.dtype == 'float16'
    cfg.optim_wrapper.type = 'ApexOptimWrapper'
    with pytest.raises(UserError, match='ApexOptimWrapper'):
        apply_amp(cfg, True)


def test_auto_scale_lr():
    cfg, _ = load_config(COCO)
    apply_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable
    with pytest.raises(UserError, match='base_batch_size'):
        apply_auto_scale_lr(Config(dict()))


def test_resume(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path)))
    assert apply_resume(cfg, None) == [] and 'resume' not in cfg
    note, = apply_resume(cfg, 'auto')
    assert 'no checkpoint yet' in note and cfg.resume is False
    (tmp_path / 'last_checkpoint').write_text('/gone/epoch_1.pth')
    with pytest.raises(UserError, match='/gone/epoch_1.pth'):
        apply_resume(cfg, 'auto')
    checkpoint = dict(meta=dict(epoch=1, iter=6), state_dict={})
    torch.save(checkpoint, tmp_path / 'epoch_1.pth')  # the work directory was moved
    assert apply_resume(cfg, 'auto') == []
    assert cfg.resume is True and cfg.load_from == str(tmp_path / 'epoch_1.pth')
    (tmp_path / 'original').mkdir()
    # or copied: go on with its own file
    torch.save(checkpoint, tmp_path / 'original' / 'epoch_1.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'original' / 'epoch_1.pth'))
    apply_resume(cfg, 'auto')
    assert cfg.load_from == str(tmp_path / 'epoch_1.pth')
    apply_resume(cfg, 'other.pth')
    assert cfg.load_from == 'other.pth'


def test_hooks_are_added_once():
    cfg = Config(dict(custom_hooks=[dict(type='mmhybrid.RandomStateHook'), dict(type='EMAHook')]))
    for _ in range(2):
        ensure_hooks(cfg, 'mmhybrid.RandomStateHook', 'mmhybrid.ProgressHook')
    assert [hook['type'] for hook in cfg.custom_hooks] == [
        'mmhybrid.RandomStateHook', 'EMAHook', 'mmhybrid.ProgressHook']
