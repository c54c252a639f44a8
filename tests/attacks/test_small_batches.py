"""One image per batch where a model normalizes over the batch, and batches that are too large."""
from pathlib import Path

import pytest
import small_runs
import torch
from mmengine.runner import Runner
from shrink import on_meta, shrink

from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine.building import prepare_training
from mmhybrid.engine.config import load_config
from mmhybrid.engine.explanations import explain
from mmhybrid.engine.small_batches import (
    check_pairs,
    check_single_images,
    out_of_memory_advice,
    pooled_norms,
)
from mmhybrid.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
POOLED = {'model.pooled': 'BN'}


@pytest.fixture
def built(tmp_path):
    """A runner as it is before training."""
    def make(train_cfg=None, **options):
        cfg, _ = load_config(small_runs.write(tmp_path), options, work_dir=str(tmp_path / 'w'))
        if train_cfg is not None:
            cfg.train_cfg = train_cfg
        with small_runs.quick():
            runner = Runner.from_cfg(cfg)
            prepare_training(runner)
        return runner
    return make


def loader(**settings):
    return {f'train_dataloader.{name}': value for name, value in settings.items()}


ITERATIONS = dict(type='IterBasedTrainLoop', max_iters=6)


@pytest.mark.parametrize('pooled', ['BN', 'SyncBN'])
def test_one_image_is_refused_before_training(built, pooled):
    # In one process mmengine makes BN of SyncBN.
    runner = built(**{'model.pooled': pooled}, **loader(batch_size=1))
    with pytest.raises(UserError, match=r'batch_size is 1 on each process, but '
                                        r'model\.branch\.1\.1 normalizes.*batch_size=2.*GN'):
        check_single_images(runner)


@pytest.mark.parametrize('batch_sampler', [None, dict(type='mmdet.AspectRatioBatchSampler')])
def test_a_last_batch_of_one_is_refused_before_training(built, batch_sampler):
    import mmdet.datasets.samplers  # noqa: F401
    options = dict(**POOLED, **loader(batch_size=2, batch_sampler=batch_sampler))
    message = '13 training images in batches of 2 leave a last batch of one.*drop_last=True'
    with pytest.raises(UserError, match=message):
        check_single_images(built(**options, **{'train_dataloader.dataset.size': 13}))
    with pytest.raises(UserError, match=message):  # these end within the run: 7 batches
        check_single_images(built(dict(ITERATIONS, max_iters=7), **options,
                                  **{'train_dataloader.dataset.size': 13}))


@pytest.mark.parametrize('train_cfg, options', [
    (None, dict(POOLED, **loader(batch_size=2))),  # 12 images
    (None, dict(POOLED, **loader(batch_size=5))),  # a last batch of two
    (None, dict(POOLED, **loader(batch_size=11, drop_last=True))),
    (None, {'model.pooled': 'GN', **loader(batch_size=1)}),
    (None, {'model.frozen': True, **POOLED, **loader(batch_size=1)}),
    (None, loader(batch_size=1)),  # maps of many values
    (ITERATIONS, dict(POOLED, **loader(batch_size=11, sampler=dict(type='InfiniteSampler')))),
    (dict(ITERATIONS, max_iters=1), dict(POOLED, **loader(batch_size=11))),
])
def test_what_works_is_not_refused(built, train_cfg, options):
    runner = built(train_cfg, **options)
    check_single_images(runner)
    runner.train()  # and it does


@pytest.mark.parametrize(('options', 'message'), [
    (loader(batch_size=3), 'batch_size is 3 on each process, but model.mixing.*batch_size=4'),
    (loader(batch_size=3, drop_last=True), 'batch_size is 3'),
    (loader(batch_size=8, **{'dataset.size': 13}),
     '13 training images in batches of 8 leave a last batch of 5.*drop_last=True'),
    (loader(batch_size=8), None),  # 12 images
    (loader(batch_size=8, drop_last=True, **{'dataset.size': 13}), None),
])
def test_images_that_are_mixed_come_in_pairs(built, options, message):
    runner = built(**options)
    check_pairs(runner)  # a model that mixes nothing takes any number
    runner.model.mixing = object()
    if message is None:
        check_pairs(runner)
        return
    with pytest.raises(UserError, match=message):
        check_pairs(runner)


def test_the_tool_refuses(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    result = small_runs.run(capfd, run_train, small_runs.write(tmp_path), '--cfg-options',
                            'model.pooled=BN', 'train_dataloader.batch_size=1')
    assert result.code == 1 and 'optim_wrapper.accumulative_counts does not help' in result.error
    assert len(result.error.splitlines()) == 1


def test_what_only_the_first_batch_shows(tmp_path, monkeypatch, capfd):
    """The pooling is out of sight of the check, and PyTorch's error comes while training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mmhybrid.engine.small_batches.pooled_norms', lambda model: [])
    result = small_runs.run(capfd, run_train, small_runs.write(tmp_path), '--cfg-options',
                            'model.pooled=BN', 'train_dataloader.batch_size=1')
    assert result.code == 1
    assert 'got input size torch.Size([1, 4, 1, 1])' in result.error
    assert 'train_dataloader.batch_size=2' in result.error and "type='GN'" in result.error


@pytest.mark.parametrize('name, found', [
    ('upernet_vmamba_t_ade20k', ['model.decode_head.psp_modules.0.1.bn']),
    ('upernet_mambavision_mini_ade20k', []),  # made to train on single images
    ('cascade_mambavision_mini_coco', [])])
def test_shipped_models(name, found):
    """A full-size segmentor's pyramid pools to 1x1; a detector trains on single images."""
    from mmengine.registry import MODELS, init_default_scope
    cfg, _ = load_config(str(ROOT / 'configs' / f'{name}.py'))
    init_default_scope(cfg.default_scope)
    with on_meta():
        model = MODELS.build(shrink(cfg).model)
    assert pooled_norms(model) == found


# --- memory -------------------------------------------------------------------------------------

ERROR = torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\nMore.')


def test_advice_does_not_lead_to_batches_that_cannot_be(built):
    text = out_of_memory_advice(ERROR, built(**POOLED, **loader(batch_size=2)))
    assert text.startswith('The GPU is out of memory. CUDA out of memory. Tried to allocate 2 GiB.')
    assert '--batch' not in text and 'Batches of less than 2 are not possible' in text
    assert '--amp' in text and '--image-size' in text and 'More.' not in text
    text = out_of_memory_advice(ERROR, built(**POOLED, **loader(batch_size=3)))
    assert '--batch 2 --accumulate 2 --lr 0.01' in text
    text = out_of_memory_advice(ERROR, built(**loader(batch_size=2), **{
        'optim_wrapper.accumulative_counts': 3}))
    assert '--batch 1 --accumulate 6' in text
    assert '--batch' not in out_of_memory_advice(ERROR, built(**loader(batch_size=1)))


def test_advice_leaves_out_what_is_in_use(built):
    runner = built()
    runner.model.backbone = torch.nn.Identity()
    assert 'with_cp' not in out_of_memory_advice(ERROR, runner)

    class Backbone(torch.nn.Module):
        def __init__(self, with_cp=False):
            super().__init__()

    runner.model.backbone = Backbone()
    runner.cfg.model.backbone = dict(type='Backbone')
    assert 'model.backbone.with_cp=True' in out_of_memory_advice(ERROR, runner)
    runner.cfg.model.backbone.with_cp = True
    runner.optim_wrapper.cast_dtype = torch.float16
    text = out_of_memory_advice(ERROR, runner)
    assert 'with_cp' not in text and '--amp' not in text and 'smaller images' in text


def test_advice_of_a_test_names_no_batch_size(tmp_path, monkeypatch, capfd):
    assert 'batch_size' not in explain(ERROR) and 'The GPU is out of memory' in explain(ERROR)

    def full(self, *args, **kwargs):
        raise ERROR

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(small_runs.SmallModel, 'forward', full)
    result = small_runs.run(capfd, run_train, small_runs.write(tmp_path), '--cfg-options',
                            'model.pooled=BN')
    assert result.code == 1 and 'Batches of less than 2 are not possible' in result.error
