"""Resuming: exact with accumulated gradients, and plain about what changed."""
import logging

import pytest
import small_runs
import torch
import toy

from mmhybrid.cli.actions.training import parse, run_training, training_parser
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine import pending_gradients
from mmhybrid.weights import read_checkpoint

EPOCHS = dict(by_epoch=True, max_epochs=3, val_interval=1)  # 6 iterations each
ITERS = dict(by_epoch=False, max_iters=17, val_interval=4)
ODD = dict(interval=5, by_epoch=False)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    # mmengine sleeps two seconds at the end of a finite sampler.
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)


# (loop, checkpoints, sampler, file, iterations per step, waiting gradients in the file)
ACCUMULATED = {
    'between two steps': (ITERS, ODD, 'InfiniteSampler', 'iter_5.pth', 4, True),
    'just before a step': (ITERS, ODD, 'InfiniteSampler', 'iter_15.pth', 4, True),
    'just after a step': (ITERS, ODD, 'InfiniteSampler', 'iter_10.pth', 5, False),
    # 17 is not divisible by 4: the last step is made of one iteration.
    'before the shorter last step': (ITERS, dict(interval=16, by_epoch=False), 'InfiniteSampler',
                                     'iter_16.pth', 4, False),
    'finite sampler': (ITERS, ODD, 'DefaultSampler', 'iter_10.pth', 3, True),
    'end of an epoch': (EPOCHS, dict(interval=1), 'DefaultSampler', 'epoch_1.pth', 4, True),
    'best of an epoch': (EPOCHS, dict(interval=1, save_best='toy/mean', rule='greater'),
                         'DefaultSampler', 'epoch_2.pth', 5, True),
    'inside an epoch': (EPOCHS, ODD, 'DefaultSampler', 'iter_5.pth', 3, True),
    'more than a run': (ITERS, ODD, 'InfiniteSampler', 'iter_5.pth', 100, True),
}


@pytest.mark.parametrize('name', ACCUMULATED)
def test_accumulated_gradients_resume_bitwise(tmp_path, name):
    train_cfg, checkpoint, sampler, file, counts, waiting = ACCUMULATED[name]
    kind = 'mmhybrid.AmpOptimWrapper' if 'epoch' in name else 'OptimWrapper'
    common = dict(sampler=sampler, optim=dict(type=kind, accumulative_counts=counts))
    whole = toy.run(tmp_path / 'a', train_cfg, checkpoint, **common)
    path = str(tmp_path / 'a' / file)
    # Read by the reader that nothing gets past, so a file of this kind stays loadable.
    saved = read_checkpoint(path)[pending_gradients.KEY]
    assert bool(saved['ranks']) == waiting
    resumed = toy.run(tmp_path / 'b', train_cfg, checkpoint, resume=path, **common)
    assert toy.difference(whole, resumed) == []
    assert resumed.optim_wrapper.inner_count == whole.optim_wrapper.inner_count


def test_no_accumulation_saves_nothing(tmp_path):
    toy.run(tmp_path, ITERS, ODD, sampler='InfiniteSampler')
    assert pending_gradients.KEY not in read_checkpoint(str(tmp_path / 'iter_5.pth'))


@pytest.fixture
def log(monkeypatch):
    """Texts of print_log in the module under test, by level."""
    lines = []
    monkeypatch.setattr(pending_gradients, 'print_log',
                        lambda text, logger, level=logging.INFO: lines.append((level, text)))
    return lines


@pytest.mark.parametrize('change, part', [
    (lambda saved: None, 'written without them'),
    (lambda saved: dict(saved, ranks=saved['ranks'] * 2), 'those of 2 process(es)'),
    (lambda saved: dict(saved, accumulative_counts={'': 3}), 'is 4 and was 3')])
def test_what_cannot_be_restored_is_said(tmp_path, log, change, part):
    """Files of earlier versions and other runs resume, and the toy notices the loss."""
    common = dict(sampler='InfiniteSampler', optim=dict(accumulative_counts=4))
    whole = toy.run(tmp_path / 'a', ITERS, ODD, **common)
    path = tmp_path / 'a/iter_5.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint[pending_gradients.KEY] = change(checkpoint[pending_gradients.KEY])
    torch.save(checkpoint, path)
    resumed = toy.run(tmp_path / 'b', ITERS, ODD, resume=str(path), **common)
    assert toy.difference(whole, resumed) != []
    (level, text), = log
    assert level == logging.WARNING and part in text and 'not restored' in text


def test_gradients_at_a_step_need_no_word(tmp_path, log):
    common = dict(sampler='InfiniteSampler', optim=dict(accumulative_counts=5))
    toy.run(tmp_path / 'a', ITERS, ODD, **common)
    toy.run(tmp_path / 'b', ITERS, ODD, resume=str(tmp_path / 'a/iter_10.pth'), **common)
    assert log == []


def test_starting_from_such_a_checkpoint_ignores_them(tmp_path):
    """load_from: nothing of the earlier run's steps comes along."""
    common = dict(sampler='InfiniteSampler', optim=dict(accumulative_counts=4))
    toy.run(tmp_path / 'a', ITERS, ODD, **common)
    path, plain = tmp_path / 'a/iter_5.pth', tmp_path / 'plain.pth'
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint[pending_gradients.KEY]
    torch.save(checkpoint, plain)
    runs = [toy.run(tmp_path / 'b', ITERS, ODD, load_from=str(file), **common)
            for file in (path, plain)]
    assert runs[0].iter == 17 and toy.difference(*runs) == []


# --- checkpoint and config differ ---------------------------------------------------------------

BY_ITERATIONS = """
train_cfg = dict(type='IterBasedTrainLoop', max_iters=18, val_interval=100)
default_hooks['checkpoint'].update(interval=4, by_epoch=False)
param_scheduler[1].update(by_epoch=False, end=18, milestones=[5, 11])
"""
INSIDE_EPOCHS = """
default_hooks['checkpoint'].update(interval=4, by_epoch=False)
"""
NO_WORD = ('settings differ', 'batch changed', 'not restored', 'starts afresh', 'start afresh')


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Trains the small model; returns the runner. The current folder holds its work directories."""
    monkeypatch.chdir(tmp_path)

    def make(*argv, extra='', work_dir='a'):
        config = small_runs.write(tmp_path, extra)
        with small_runs.quick():
            return run_training(parse(training_parser(''), [
                config, '--work-dir', work_dir, *argv]))

    return make


@pytest.fixture
def said(capfd):
    """What the log holds since the last question."""
    def text():
        read = capfd.readouterr()
        return read.out + read.err
    return text


def rates(runner, count):
    """Learning rates of the last iterations."""
    return runner.message_hub.get_scalar('train/lr').data[0][-count:].tolist()


LOOPS = {'epochs': ('', 'epoch_1.pth', 12), 'inside an epoch': (INSIDE_EPOCHS, 'iter_8.pth', 10),
         'end of an epoch': (INSIDE_EPOCHS, 'iter_12.pth', 6),
         'iterations': (BY_ITERATIONS, 'iter_8.pth', 10)}


@pytest.mark.parametrize('extra, file, left', LOOPS.values(), ids=LOOPS)
def test_nothing_differs(trained, said, extra, file, left):
    """An unchanged config resumes without a word, to the same result whoever wins."""
    whole = trained(extra=extra)
    for number, winner in enumerate(([], ['--resume-settings', 'config'],
                                     ['--resume-settings', 'checkpoint'])):
        said()
        resumed = trained('--resume', f'a/{file}', *winner, extra=extra, work_dir=f'b{number}')
        assert not any(part in said() for part in NO_WORD)
        assert toy.difference(whole, resumed) == [] and rates(whole, left) == rates(resumed, left)


CHANGE = ['--cfg-options', 'optim_wrapper.optimizer.lr=0.003', 'param_scheduler.1.gamma=0.3',
          'optim_wrapper.optimizer.weight_decay=0.2', 'param_scheduler.0.start_factor=0.5',
          'param_scheduler.0.end=14']


@pytest.mark.parametrize('extra, file, left', LOOPS.values(), ids=LOOPS)
def test_whose_settings_win(trained, said, extra, file, left):
    before = trained(extra=extra)
    wanted = trained(*CHANGE, extra=extra, work_dir='wanted')
    assert rates(before, left) != rates(wanted, left)
    said()
    resumed = trained('--resume', f'a/{file}', *CHANGE, extra=extra, work_dir='b')
    text = said()
    assert "this run goes on with the checkpoint's, and the config's have no effect" in text
    for line in ('optim_wrapper.optimizer.lr: 0.01 and 0.003', 'weight_decay: 0.01 and 0.2',
                 'param_scheduler.1 (MultiStepLR) gamma: 0.5 and 0.3',
                 'param_scheduler.0 (LinearLR) start_factor: 0.1 and 0.5',
                 'param_scheduler.0 (LinearLR) end: 8 and 14',
                 'add --resume-settings config'):
        assert line in text, text
    assert toy.difference(before, resumed) == [] and rates(before, left) == rates(resumed, left)
    resumed = trained('--resume', f'a/{file}', '--resume-settings', 'config', *CHANGE,
                      extra=extra, work_dir='c')
    text = said()
    assert "this run goes on with the config's:" in text
    assert 'optim_wrapper.optimizer.lr: 0.01 and 0.003' in text
    assert rates(resumed, left) == rates(wanted, left)
    group, = resumed.optim_wrapper.optimizer.param_groups
    assert group['weight_decay'] == 0.2 and group['initial_lr'] == 0.003
    state = resumed.optim_wrapper.state_dict()['state'][0]
    assert state['step'] == 18  # what the optimizer knows was kept


def test_a_longer_run(trained, said):
    """max_epochs is the config's; the end of a schedule follows whoever wins."""
    longer = ['--cfg-options', 'train_cfg.max_epochs=4', 'param_scheduler.1.end=4',
              'param_scheduler.1.milestones=[1,3]']
    trained()
    wanted = trained(*longer, work_dir='wanted')
    said()
    resumed = trained('--resume', 'a/epoch_2.pth', *longer, work_dir='b')
    text = said()
    assert resumed.epoch == 4
    assert 'param_scheduler.1 (MultiStepLR) end: 3 and 4' in text
    assert 'param_scheduler.1 (MultiStepLR) milestones: [1, 2] and [1, 3]' in text
    resumed = trained('--resume', 'a/epoch_2.pth', '--resume-settings', 'config', *longer,
                      work_dir='c')
    assert resumed.epoch == 4 and rates(resumed, 12) == rates(wanted, 12)


def test_groups_of_parameters(trained, said):
    """Settings by layer: base_param_settings is a group of its own in mmengine."""
    groups = """
optim_wrapper['paramwise_cfg'] = dict(custom_keys={'net.5': dict(lr_mult=0.1, decay_mult=0.0)})
"""
    before = trained(extra=groups)
    wanted = trained(*CHANGE, extra=groups, work_dir='wanted')
    said()
    resumed = trained('--resume', 'a/epoch_1.pth', extra=groups, work_dir='b')
    assert toy.difference(before, resumed) == []
    assert not any(part in said() for part in NO_WORD)
    resumed = trained('--resume', 'a/epoch_1.pth', '--resume-settings', 'config', *CHANGE,
                      extra=groups, work_dir='c')
    text = said()
    assert text.count('optimizer.lr:') == 1  # once, not for each group
    assert rates(resumed, 12) == rates(wanted, 12)
    lrs = [[group['lr'] for group in run.optim_wrapper.param_groups] for run in (resumed, wanted)]
    assert lrs[0] == lrs[1] and len(lrs[0]) > 2


def test_a_changed_batch_is_said(trained, said):
    trained()
    said()
    trained('--resume', 'a/epoch_1.pth', '--cfg-options', 'train_dataloader.batch_size=3',
            work_dir='b')
    assert "The batch changed: 2 images per process before, 3 now. The config's counts" in said()


@pytest.fixture
def refused(trained, tmp_path, capfd):
    """Resume with options; returns what is said."""
    def run(*options, file='a/epoch_1.pth', argv=()):
        result = small_runs.run(capfd, run_train, tmp_path / 'small.py', '--work-dir', 'b',
                                '--resume', file, *argv,
                                *(['--cfg-options', *options] if options else []))
        assert result.code == 1
        assert len(result.error.splitlines()) == 1
        assert not list(tmp_path.glob('b/*.pth'))
        return result.error
    return run


def test_what_does_not_fit(trained, refused):
    trained()
    text = refused('optim_wrapper.optimizer.type=SGD')
    assert ('optim_wrapper.optimizer.type is SGD, but the optimizer of a/epoch_1.pth was AdamW'
            in text)
    assert 'load_from=a/epoch_1.pth' in text
    text = refused('optim_wrapper.optimizer.type=Adam')  # the same names of settings
    assert 'type is Adam, but' in text and 'was AdamW' in text
    text = refused('optim_wrapper.paramwise_cfg.norm_decay_mult=0')
    assert 'optim_wrapper makes 6 groups of 6 parameters' in text
    assert 'was written with 1 groups of 6' in text
    text = refused('param_scheduler=[]')
    assert ('param_scheduler is empty, but the checkpoint was written with LinearLR, MultiStepLR'
            in text) and '--resume-settings config' in text


def test_other_schedules_by_the_config(trained, said):
    other = """
param_scheduler = [dict(type='PolyLR', power=0.9, by_epoch=False, begin=0, end=18)]
"""
    trained()
    wanted = trained(extra=other, work_dir='wanted')
    with pytest.raises(ValueError, match='param_scheduler is PolyLR, but the checkpoint was '
                                         'written with LinearLR, MultiStepLR'):
        trained('--resume', 'a/epoch_1.pth', extra=other, work_dir='b')
    said()
    resumed = trained('--resume', 'a/epoch_1.pth', '--resume-settings', 'config', extra=other,
                      work_dir='c')
    assert 'param_scheduler: 2 and 1 schedule(s)' in said()
    assert rates(resumed, 12) == rates(wanted, 12)


@pytest.mark.parametrize('change, part', [
    (lambda file: file.pop('meta'), 'no meta.epoch, meta.iter'),
    (lambda file: file['meta'].pop('iter'), 'no meta.iter'),
    (lambda file: file['meta'].update(epoch='two'), 'no meta.epoch'),
    (lambda file: file['meta'].update(epoch=-1), 'no meta.epoch'),
    (lambda file: file.pop('message_hub'), 'no message_hub')])
def test_weights_are_no_run(trained, refused, change, part):
    trained()
    checkpoint = torch.load('a/epoch_1.pth', weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, 'weights.pth')
    text = refused(file='weights.pth')
    assert f'weights.pth holds weights, but not the state of a training run ({part})' in text
    assert 'load_from=weights.pth' in text


def test_files_of_earlier_versions(trained, said):
    """Without what the hook adds, names of settings tell the kinds apart."""
    whole = trained()
    checkpoint = torch.load('a/epoch_1.pth', weights_only=False)
    assert checkpoint.pop('run_settings')['optimizers'] == {'optim_wrapper': 'AdamW'}
    torch.save(checkpoint, 'old.pth')
    said()
    resumed = trained('--resume', 'old.pth', work_dir='b')
    assert not any(part in said() for part in NO_WORD)
    assert toy.difference(whole, resumed) == []
    with pytest.raises(ValueError, match='type is SGD, but the optimizer of old.pth was one with '
                                         'betas'):
        trained('--resume', 'old.pth', '--cfg-options', 'optim_wrapper.optimizer.type=SGD',
                work_dir='b')
    with pytest.raises(ValueError, match='param_scheduler is LinearLR, CosineAnnealingLR, but the '
                                         'checkpoint was written with a schedule, a schedule'):
        trained('--resume', 'old.pth', work_dir='b', extra="""
param_scheduler[1] = dict(type='CosineAnnealingLR', by_epoch=True, T_max=3)
""")


def test_files_without_states(trained, said):
    trained('--cfg-options', 'default_hooks.checkpoint.save_optimizer=False',
            'default_hooks.checkpoint.save_param_scheduler=False')
    said()
    trained('--resume', 'a/epoch_1.pth', work_dir='b')
    text = said()
    assert 'without the state of the optimizer (save_optimizer=False), which starts afresh' in text
    assert 'without the state of the schedules' in text


# --- nothing is left ----------------------------------------------------------------------------

@pytest.mark.parametrize('extra, file, done', [
    ('', 'epoch_3.pth', 'after epoch 3, and train_cfg.max_epochs is 3'),
    (BY_ITERATIONS, 'iter_18.pth', 'after iteration 18, and train_cfg.max_iters is 18')])
def test_a_finished_run(trained, said, tmp_path, extra, file, done):
    trained(extra=extra)
    before = {path: path.read_bytes() for path in tmp_path.glob('a/*.pth')}
    said()
    result = trained('--resume', extra=extra)
    text = said()
    assert f'Nothing is left to train: a/{file} was written {done}' in text
    assert 'To train longer' in text
    assert {path: path.read_bytes() for path in tmp_path.glob('a/*.pth')} == before
    assert result.iter == 18


def test_a_run_of_more_epochs_than_now(trained, said, capfd, tmp_path):
    trained()
    result = small_runs.run(capfd, run_train, tmp_path / 'small.py', '--resume', 'a/epoch_3.pth',
                            '--work-dir', 'b', '--cfg-options', 'train_cfg.max_epochs=2')
    assert result.code == 0
    assert 'written after epoch 3, and train_cfg.max_epochs is 2' in result.output
    assert not list(tmp_path.glob('b/*.pth'))


def test_whose_settings_without_a_run_to_resume(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    result = small_runs.run(capfd, run_train, small_runs.write(tmp_path), '--resume-settings',
                            'config')
    assert result.code == 1 and '--resume-settings config is for a run that goes on' in result.error
