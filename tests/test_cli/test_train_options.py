"""Options of ``mmhybrid train`` and what they do to full-size, mini and small configs."""
import argparse
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import small_runs
import torch
import toy
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from mmhybrid.cli.actions.train_options import apply_options, check_arguments
from mmhybrid.cli.actions.train_options import largest_batch as largest
from mmhybrid.cli.actions.training import parse, run_training, training_parser
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine.config import load_config
from mmhybrid.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
DET, SEG = 'cascade_mambavision_t_coco', 'upernet_mambavision_t_ade20k'


def applied(name, *argv, processes=1, images=None, change=None):
    """A config as the options leave it, and what was said."""
    args = parse(training_parser(''), [str(CONFIGS / f'{name}.py'), *argv])
    check_arguments(args)
    cfg, _ = load_config(args.config, args.cfg_options, work_dir='w')
    init_default_scope(cfg.default_scope)
    if change:
        change(cfg)
    with mock.patch.object(DATASETS, 'build', lambda _: range(images)):
        return cfg, '\n'.join(apply_options(cfg, args, processes))


# --- length -----------------------------------------------------------------------------------

@pytest.mark.parametrize('epochs, warm, milestones', [
    (12, 333, [9, 11]), (72, 1000, [54, 66]), (1, 28, [1, 1])])
def test_epochs_of_a_detector(epochs, warm, milestones):
    cfg, said = applied(DET, '--epochs', str(epochs))
    assert cfg.train_cfg.max_epochs == epochs and cfg.train_cfg.val_interval == 1
    first, second = cfg.param_scheduler
    assert (first.begin, first.end) == (0, warm)
    assert (second.begin, second.end, second.milestones) == (0, epochs, milestones)
    assert f'train_cfg.max_epochs is {epochs} instead of 36' in said


def test_epochs_of_a_cosine_that_follows_a_warm_up():
    cfg, _ = applied('classification/vmamba_t_imagenet', '--epochs', '150')
    warm, cosine = cfg.param_scheduler
    assert 300 / 150 == 2
    assert (warm.begin, warm.end) == (0, 10) and (cosine.begin, cosine.end) == (10, 150)
    assert cosine.T_max == 140


def test_epochs_of_a_config_that_counts_iterations():
    cfg, said = applied(SEG, '--epochs', '20', images=1000)
    assert cfg.train_cfg.max_iters == 10000 and cfg.train_cfg.val_interval == 1000
    assert cfg.default_hooks.checkpoint.interval == 1000
    warm, poly = cfg.param_scheduler
    assert (warm.end, poly.begin, poly.end) == (94, 94, 10000)
    assert '1000 images in batches of 2: 10000 iterations' in said
    cfg, _ = applied(SEG, '--epochs', '20', processes=8, images=1001)
    assert cfg.train_cfg.max_iters == 1252  # the last of them is not whole


def test_epochs_follow_the_batch():
    cfg, _ = applied(SEG, '--epochs', '20', '--batch', '8', images=1000)
    assert cfg.train_cfg.max_iters == 2500


def test_intervals_at_the_end_of_a_run_and_hooks_with_moments():
    def change(cfg):
        cfg.custom_hooks = [dict(type='X', switch_epoch=33)]
    cfg, _ = applied('cascade_mambavision_mini_coco', '--epochs', '4')
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval) == (4, 4)
    assert cfg.param_scheduler[1].T_max == 4
    cfg, _ = applied(DET, '--epochs', '12', change=change)
    assert cfg.custom_hooks[0].switch_epoch == 11
    cfg, _ = applied('cascade_vim_ti_coco', '--epochs', '50', images=118000)
    assert cfg.train_cfg.max_iters == 368750
    assert cfg.train_cfg.dynamic_intervals == [(360002, 368750)]


def test_epochs_without_a_length():
    class Endless:
        pass

    def change(cfg):
        cfg.train_dataloader = ConfigDict(cfg.train_dataloader, dataset=Endless())
    with pytest.raises(UserError, match=r'it does not tell its length.*train_cfg\.max_iters=N'):
        applied(SEG, '--epochs', '2', change=change)
    cfg, said = applied(DET, '--epochs', '2', change=lambda cfg: cfg.train_cfg.pop('max_epochs'))
    assert cfg.train_cfg.max_epochs == 2 and 'they stay as they are' in said
    with pytest.raises(UserError, match='--epochs cannot tell how train_cfg of type Mine counts'):
        applied(DET, '--epochs', '2', change=lambda cfg: cfg.train_cfg.update(type='Mine'))


# --- images, batch and rate -------------------------------------------------------------------

def test_image_size_of_a_detector():
    cfg, said = applied(DET, '--image-size', '640')
    choice = cfg.train_dataloader.dataset.pipeline[3].transforms
    assert choice[0][0].scales[0] == (640, 230) and choice[0][0].scales[-1] == (640, 384)
    assert choice[1][1].crop_size == (184, 288)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.pipeline[1].scale == (640, 384)
    assert cfg.tta_pipeline[1].transforms[0][0].scale == (640, 384)
    assert cfg.model.backbone.window_size == (8, 8, 54, 27)  # still whole maps
    assert 'window_size (8, 8, 54, 27) instead of (8, 8, 112, 56)' in said


def test_image_size_of_a_segmentor():
    cfg, _ = applied(SEG, '--image-size', '256')
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps['RandomResize'].scale == (1024, 256)
    assert steps['RandomResize'].ratio_range == (0.5, 2.0)
    assert steps['RandomCrop'].crop_size == (256, 256)
    assert steps['RandomCrop'].cat_max_ratio == 0.75
    assert cfg.val_dataloader.dataset.pipeline[1].scale == (1024, 256)
    assert cfg.model.data_preprocessor.size == (256, 256)
    assert cfg.model.backbone.window_size == (8, 8, 32, 16)


def test_image_size_of_plain_backbones_minis_and_classifiers():
    cfg, _ = applied('cascade_vim_ti_coco', '--image-size', '512')
    assert cfg.model.backbone.img_size == 512
    assert cfg.model.data_preprocessor.pad_size_divisor == 512
    assert cfg.train_dataloader.dataset.pipeline[4].crop_size == (512, 512)
    cfg, _ = applied('upernet_vim_ti_ade20k', '--image-size', '256')
    assert (cfg.model.test_cfg.crop_size, cfg.model.test_cfg.stride) == ((256, 256), (170, 170))
    cfg, _ = applied('cascade_mambavision_mini_coco', '--image-size', '320')
    assert cfg.train_dataloader.dataset.pipeline[2].scale == (320, 320)
    assert cfg.model.backbone.arch.window_size == (8, 8, 20, 10)
    cfg, _ = applied('upernet_mambavision_mini_ade20k', '--image-size', '64')
    assert cfg.train_dataloader.dataset.pipeline[2].crop_size == (64, 64)
    assert cfg.train_dataloader.dataset.pipeline[4].scale_factor == 0.25
    cfg, _ = applied('classification/vmamba_t_imagenet', '--image-size', '192')
    assert cfg.train_dataloader.dataset.pipeline[1].input_size == 192


def test_image_size_without_a_size():
    def change(cfg):
        cfg.train_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile')]
    with pytest.raises(UserError, match='--image-size 96: the training pipeline .* no size'):
        applied(DET, '--image-size', '96', change=change)


@pytest.mark.parametrize('argv, processes, lr, counts', [
    (['--batch', '4'], 1, 2.5e-5, (4, 1)),  # the recipe's 1e-4 is for 16
    (['--batch', '4', '--accumulate', '4'], 1, 1e-4, (4, 4)),
    (['--accumulate', '2'], 4, 1e-4, (2, 2)),
    (['--batch', '4', '--lr', '3e-4'], 1, 3e-4, (4, 1)),
    (['--lr', '3e-4'], 8, 3e-4, (2, 1)),
    (['--batch', '4', '--cfg-options', 'optim_wrapper.optimizer.lr=1e-3'], 1, 1e-3, (4, 1))])
def test_batch_accumulation_and_rate(argv, processes, lr, counts):
    cfg, said = applied(DET, *argv, processes=processes)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(lr)
    assert (cfg.train_dataloader.batch_size,
            cfg.optim_wrapper.get('accumulative_counts', 1)) == counts
    assert '--cfg-options' in argv or 'learning rate is ' in said


def test_a_rate_without_a_base_follows_the_batch_of_the_config():
    def change(cfg):
        cfg.pop('auto_scale_lr')
    cfg, said = applied(DET, '--batch', '6', change=change)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(3e-4)
    assert '0.0003: 0.0001 x 6 images per step / 2 that the config has' in said


def test_mmengine_does_not_scale_a_second_time():
    def change(cfg):
        cfg.auto_scale_lr.enable = True
    cfg, _ = applied(DET, '--batch', '8', change=change)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(5e-5)
    assert cfg.auto_scale_lr.enable is False


def test_several_optimizers():
    def change(cfg):
        cfg.optim_wrapper = ConfigDict(constructor='X', one=dict(), two=dict())
    with pytest.raises(UserError, match='--lr 0.1: optim_wrapper has no optimizer of its own'):
        applied(DET, '--lr', '0.1', change=change)
    _, said = applied(DET, '--batch', '3', change=change)
    assert 'The learning rates stay as they are' in said


# --- the largest batch ------------------------------------------------------------------------

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return tmp_path / 'mmhybrid/batches.json'


@pytest.mark.parametrize('limit, most, found', [
    (0, 9, 0), (1, 9, 1), (5, 9, 5), (9, 9, 9), (50, 9, 9), (7, 64, 7), (64, 64, 64), (3, 1, 1),
    (0, 1, 0), (8, 8, 8)])
def test_search_for_the_largest(limit, most, found):
    asked = []
    assert largest.largest_that(lambda n: asked.append(n) or n <= limit, most) == found
    assert max(asked) <= most and len(asked) == len(set(asked))


def test_the_largest_batch_is_found_once(cache, monkeypatch):
    calls = []

    def found(source, step, limit, most):
        calls.append(step.size)
        return 6

    monkeypatch.setattr(largest, 'predicted_batch', found)
    monkeypatch.setattr(largest.torch.cuda, 'is_available', lambda: False)
    cfg, said = applied(DET, '--batch', 'auto', images=100)
    assert cfg.train_dataloader.batch_size == 6
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(1e-4 * 6 / 16)
    assert '--batch auto: 6 images of 800 x 1344 on each process (predicted from shapes' in said
    cfg, said = applied(DET, '--batch', 'auto', images=100)
    assert cfg.train_dataloader.batch_size == 6 and f'found before and kept in {cache}' in said
    assert len(calls) == 1
    applied(DET, '--batch', 'auto', '--image-size', '640', images=100)
    assert calls == [(800, 1344), (384, 640)]  # another question
    cache.write_text('{"x": ')
    applied(DET, '--batch', 'auto', images=100)
    assert len(calls) == 3  # a damaged file is not an answer


def test_limits_of_the_largest_batch(cache, monkeypatch):
    monkeypatch.setattr(largest, 'predicted_batch', lambda source, step, limit, most: most)
    cfg, said = applied(DET, '--batch', 'auto', images=1000)
    assert cfg.train_dataloader.batch_size == 64 and '4 times the 16 images' in said
    cfg, said = applied(DET, '--batch', 'auto', images=10)
    assert cfg.train_dataloader.batch_size == 10 and 'there are 10 images' in said
    monkeypatch.setattr(largest, 'predicted_batch', lambda *_: 0)
    with pytest.raises(UserError, match='not even one image of 800 x 1344 fits'):
        applied(DET, '--batch', 'auto', images=11)


@pytest.mark.parametrize('limit, found', [(1, 0), (129, 2), (130, 3), (199, 9), (1e9, 9)])
def test_what_is_predicted_to_fit(limit, found, monkeypatch):
    """100 bytes, and 10 for each image."""
    monkeypatch.setattr(largest, 'predict', lambda source, step: SimpleNamespace(
        peak=SimpleNamespace(bytes=100 + 10 * step.batch)))
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.11.0'))
    step = largest.Step(1, (8, 8), torch.float32)
    assert largest.predicted_batch(None, step, limit, 9) == found
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.4.1'))
    with pytest.raises(UserError, match='needs torch >= 2.11; 2.4.1 is installed. Give a number'):
        largest.predicted_batch(None, step, limit, 9)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < torch.torch_version.TorchVersion('2.11'),
                    reason='the planner needs torch 2.11')
def test_the_planner_says_what_fits():
    cfg, _ = load_config(str(CONFIGS / 'upernet_mambavision_mini_ade20k.py'))
    source = largest.ModelSource('mini', cfg.model, cfg)
    step = largest.step_of(source, 1)
    eight, nine = (largest.predict(source, step.with_batch(n)).peak.bytes for n in (8, 9))
    assert largest.predicted_batch(source, step, (eight + nine) / 2, 99) == 8
    assert largest.predicted_batch(source, step, 1 << 40, 99) == 99
    assert largest.predicted_batch(source, step, 1 << 10, 99) == 0


def test_a_model_is_tried_on_a_gpu_with_what_it_will_have(monkeypatch):
    """Steps of a stand-in that runs out of memory above 5 images."""
    made = []

    class Model(torch.nn.Linear):
        def train_step(self, data, wrapper):
            made.append(data)
            assert len(wrapper.param_groups) == 1
            if data > 5:
                raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(largest, 'build_model', lambda source, device: Model(2, 2))
    monkeypatch.setattr(largest, 'synthetic_batch', lambda model, size, batch: batch)
    for name in ('set_per_process_memory_fraction', 'empty_cache'):
        monkeypatch.setattr(largest.torch.cuda, name, lambda *_: None)
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1, weight_decay=0.1),
                                         constructor='mmhybrid.HybridOptimWrapperConstructor',
                                         paramwise_cfg=dict(no_decay='ssm')),
                      custom_hooks=[dict(type='EMAHook')]))
    source = largest.ModelSource('x', None, cfg)
    assert largest._try(source, largest.Step(1, (8, 8), torch.float32), 16) == 5
    assert sorted(set(made)) == [1, 2, 4, 5, 6, 8]


# --- the model --------------------------------------------------------------------------------

def with_weights(cfg):
    cfg.model.backbone.pretrained = 'x'


def test_freeze():
    cfg, said = applied(DET, '--freeze', '2')
    assert cfg.model.backbone.frozen_stages == 2 and 'they are random' in said
    cfg, said = applied(DET, '--freeze', '0', change=with_weights)
    assert cfg.model.backbone.frozen_stages == 0 and 'random' not in said
    cfg, _ = applied('cascade_swin_t_coco', '--freeze', '1')
    assert cfg.model.backbone.frozen_stages == 1
    with pytest.raises(UserError, match='frozen_stages, which mmhybrid.TimmFeatures does not have'):
        applied('cascade_convnext_t_coco', '--freeze', '1')


def norms(cfg):
    return {cfg.model[name].norm_cfg.type for name in ('decode_head', 'auxiliary_head')}


def test_norms(monkeypatch):
    some = dict(change=with_weights)
    cfg, said = applied(SEG, '--norms', 'auto', **some)  # 2 images
    assert norms(cfg) == {'GN'} and cfg.model.decode_head.norm_cfg.num_groups == 32
    assert 'chosen frozen: ' in said and 'gn: GroupNorm' in said
    assert 'mmhybrid.FrozenNormsHook' in [hook['type'] for hook in cfg.custom_hooks]
    cfg, said = applied(SEG, '--norms', 'auto', '--batch', '8', **some)
    assert norms(cfg) == {'SyncBN'} and 'enough for BatchNorm' in said
    cfg, said = applied(SEG, '--norms', 'auto')
    assert norms(cfg) == {'GN'} and 'frozen' not in said
    cfg, said = applied('cascade_mambavision_mini_coco', '--norms', 'auto', '--batch', '2')
    assert 'Nothing was changed' in said
    monkeypatch.setattr('mmhybrid.cli.actions.train_options.norms.has_accelerator', lambda: True)
    cfg, said = applied(SEG, '--norms', 'auto', processes=8, **some)
    assert cfg.sync_bn == 'torch' and norms(cfg) == {'SyncBN'} and 'all 8 processes' in said
    with pytest.raises(UserError, match='there is one process'):
        applied(SEG, '--norms', 'sync')


def test_norms_that_cannot_be():
    with pytest.raises(UserError, match='starts from random weights. Give some .--pretrained.'):
        applied(SEG, '--norms', 'frozen')
    with pytest.raises(UserError, match='no norm_cfg of neck and heads says BN'):
        applied('cascade_mambavision_mini_coco', '--norms', 'gn')
    with pytest.raises(UserError, match='here is no GPU'):
        applied(SEG, '--norms', 'sync', processes=2)


def test_groups_divide_narrow_heads():
    def change(cfg):
        cfg.model.decode_head.channels = 24
    cfg, _ = applied(SEG, '--norms', 'gn', change=change)
    assert cfg.model.decode_head.norm_cfg.num_groups == 8


def test_averages_best_checkpoints_and_early_stops():
    cfg, _ = applied(DET, '--ema', '--early-stop', '3', '--save-best')
    average, stop = cfg.custom_hooks[-2:]
    assert average.type == 'EMAHook'
    assert stop == dict(type='mmhybrid.EarlyStopHook', monitor='coco/segm_mAP', rule='greater',
                        patience=3)
    assert cfg.default_hooks.checkpoint.save_best == 'coco/segm_mAP'
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 3
    for name, metric in ((SEG, 'mIoU'), ('upernet_mambavision_mini_ade20k', 'mIoU_present'),
                         ('classification/vmamba_t_imagenet', 'accuracy/top1')):
        cfg, _ = applied(name, '--save-best')
        assert cfg.default_hooks.checkpoint.save_best == metric
    cfg, _ = applied(DET, '--save-best', 'val_loss')
    assert cfg.default_hooks.checkpoint.rule == 'less'

    def twice(cfg):
        cfg.custom_hooks = [dict(type='EMAHook'), dict(type='EarlyStoppingHook', monitor='x')]
    cfg, said = applied(DET, '--ema', change=twice)
    assert len(cfg.custom_hooks) == 2 and 'averages weights already (EMAHook)' in said
    with pytest.raises(UserError, match='have an early stop already'):
        applied(DET, '--early-stop', '2', change=twice)
    with pytest.raises(UserError, match='--early-stop --save-best: the config has no validation'):
        applied(DET, '--early-stop', '2', '--save-best',
                change=lambda cfg: cfg.update(val_cfg=None))
    with pytest.raises(UserError, match='which metric of val_evaluator .* is not known'):
        applied(DET, '--save-best', change=lambda cfg: cfg.val_evaluator.update(type='Mine'))


# --- the command line -------------------------------------------------------------------------

@pytest.mark.parametrize('argv, message', [
    (['--epochs', '3', '--cfg-options', 'train_cfg.max_epochs=4'],
     '--epochs 3 and --cfg-options train_cfg.max_epochs=4 set the same'),
    (['--batch', 'auto', '--cfg-options', 'train_dataloader.batch_size=4'], '--batch auto and'),
    (['--lr', '0.1', '--auto-scale-lr'], '--lr 0.1 is the learning rate as it is'),
    (['--save-best', ' '], '--save-best is empty')])
def test_contradictions(argv, message):
    with pytest.raises(UserError, match=message):
        applied(DET, *argv)


@pytest.mark.parametrize('argv', [
    ['--epochs', '0'], ['--epochs', '1.5'], ['--batch', 'most'], ['--batch', '-1'], ['--lr', '0'],
    ['--lr', 'nan'], ['--image-size', '16'], ['--freeze', '-1'], ['--early-stop', '0'],
    ['--accumulate', 'x'], ['--norms', 'bn']])
def test_values_that_cannot_be(argv, capsys):
    with pytest.raises(SystemExit):
        applied(DET, *argv)
    said = capsys.readouterr().err
    assert argv[0] in said and argv[1] in said


@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_a_logger_that_is_not_installed_is_named_before_anything_starts(name, monkeypatch, capfd,
                                                                        tmp_path):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    result = small_runs.run(capfd, run_train, tmp_path / 'no.py', f'--{name}')
    assert result.error == f'--{name} needs the package {name}, which is not installed: pip ' \
                           f'install {name}'


def test_loggers(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: object())
    cfg, said = applied(DET, '--tensorboard', '--wandb')
    assert [each.type for each in cfg.visualizer.vis_backends] == [
        'LocalVisBackend', 'TensorboardVisBackend', 'WandbVisBackend']
    assert cfg.visualizer.vis_backends[2].init_kwargs == dict(project='mmhybrid', name='w')
    assert 'tensorboard --logdir w' in said

    def change(cfg):
        cfg.visualizer.vis_backends = [dict(type='TensorboardVisBackend')]
    cfg, said = applied(DET, '--tensorboard', change=change)
    assert len(cfg.visualizer.vis_backends) == 1 and 'logs there already' in said


# --- runs of the toy --------------------------------------------------------------------------

def train(tmp_path, *argv, extra='', **settings):
    args = [small_runs.write(tmp_path, extra), '--work-dir', str(tmp_path / 'w'), *argv]
    with small_runs.quick(**settings):
        return run_training(parse(training_parser(''), args))


def log(tmp_path):
    return sorted((tmp_path / 'w').glob('*/*.log'))[-1].read_text()


def test_a_run_has_what_its_options_say(tmp_path):
    runner = train(tmp_path, '--epochs', '4', '--batch', '3', '--accumulate', '2', '--ema',
                   '--save-best', 'toy/mean')
    loop = runner.train_loop
    assert (loop.max_epochs, loop.epoch, len(loop.dataloader)) == (4, 4, 4)
    assert runner.optim_wrapper._accumulative_counts == 2
    assert runner.optim_wrapper.param_groups[0]['initial_lr'] == pytest.approx(1e-2 * 6 / 4)
    state = torch.load(tmp_path / 'w/epoch_4.pth', weights_only=False)
    name = 'net.0.weight'
    average, newest = state['state_dict'][name], runner.model.state_dict()[name]
    assert not torch.equal(average, newest)
    assert torch.equal(state['ema_state_dict'][f'module.{name}'], newest)
    assert state['run_settings']['options'] == dict(
        epochs=4, batch=3, accumulate=2, ema=True, save_best='toy/mean')
    assert len(list((tmp_path / 'w').glob('best_toy_mean_*.pth'))) == 1


def test_an_early_stop(tmp_path, monkeypatch):
    values = iter([0.1, 0.3, 0.3, 0.3, 0.9])
    monkeypatch.setattr(small_runs.SmallMetric, 'compute_metrics',
                        lambda self, results: dict(mean=next(values)))
    runner = train(tmp_path, '--epochs', '9', '--early-stop', '2', '--save-best', 'toy/mean')
    assert runner.train_loop.epoch == 4  # the third 0.3 is no better
    said = log(tmp_path)
    assert 'Training ended after epoch 4 of 9, stopped early' in said
    assert 'best_toy_mean_epoch_2.pth (0.3)' in said


def test_an_early_stop_goes_on_counting(tmp_path, monkeypatch):
    values = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    monkeypatch.setattr(small_runs.SmallMetric, 'compute_metrics',
                        lambda self, results: dict(mean=next(values)))
    options = ['--early-stop', '3', '--save-best', 'toy/mean']
    train(tmp_path, '--epochs', '3', *options)
    runner = train(tmp_path, '--epochs', '9', *options, '--resume', '--resume-settings', 'config')
    # epoch_3.pth was written before the third validation, after one that was no better
    assert runner.train_loop.epoch == 5


def test_frozen_statistics(tmp_path):
    torch.save(dict(state_dict=toy.ToyModel().state_dict()), tmp_path / 'weights.pth')
    runner = train(tmp_path, '--norms', 'frozen', '--epochs', '2', '--cfg-options',
                   f'load_from={tmp_path / "weights.pth"}')
    layer = runner.model.net[1]
    assert layer.running_mean.eq(0).all() and layer.running_var.eq(1).all()
    assert not layer.weight.eq(1).all()


def test_small_batches_are_named(tmp_path):
    train(tmp_path, '--epochs', '1')
    assert '1 BatchNorm layer(s), of which model.net.1 is the first, compute over the 2' in log(
        tmp_path)


@pytest.mark.parametrize('again, message', [
    (['--epochs', '2', '--lr', '0.02'], '--lr 0.02 would have no effect.*lr: 0.01 and 0.02'),
    (['--epochs', '6'], r'--epochs 6 would have no effect.*\(LinearLR\).*config'),
    (['--epochs', '2', '--batch', '6'], '--batch 6 would have no effect')])
def test_options_that_contradict_the_resumed_run(again, message, tmp_path):
    train(tmp_path, '--epochs', '2')
    with pytest.raises(UserError, match=f'(?s){message}'):
        train(tmp_path, *again, '--resume', str(tmp_path / 'w/epoch_1.pth'))
    runner = train(tmp_path, *again, '--resume', str(tmp_path / 'w/epoch_1.pth'),
                   '--resume-settings', 'config')
    assert runner.train_loop.epoch == runner.train_loop.max_epochs == int(again[1])


def test_the_same_options_resume(tmp_path):
    options = ['--epochs', '2', '--batch', '4', '--ema']
    train(tmp_path, *options)
    train(tmp_path, *options, '--resume', str(tmp_path / 'w/epoch_1.pth'))
    assert 'Other options' not in log(tmp_path)


def test_options_that_are_missing_in_a_resumed_run(tmp_path):
    train(tmp_path, '--batch', '3', '--ema')
    with pytest.raises(UserError, match='averages its weights, and this one does not.*Add --ema'):
        train(tmp_path, '--batch', '3', '--resume', str(tmp_path / 'w/epoch_1.pth'))
    train(tmp_path, '--ema', '--resume', str(tmp_path / 'w/epoch_1.pth'))
    assert 'Other options than before the break: --batch 3 before, no --batch now' in log(tmp_path)


def test_help_has_every_option():
    text = argparse.ArgumentParser.format_help(training_parser(''))
    for name in ('epochs', 'batch', 'image-size', 'lr', 'freeze', 'ema', 'early-stop', 'save-best',
                 'accumulate', 'tensorboard', 'wandb', 'norms'):
        assert f'--{name}' in text
