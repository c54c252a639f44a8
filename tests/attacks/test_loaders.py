"""Data loaders: numbers that cannot be, settings of workers without any, data without an end."""
from pathlib import Path

import pytest
import small_runs
from mmengine.config import Config

from mmhybrid.cli.actions.training import test as run_test
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine.config import load_config
from mmhybrid.engine.loop_check import check_loops
from mmhybrid.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ('train', 'val', 'test')


@pytest.fixture
def small(tmp_path):
    def make(**options):
        cfg = Config.fromfile(small_runs.write(tmp_path))
        cfg.merge_from_dict(options)
        return cfg
    return make


ODD = {
    'batch_size': [(0, 'a whole number of at least 1, got 0'), (-2, 'got -2'), (None, 'got None'),
                   ('two', "got 'two'"), (1.5, 'got 1.5'), (True, 'got True'), ([2], r'got \[2\]')],
    'num_workers': [(-1, 'a whole number of at least 0, got -1'), ('4x', "got '4x'")],
    'prefetch_factor': [(0, 'a whole number of at least 1, or None, got 0')],
    'timeout': [(-1, 'a finite number of at least 0, got -1'), ('long', "got 'long'")],
    'num_batch_per_epoch': [(0, 'a whole number of at least 1, or None, got 0')],
    'sampler': [('DefaultSampler', "a dict with a type, got 'DefaultSampler'"),
                (dict(_delete_=True, shuffle=True), 'a dict with a type')],
    'batch_sampler': [('AspectRatioBatchSampler', 'a dict with a type')],
    'dataset': [('CocoDataset', "a dict with a type, got 'CocoDataset'"), (7, 'got 7')],
    'collate_fn': [('pseudo_collate', 'a dict with a type')],
}


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('key, value, part', [
    (key, *case) for key, cases in ODD.items() for case in cases])
def test_odd_loader(small, split, key, value, part):
    cfg = small(**{f'{split}_dataloader.{key}': value})
    with pytest.raises(UserError, match=rf'^{split}_dataloader\.{key} must be .*{part}'):
        check_loops(cfg, SPLITS)


def test_what_a_loader_lacks(small):
    for key in ('dataset', 'sampler'):
        cfg = small()
        del cfg.train_dataloader[key]
        with pytest.raises(UserError, match=f'train_dataloader has no {key}; expected for example'):
            check_loops(cfg, SPLITS)
    cfg = small(**{'train_dataloader.batch_sampler': dict(type='BatchSampler')})
    del cfg.train_dataloader.batch_size
    with pytest.raises(UserError, match='a batch_sampler but no batch_size'):
        check_loops(cfg, SPLITS)
    for value in ('train', 3):
        cfg = small()
        cfg.val_dataloader = value
        with pytest.raises(UserError, match='val_dataloader must be a dict of settings'):
            check_loops(cfg, SPLITS)


def test_only_the_splits_of_the_run_count(small):
    cfg = small(**{'test_dataloader.batch_size': 0})
    assert check_loops(cfg, ['train', 'val']) == []


def test_honest_loaders_stay_as_they_are(small):
    for options in (
            dict(num_workers=2, persistent_workers=True, prefetch_factor=4, timeout=30),
            dict(num_workers=0), dict(num_workers=0, persistent_workers=False),
            dict(num_workers=0, prefetch_factor=None, timeout=0), dict(drop_last=True),
            dict(batch_size=None, sampler=None), dict(num_batch_per_epoch=3),
            dict(batch_sampler=None), dict(collate_fn=dict(type='default_collate'))):
        cfg = small(**{f'{split}_dataloader.{key}': value for split in SPLITS
                       for key, value in options.items()})
        before = cfg.copy()
        assert check_loops(cfg, SPLITS) == [] and cfg.to_dict() == before.to_dict()


# --- no workers ---------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['mask_rcnn_swin_t_coco', 'upernet_swin_t_ade20k',
                                  'classification/localvim_t_imagenet'])
def test_shipped_configs_without_workers(name):
    cfg, _ = load_config(str(ROOT / 'configs' / f'{name}.py'), {
        f'{split}_dataloader.num_workers': 0 for split in SPLITS})
    notes = check_loops(cfg, SPLITS)
    assert [note.split()[0] for note in notes] == [
        f'{split}_dataloader.num_workers' for split in SPLITS]
    assert all('persistent_workers=False' in note for note in notes)
    assert not any(cfg[f'{split}_dataloader'].persistent_workers for split in SPLITS)


def test_several_loaders(small):
    """val and test may have one each; a list is gone through."""
    cfg = small()
    loader = dict(cfg.val_dataloader, persistent_workers=True)
    cfg.val_dataloader = [dict(loader), dict(loader, num_workers=2)]
    note, = check_loops(cfg, ['train', 'val'])
    assert note.startswith('val_dataloader.0.num_workers is 0, so persistent_workers=False')
    assert [each['persistent_workers'] for each in cfg.val_dataloader] == [False, True]


def test_both_tools_run_without_workers(tmp_path, monkeypatch, capfd):
    """PyTorch refuses each of these settings where there are no workers."""
    monkeypatch.chdir(tmp_path)
    config = small_runs.write(tmp_path, """
of_workers = dict(persistent_workers=True, prefetch_factor=2, timeout=60,
                  multiprocessing_context='fork')
train_dataloader.update(of_workers)
val_dataloader.update(of_workers)
del of_workers
""")
    said = ('num_workers is 0, so persistent_workers=False and no prefetch_factor and no timeout '
            'and no multiprocessing_context')
    result = small_runs.run(capfd, run_train, config, '--work-dir', 'w', '--cfg-options',
                            'train_cfg.max_epochs=1')
    assert result.code == 0
    assert f'train_dataloader.{said}' in result.output and f'val_dataloader.{said}' in result.output
    result = small_runs.run(capfd, run_test, config, 'w/epoch_1.pth', '--work-dir', 'w')
    assert result.code == 0 and f'test_dataloader.{said}' in result.output


# --- data without an end ------------------------------------------------------------------------

EPOCHS = [dict(type='EpochBasedTrainLoop', max_epochs=1), dict(by_epoch=True, max_epochs=1)]
ITERATIONS = [dict(type='IterBasedTrainLoop', max_iters=3), dict(by_epoch=False, max_iters=3)]


def endless(cfg, split, sampler):
    cfg[f'{split}_dataloader'].sampler = sampler
    return cfg


@pytest.mark.parametrize('sampler, scope', [
    (dict(type='InfiniteSampler'), 'mmengine'), (dict(type='mmengine.InfiniteSampler'), 'mmdet'),
    (dict(type='MultiSourceSampler', batch_size=2, source_ratio=[1]), 'mmdet'),
    (dict(type='mmdet.GroupMultiSourceSampler', batch_size=2, source_ratio=[1]), 'mmengine')])
def test_epoch_without_an_end(small, sampler, scope):
    import mmdet.datasets.samplers  # noqa: F401
    name = sampler['type'].rpartition('.')[2]
    for train_cfg in EPOCHS:
        cfg = endless(small(default_scope=scope), 'train', sampler)
        cfg.train_cfg = train_cfg
        with pytest.raises(UserError, match=f'train_dataloader.sampler is {name}, which never '
                                            'ends, so neither would the first epoch'):
            check_loops(cfg, SPLITS)
    for train_cfg in ITERATIONS:
        cfg = endless(small(default_scope=scope), 'train', sampler)
        cfg.train_cfg = train_cfg
        assert check_loops(cfg, SPLITS) == []
    for split in ('val', 'test'):
        with pytest.raises(UserError, match=f'{split}_dataloader.sampler is {name}, which never'):
            check_loops(endless(small(default_scope=scope), split, sampler), SPLITS)


@pytest.mark.parametrize('sampler', ['DefaultSampler', 'mmdet.ClassAwareSampler', 'UnknownSampler'])
def test_data_with_an_end(small, sampler):
    import mmdet.datasets.samplers  # noqa: F401
    for train_cfg in EPOCHS + ITERATIONS:
        cfg = endless(small(), 'train', dict(type=sampler))
        cfg.train_cfg = train_cfg
        assert check_loops(cfg, SPLITS) == []


def test_epoch_without_an_end_is_refused_by_the_tool(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    result = small_runs.run(capfd, run_train, small_runs.write(tmp_path), '--cfg-options',
                            'train_dataloader.sampler.type=InfiniteSampler')
    assert result.code == 1 and 'never ends' in result.error
