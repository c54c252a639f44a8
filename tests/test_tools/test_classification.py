"""Classification from folders of images: train, resume, test, search; and the recipes."""
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch.utils._pytree import tree_leaves

from mmhybrid import cli
from mmhybrid.cli.actions.running import run_command
from mmhybrid.cli.actions.search import search
from mmhybrid.cli.actions.training import test as run_test
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.layers import DropPath

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'classification'
CONFIG = """_base_ = {base!r}
model = dict(
    num_classes=3, mixing=None, label_smoothing=0.0,
    backbone=dict(arch=dict(_delete_=True, dim=16, depth=2), img_size=32, directions='unsearched'))
train_pipeline = [dict(type='mmhybrid.LoadPicture'),
                  dict(type='mmhybrid.TimmTransform', is_training=True, input_size=32)]
test_pipeline = [dict(type='mmhybrid.LoadPicture'),
                 dict(type='mmhybrid.TimmTransform', input_size=32)]
local = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=6, dataset=dict(pipeline=train_pipeline), **local)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline), **local)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=6, val_interval=6)
param_scheduler = []
optim_wrapper = dict(optimizer=dict(lr=5e-3))
randomness = dict(seed=2)
default_hooks = dict(checkpoint=dict(interval=3))
"""


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """A config and a set of three colours, named so that their order is not that of RGB."""
    folder = tmp_path_factory.mktemp('cls')
    rng = np.random.RandomState(0)
    for split, count in (('train', 8), ('val', 4)):
        for channel, name in enumerate(('red', 'green', 'blue')):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.randint(0, 120, (40, 48, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / split / name / f'{number}.png')
    config = folder / 'toy.py'
    config.write_text(CONFIG.format(base=str(CONFIGS / 'localvim_t_imagenet.py')))
    return config, folder


@pytest.fixture(scope='module')
def trained(toy):
    config, folder = toy
    run_train([str(config), '--data-root', str(folder), '--work-dir', str(folder / 'w')])
    return config, folder, folder / 'w'


def test_too_few_images_for_a_batch(toy, tmp_path, capfd):
    config, folder = toy
    status = run_command(run_train, [
        str(config), '--data-root', str(folder), '--work-dir', str(tmp_path), '--cfg-options',
        'train_dataloader.batch_size=25'])
    assert status == 1
    assert '24 training images make no batch of 25' in capfd.readouterr().err


def test_it_learns_and_is_tested(trained, tmp_path):
    config, folder, work_dir = trained
    metrics = run_test([str(config), str(work_dir / 'epoch_6.pth'), '--data-root', str(folder),
                        '--work-dir', str(tmp_path), '--out', 'all.pkl'])
    assert metrics['accuracy/top1'] > 80  # a guess is right in a third of all cases
    assert set(metrics) == {'accuracy/top1'}
    with open('all.pkl', 'rb') as file:
        found = pickle.load(file)
    right = [sample['pred_label'] == sample['gt_label'] for sample in found]
    assert 100 * np.mean(right) == pytest.approx(metrics['accuracy/top1'], abs=0.01)
    classes = torch.load(work_dir / 'epoch_6.pth', weights_only=False)['meta']['dataset_meta']
    assert classes['classes'] == ('blue', 'green', 'red')


def test_resume_is_bitwise(trained, tmp_path):
    config, folder, work_dir = trained
    run_train([str(config), '--data-root', str(folder), '--work-dir', str(tmp_path),
               '--resume', str(work_dir / 'epoch_3.pth')])
    whole, resumed = (torch.load(path / 'epoch_6.pth', weights_only=False)['state_dict']
                      for path in (work_dir, tmp_path))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.fixture(scope='module')
def with_adapters(trained):
    """A training with ``--lora`` from half-trained weights."""
    config, folder, work_dir = trained
    command = [str(config), '--data-root', str(folder), '--lora', '2']
    run_train([*command, '--pretrained', str(work_dir / 'epoch_3.pth'), '--work-dir',
               str(folder / 'lora')])
    return command, folder / 'lora'


def state_of(path):
    return torch.load(path, weights_only=False)['state_dict']


def test_adapters_learn_in_place_of_weights(trained, with_adapters):
    before = state_of(trained[2] / 'epoch_3.pth')
    after = state_of(with_adapters[1] / 'epoch_6.pth')
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed >= {'backbone.head.weight', 'backbone.head.bias', 'backbone.norm_f.weight'}
    assert all('norm' in name or '.head.' in name for name in changed)
    added = {name.rpartition('_lora_')[0].rpartition('.')[0].rpartition('.')[2]
             for name in after if name not in before and name != 'backbone.lora_scale'}
    assert {'in_proj', 'out_proj', 'x_proj_0', 'dt_proj_0'} <= added
    assert all(value.abs().max() > 0 for name, value in after.items() if '_lora_' in name)
    log = next(with_adapters[1].glob('*/*.log')).read_text()
    assert 'LoRA (rank=2): ' in log and 'weights of the backbone have adapters' in log
    assert 'Of the backbone ' in log and 'values learn' in log


def test_resume_of_adapters_is_bitwise(with_adapters, tmp_path):
    command, work_dir = with_adapters
    run_train([*command, '--work-dir', str(tmp_path), '--resume', str(work_dir / 'epoch_3.pth')])
    whole, resumed = (state_of(path / 'epoch_6.pth') for path in (work_dir, tmp_path))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_adapters_are_merged_for_the_ordinary_model(trained, with_adapters, tmp_path, capfd):
    config, folder, _ = trained
    last, merged = with_adapters[1] / 'epoch_6.pth', tmp_path / 'merged.pth'
    assert cli.main(['convert', '--merge-lora', str(last), str(merged)]) == 0
    assert 'with the adapters of 20 weights merged' in capfd.readouterr().out
    assert not [name for name in state_of(merged) if 'lora' in name]
    scores = []
    for number, (path, options) in enumerate((
            (merged, []), (last, []), (last, ['--cfg-options', 'model.backbone.lora.rank=2']),
            (merged, ['--cfg-options', 'model.backbone.lora.rank=2']))):
        metrics = run_test([str(config), str(path), '--data-root', str(folder), '--work-dir',
                            str(tmp_path / str(number)), '--out', f'{number}.pkl', *options])
        assert metrics['accuracy/top1'] > 80
        with open(f'{number}.pkl', 'rb') as file:
            scores.append(np.stack([np.asarray(one['scores']) for one in pickle.load(file)]))
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], atol=1e-5)
    assert cli.main(['convert', '--merge-lora', str(merged), str(tmp_path / 'twice.pth')]) == 1
    assert 'has no adapters to merge; expected a checkpoint' in capfd.readouterr().err


def test_mistakes_with_adapters(trained, with_adapters, tmp_path, capfd):
    command, work_dir = with_adapters

    def fails(argv, *options):
        capfd.readouterr()
        assert run_command(run_train, [*argv, '--work-dir', str(tmp_path), *map(str, options)]) == 1
        said = capfd.readouterr().err
        assert 'Traceback' not in said, said
        return said.partition('ERROR: ')[2]

    last, before = work_dir / 'epoch_3.pth', trained[2] / 'epoch_3.pth'
    assert 'this run would start from random ones' in fails(command)
    text = fails(command[:3], '--resume', last)
    assert f'{last} was trained with adapters of 20 weights, up to rank 2 with the factor 2' in text
    assert 'this run has no adapters (--lora' in text and f'load_from={last}' in text
    assert 'this run has adapters of 20 weights, up to rank 3' in fails(
        [*command[:3], '--lora', '3'], '--resume', last)
    assert 'this run has adapters of 20 weights, up to rank 2 with the factor 1 ' in fails(
        command, '--resume', last, '--cfg-options', 'model.backbone.lora.alpha=2')
    assert 'was trained with no adapters, and this run has adapters' in fails(
        command, '--resume', before)
    assert 'model.backbone.lora: got lora rank 0' in fails(
        [*command[:3], '--lora', '0'], '--pretrained', before)
    assert 'rank 40, but the weights of layers.0.mixer have rank 3' in fails(
        [*command[:3], '--lora', '40'], '--pretrained', before)


@pytest.mark.skipif(find_spec('bitsandbytes') is None, reason='bitsandbytes is not installed')
def test_states_in_eight_bits_resume_bit_for_bit(trained, tmp_path):
    config, folder, work_dir = trained
    for name, options in (('w', []), ('again', ['--resume', tmp_path / 'w/epoch_3.pth'])):
        run_train([str(config), '--data-root', str(folder), '--work-dir', str(tmp_path / name),
                   '--optimizer-8bit', *map(str, options), '--cfg-options',
                   'optim_wrapper.optimizer.fused=True'])
    whole, resumed = (state_of(tmp_path / name / 'epoch_6.pth') for name in ('w', 'again'))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    states = torch.load(tmp_path / 'w/epoch_6.pth', weights_only=False)['optimizer']['state']
    assert torch.uint8 in {leaf.dtype for leaf in tree_leaves(states) if torch.is_tensor(leaf)}
    log = next((tmp_path / 'w').glob('*/*.log')).read_text()
    assert 'The optimizer is AdamW8bit of bitsandbytes, without fused.' in log


def test_search_on_a_classifier(toy, tmp_path):
    config, folder = toy
    path = search([str(config), '--data-root', str(folder), '--work-dir', str(tmp_path),
                   '--interval', '3', '--cfg-options', 'train_cfg.max_epochs=1'])
    lines = (tmp_path / 'alphas.jsonl').read_text().splitlines()
    assert len(lines) == 3 and '"layers.1"' in lines[-1]
    cfg = Config.fromfile(path)
    assert len(cfg.directions) == 2 and cfg.model.backbone.directions == cfg.directions
    assert MODELS.build(cfg.model).backbone.head.out_features == 3


def test_mistakes(toy, tmp_path, capfd):
    config, folder = toy

    def fails(tool, *argv):
        capfd.readouterr()
        assert run_command(tool, [str(config), *map(str, argv), '--work-dir', str(tmp_path)]) == 1
        output = capfd.readouterr().err
        assert 'Traceback' not in output, output
        return output.partition('ERROR: ')[2]

    data = ('--data-root', folder)
    assert 'one folder per class' in fails(run_train, '--data-root', 'nowhere')
    text = fails(run_train, *data, '--cfg-options', 'model.num_classes=4')
    assert 'has 3 classes (blue, green, red)' in text and 'model.num_classes=3' in text
    torch.save(dict(state_dict=dict(weight=torch.zeros(1))), tmp_path / 'x.pth')
    text = fails(run_test, tmp_path / 'x.pth', *data, '--show-dir', 'pictures')
    assert '--out FILE.pkl' in text
    capfd.readouterr()
    assert cli.main(['visualize', str(config), 'x.pth']) == 1
    assert 'nothing to draw' in capfd.readouterr().err
    victim = folder / 'val' / 'red' / 'bad.png'
    victim.write_bytes(b'no picture')
    try:
        cfg = ('--cfg-options', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1')
        assert f'{victim} is text inside, which cannot be decoded' in fails(run_train, *data, *cfg)
    finally:
        victim.unlink()


# --- the recipes ----------------------------------------------------------------------------------

def load(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        return cfg, MODELS.build(cfg.model)


@pytest.mark.parametrize('name, parameters, epochs', [
    ('localvim_t_imagenet', 7_994_152, 300),
    ('localvim_search_imagenet', 5_473_288, 100),
    ('localvmamba_search_imagenet', 4_576_656, 100)])
def test_published_recipe(name, parameters, epochs):
    cfg, model = load(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert cfg.pretrained is None and cfg.custom_imports.imports == ['mmhybrid']
    assert cfg.train_cfg.max_epochs == epochs
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.end, cosine.begin, cosine.end, cosine.T_max, cosine.eta_min) == (
        21, 20, epochs, epochs - 20, 1e-6)
    assert cfg.optim_wrapper.optimizer.lr * warm_up.start_factor == pytest.approx(1e-7)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 1024
    assert cfg.model.label_smoothing == 0.1
    assert cfg.model.mixing == dict(mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=0.5)
    drops = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert max(drops) == pytest.approx(0.1)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups
             for p in group['params']}
    for key, param in model.named_parameters():
        spared = param.ndim <= 1 or key.endswith(('.bias', 'pos_embed'))
        assert decay[id(param)] == (0.0 if spared else 0.04), key
    searches = [key for key, _ in model.named_parameters() if 'multi_scan.weights' in key]
    assert len(searches) == {'localvim_t': 0, 'localvim_s': 20, 'localvmamb': 15}[name[:10]]


def test_mini_config_is_a_classifier_of_its_data():
    from mmhybrid.datasets.mini_imagenet import KINDS, SIDE
    cfg, model = load('localvmamba_mini_imagenet')
    assert cfg.model.num_classes == len(KINDS)
    assert all(cfg[f'{split}_dataloader'].dataset.pipeline[-1].input_size == SIDE
               for split in ('train', 'val', 'test'))
    assert {cfg[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val', 'test')} == {
        cfg.data_root}
    assert [len(layer.blocks) for layer in model.backbone.layers] == [1, 1, 2, 1]


def test_transforms_of_the_recipe():
    cfg, _ = load('localvim_t_imagenet')
    train, val = (cfg[f'{split}_dataloader'].dataset.pipeline[-1] for split in ('train', 'val'))
    assert (train.auto_augment, train.re_prob, train.re_mode) == ('rand-m9-mstd0.5', 0.25, 'pixel')
    assert round(224 / val.crop_pct) == 256 and not val.get('is_training')
