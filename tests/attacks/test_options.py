"""Odd options and settings: one sentence that names the option, what came and what is expected."""
import os
from copy import deepcopy
from pathlib import Path

import pytest
import small_runs
from mmengine.config import Config
from mmengine.runner import Runner

from mmhybrid.cli.actions.training import parse, run_training, training_parser
from mmhybrid.cli.actions.training import test as run_test
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine.building import building, prepare_training
from mmhybrid.engine.config import load_config
from mmhybrid.engine.distributed import prepare_launch
from mmhybrid.engine.loop_check import check_loops
from mmhybrid.engine.options import OptionsAction, check_options
from mmhybrid.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(str(path) for path in (ROOT / 'configs').rglob('*.py')
                 if '_base_' not in path.parts)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_runs.write(tmp_path)


@pytest.fixture
def refused(config, capfd):
    def run(*argv, tool=run_train):
        result = small_runs.run(capfd, tool, config, *argv)
        assert result.code == 1
        return result.error
    return run


OPTIONS = {
    'a': "takes KEY=VALUE, got 'a'",
    '=1': "'' is not a name of a setting",
    'a b=1': "'a b' is not a name of a setting",
    'train_cfg..max_epochs=1': "'train_cfg..max_epochs' is not a name",
    '.model=1': "'.model' is not a name",
    'x=[(1,2': 'a bracket has no counterpart',
    'x=[1': 'a bracket has no counterpart',
    'x=1,2)': 'a bracket has no counterpart',
    'x=[(1,2])': 'a bracket has no counterpart',
    'x=](1,2)[': 'a bracket has no counterpart',
    'x=(1,2),(3,4)': 'Several tuples need a list around them',
    'x=[dict(type="A")]': 'a dict cannot be given on the command line',
    'x=[{"type":"A"}]': 'a dict cannot be given on the command line',
    "x={'a':1}": 'a dict cannot be given on the command line',
    'x={}': 'a dict cannot be given on the command line',
    'lr=nan': 'lr=nan: nan is not a value for a setting',
    'x=[1,-NaN]': 'nan is not a value for a setting',
    'optim_wrapper.optimizer.lr=nan': 'nan is not a value for a setting',
    'model=1': 'model is a group of settings of type SmallModel',
    'train_cfg=3': 'train_cfg is a group of settings of type EpochBasedTrainLoop',
    'default_hooks=none': 'default_hooks is a group of settings',
    'param_scheduler=1e-3': 'param_scheduler is a list of 2 groups of settings',
    'param_scheduler=[1,2]': 'param_scheduler is a list of 2 groups of settings',
    'param_scheduler.2.end=1': "a list of 2 entries, which are numbered from 0, so '2' is none",
    'param_scheduler.-1.end=1': "so '-1' is none of them",
    'param_scheduler.end=1': "so 'end' is none of them",
    'optim_wrapper.optimizer.lr.x=1': "optim_wrapper.optimizer.lr is 0.01 in the config, which has "
                                      "no entry 'x'",
    'work_dir=': 'work_dir= is empty',
    'load_from=': 'load_from= is empty',
    'pretrained=': 'pretrained= is empty',
    'optim_wrapper.optimizer.lr=abc': "optim_wrapper.optimizer.lr must be a finite number of at "
                                      "least 0, got 'abc'",
    'optim_wrapper.optimizer.lr=inf': 'must be a finite number of at least 0, got inf',
    'optim_wrapper.optimizer.lr=-1': 'must be a finite number of at least 0, got -1',
    'optim_wrapper.optimizer.lr=True': 'must be a finite number of at least 0, got True',
    'optim_wrapper.optimizer.weight_decay=-0.1': 'optim_wrapper.optimizer.weight_decay must be',
    'optim_wrapper.accumulative_counts=0': 'optim_wrapper.accumulative_counts must be a whole',
    'optim_wrapper.clip_grad.max_norm=-1': 'optim_wrapper.clip_grad.max_norm must be a finite',
    'optim_wrapper.optimizer=SGD': 'optim_wrapper.optimizer is a group of settings of type AdamW',
    'optim_wrapper=None': 'has no optim_wrapper, so it cannot be trained',
    'train_cfg.max_epochs=-1': 'train_cfg.max_epochs must be a whole number of at least 1, got -1',
    'train_cfg.max_epochs=0': 'train_cfg.max_epochs must be a whole number of at least 1, got 0',
    'train_cfg.max_epochs=1.5': 'train_cfg.max_epochs must be a whole number',
    'train_cfg.max_epochs=many': "train_cfg.max_epochs must be a whole number of at least 1, got "
                                 "'many'",
    'train_cfg.max_epochs=inf': 'train_cfg.max_epochs must be a whole number',
    'train_cfg.max_epochs=None': 'train_cfg.max_epochs must be a whole number',
    'train_cfg.max_epochs=[1,2]': 'train_cfg.max_epochs must be a whole number',
    'train_cfg.val_interval=0': 'train_cfg.val_interval must be a whole number of at least 1; '
                                'val_cfg=None',
    'train_cfg.val_interval=-1': 'train_cfg.val_interval must be a whole number',
    'train_cfg.val_begin=-2': 'train_cfg.val_begin must be a whole number of at least 0',
    'train_cfg.by_epoch=True': 'type and by_epoch, which say the same',
    'train_cfg.type=None': 'train_cfg needs type="EpochBasedTrainLoop"',
    'train_cfg.dynamic_intervals=[(1,0)]': 'train_cfg.dynamic_intervals must be a list',
    'default_hooks.logger.interval=0': 'default_hooks.logger.interval must be a whole number of '
                                       'at least 1 (iterations between two lines), got 0',
    'default_hooks.checkpoint.interval=0': 'default_hooks.checkpoint.interval must be a whole '
                                           'number of at least 1, or -1 (only the last one), got 0',
    'default_hooks.checkpoint.interval=-2': 'default_hooks.checkpoint.interval must be',
    'default_hooks.checkpoint.max_keep_ckpts=0': 'default_hooks.checkpoint.max_keep_ckpts must be',
}


@pytest.mark.parametrize('option', OPTIONS)
def test_odd_option(refused, option):
    text = refused('--cfg-options', option)
    assert OPTIONS[option] in text, text
    assert len(text.splitlines()) == 1, text
    assert not Path('work_dirs').exists()  # found before anything was made


def test_one_key_as_value_and_group(refused):
    assert 'model.a cannot be a value and a group' in refused(
        '--cfg-options', 'model.a=1', 'model.a.b=2')


def test_a_group_may_be_switched_off_after_all(config):
    cfg, _ = load_config(config, {'val_cfg.fp16': True, 'val_cfg': None})
    assert cfg.val_cfg is None


@pytest.mark.parametrize('option', ['--work-dir', '--data-root', '--resume', '--pretrained'])
def test_empty_option(refused, option):
    assert f'{option} is empty. Expected a path' in refused(option, ' ' if option else '')
    assert f'{option} is empty. Expected a path' in refused(option, '')


def test_empty_names(config, capfd):
    assert 'config is empty' in small_runs.run(capfd, run_train, '').error
    assert 'checkpoint is empty' in small_runs.run(capfd, run_test, config, '').error


# Values as they must arrive: what is honest, if odd, passes untouched.
HONEST = [
    ('default_hooks.checkpoint.filename_tmpl=e{}.pth', 'e{}.pth'),
    ('default_hooks.checkpoint.filename_tmpl={}.pth', '{}.pth'),
    ('default_hooks.checkpoint.out_dir=a(b', 'a(b'),
    ('default_hooks.checkpoint.out_dir=x=y', 'x=y'),
    ('default_hooks.checkpoint.interval=-1', -1),
    ('train_cfg.max_epochs=12', 12),
    ('train_cfg.max_epochs=12.0', 12.0),
    ('train_cfg.val_interval=1000', 1000),
    ('train_cfg.dynamic_intervals=[(0,5),(10,1)]', [(0, 5), (10, 1)]),
    ('optim_wrapper.optimizer.lr=0', 0),
    ('optim_wrapper.optimizer.lr=1e-4', 1e-4),
    ('optim_wrapper.optimizer.betas=(0.9,0.999)', (0.9, 0.999)),
    ('optim_wrapper.clip_grad.max_norm=inf', float('inf')),
    ('optim_wrapper.clip_grad=None', None),
    ('param_scheduler=None', None),
    ('param_scheduler=[]', []),
    ('param_scheduler.1.milestones=[1,2]', [1, 2]),
    ('param_scheduler.1.milestones=1,2', [1, 2]),
    ('auto_scale_lr=None', None),
    ('auto_scale_lr.enable=False', False),
    ('compile=True', True),
    ('model.pooled=BN', 'BN'),
    ('train_dataloader.num_workers=0', 0),
    ('randomness.seed=None', None),
    ('work_dir=5', '5'),
]


@pytest.mark.parametrize('option, value', HONEST)
def test_honest_option(config, option, value):
    args = parse(training_parser(''), [config, '--cfg-options', option])
    cfg, _ = load_config(args.config, args.cfg_options)
    check_loops(cfg, ['train', 'val'])
    node = cfg
    for part in option.partition('=')[0].split('.'):
        node = node[int(part) if part.isdigit() else part]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: Path(path).stem)
def test_shipped_configs_pass_without_a_line(path):
    cfg, notes = load_config(path)
    before = deepcopy(cfg.to_dict())
    assert notes == [] and check_loops(cfg, ['train', 'val', 'test']) == []
    assert cfg.to_dict() == before
    check_options(cfg, {'train_dataloader.dataset.pipeline.1.type': 'X', 'val_cfg': None})


# --- the file -----------------------------------------------------------------------------------

FILES = {
    'a syntax error': (b'a = 1\nmodel = dict(\nb = [\n', 'is not valid Python, line'),
    'an unknown name': (b'a = 1\n\nb = c + 1\n', "cannot be read, line 3. NameError: name 'c'"),
    'a division': (b'a = 1\nb = a / 0\n', 'line 2. ZeroDivisionError'),
    'a binary file': (b'\x80\x04\x95' * 9, 'not a text file in UTF-8: byte 0 is 0x80'),
    'null bytes': (b'a = 1\0\n', 'null bytes'),
    'nothing': (b'', 'is empty: it sets nothing'),
    'only a comment': (b'# soon\n', 'is empty: it sets nothing'),
    'a missing base': (b"_base_ = './gone.py'\n", 'as _base_, and there is no such file'),
    'a broken base': (b"_base_ = './base.py'\n", 'base.py (through _base_ of '),
    'a circle': (b"_base_ = './odd.py'\n", 'made from each other in a circle: '),
    'a wider circle': (b"_base_ = './circle.py'\n", 'circle.py'),
    'two bases': (b"_base_ = ['./one.py', './two.py']\n", "Duplicate keys: {'model'}"),
    'another type': (b"_base_ = './one.py'\nmodel = dict(a=dict(b=1))\n", 'a is a dict in the '),
    'a missing base, imported': (
        b'from mmengine.config import read_base\nwith read_base():\n    from .gone import *\n',
        'gone.py not found'),
    'a missing custom import': (
        b"custom_imports = dict(imports=['gone_module'])\n",
        "needs by custom_imports a module that cannot be imported: No module named 'gone_module'"),
}


@pytest.mark.parametrize('name', FILES)
def test_odd_config_file(tmp_path, capfd, name):
    content, part = FILES[name]
    (tmp_path / 'odd.py').write_bytes(content)
    (tmp_path / 'base.py').write_text('a = [\n')
    (tmp_path / 'circle.py').write_text("_base_ = './odd.py'\n")
    (tmp_path / 'one.py').write_text('model = dict(a=1)\n')
    (tmp_path / 'two.py').write_text('model = dict(b=1)\n')
    text = small_runs.run(capfd, run_train, tmp_path / 'odd.py').error
    assert part in text and 'odd.py' in text, text
    assert len(text.splitlines()) == 1, text


def test_config_that_is_no_file(tmp_path, capfd):
    (tmp_path / 'a.py').write_text('x = 1\n')
    text = small_runs.run(capfd, run_train, tmp_path).error
    assert f'{tmp_path} is a folder; expected a file in it. It holds a.py.' in text
    (tmp_path / 'weights.pth').write_bytes(b'PK')
    text = small_runs.run(capfd, run_train, tmp_path / 'weights.pth').error
    assert 'does not end with .py, .json, .yaml, .yml' in text
    (tmp_path / 'a.json').write_text('{"x": ')
    assert 'is not valid JSON' in small_runs.run(capfd, run_train, tmp_path / 'a.json').error


# --- what is built later ------------------------------------------------------------------------

BUILT = {
    'optim_wrapper.optimizer.lrr=1': 'optim_wrapper.optimizer.lrr: AdamW takes no such setting',
    'optim_wrapper.optimizer.betas=3': 'optim_wrapper.optimizer (type AdamW)',
    'optim_wrapper.type=Other': "optim_wrapper.type is 'Other', which is not registered",
    'param_scheduler.1.milestone=[1]': 'param_scheduler.1.milestone: ',
    'param_scheduler.0.type=Linear': "param_scheduler.0.type is 'Linear', which is not registered",
    'param_scheduler.0.end=-3': 'param_scheduler.0 (type LinearLR): ValueError: end should be',
    'train_cfg.max_iters=3': 'train_cfg.max_iters: EpochBasedTrainLoop takes no such setting',
    'train_cfg.type=MyLoop': "train_cfg.type is 'MyLoop', which is not registered",
    'train_dataloader.dataset.size2=3': 'train_dataloader.dataset.size2: ',
    'train_dataloader.dataset.type=Gone': "train_dataloader.dataset.type is 'Gone'",
    'train_dataloader.sampler.shuffle2=True': 'train_dataloader.sampler.shuffle2: ',
    'val_evaluator.prefx=a': 'val_evaluator.prefx: ',
    'val_dataloader.sampler.type=Gone': "val_dataloader.sampler.type is 'Gone'",
    'model.poold=BN': 'model.poold: SmallModel takes no such setting',
    'model.pooled=Gone': 'model (type SmallModel): KeyError: Gone',
    'default_hooks.logger.interval2=3': 'default_hooks.logger.interval2: LoggerHook takes no such',
    'default_hooks.checkpoint.save_best=3': 'default_hooks.checkpoint (type CheckpointHook)',
    'default_hooks.gone.type=GoneHook': "default_hooks.gone.type is 'GoneHook', which is not",
    'randomness.seed=abc': 'randomness: ',
    'randomness.sead=1': 'randomness.sead: ',
    'log_level=LOUD': 'log_level: ',
    'log_processor.windows=3': 'log_processor.windows: LogProcessor takes no such setting',
    'env_cfg.mp_cfg.mp_start_method=thread': 'env_cfg: ',
    'optim_wrapper.paramwise_cfg.norm_decay_mult=x': 'optim_wrapper: ',
    'visualizer.type=Gone': "visualizer.type is 'Gone', which is not registered",
}


@pytest.mark.parametrize('option', BUILT)
def test_what_cannot_be_built(config, option):
    cfg = Config.fromfile(config)
    key, _, value = option.partition('=')
    cfg.merge_from_dict({key: OptionsAction._parse_iterable(value), 'work_dir': 'w'})
    with small_runs.quick(), pytest.raises(UserError) as error, building(config, cfg):
        prepare_training(Runner.from_cfg(cfg))
    first, second = str(error.value).splitlines()
    assert BUILT[option] in first and 'small.py cannot be built' in first
    assert second == '(--traceback shows where)'


def test_what_train_cannot_build(config, capfd):
    """mmengine builds these inside runner.train(), beyond the reach of a guard around it."""
    for option in ('train_dataloader.dataset.type=Gone', 'param_scheduler.0.end=-3',
                   'val_dataloader.sampler.type=Gone'):
        result = small_runs.run(capfd, run_train, config, '--cfg-options', option)
        assert result.code == 1 and BUILT[option] in result.error


def test_an_optimizer_that_there_is_not(config):
    cfg = Config.fromfile(config)
    cfg.optim_wrapper.optimizer.type = 'AdanW'
    with pytest.raises(UserError, match="optim_wrapper.optimizer.type is 'AdanW', which is not "
                                        "registered. Did you mean 'AdamW'"):
        check_loops(cfg, ['train'])


def test_what_a_test_cannot_build(config, capfd, tmp_path, monkeypatch):
    assert small_runs.run(capfd, run_train, config, '--cfg-options', 'train_cfg.max_epochs=1',
                          '--work-dir', tmp_path / 'w').code == 0

    def broken(self, size):
        raise TypeError(f'{size} is not to my taste')

    monkeypatch.setattr(small_runs.SmallDataset, '__init__', broken)
    text = small_runs.run(capfd, run_test, config, tmp_path / 'w/epoch_1.pth').error
    assert 'small.py cannot be built' in text
    # val_dataloader has the same data set.
    assert 'test_dataloader.dataset (type SmallDataset): TypeError: 5 is not to my taste' in text


@pytest.mark.parametrize('option, part', [
    ('auto_scale_lr.base_batch_size=0', 'auto_scale_lr: ZeroDivisionError'),
    ('model.init_cfg.type=Gone', "model.init_cfg.type is 'Gone', which is not registered"),
    ('activation_checkpointing=[gone]', 'activation_checkpointing: ')])
def test_what_the_run_itself_builds(config, capfd, option, part):
    result = small_runs.run(capfd, run_train, config, '--auto-scale-lr', '--cfg-options', option)
    assert result.code == 1 and part in result.error and 'cannot be built' in result.error


def test_a_metric_that_there_is_not(config, capfd):
    text = small_runs.run(capfd, run_train, config, '--cfg-options',
                          'default_hooks.checkpoint.save_best=toy/men',
                          'default_hooks.checkpoint.rule=greater').error
    assert ('--save-best toy/men (default_hooks.checkpoint.save_best) is not a metric of the '
            'validation, which gives toy/mean, toy/noise. Set it to one of these' in text)


def test_faults_of_the_training_keep_their_traceback(config, capfd, monkeypatch):
    def broken(self, *args, **kwargs):
        raise TypeError('a real fault')

    monkeypatch.setattr(small_runs.SmallModel, 'forward', broken)
    with pytest.raises(AssertionError, match='a real fault'):  # "no Traceback" does not hold
        small_runs.run(capfd, run_train, config)


def test_learning_rate_is_scaled_once(config, tmp_path):
    """Everything is built before the run, and the run must not do it a second time."""
    with small_runs.quick():
        runner = run_training(parse(training_parser(''), [
            config, '--auto-scale-lr', '--work-dir', str(tmp_path), '--cfg-options',
            'param_scheduler=None', 'train_cfg.max_epochs=1']))
    assert runner.optim_wrapper.get_lr()['lr'] == [0.005]  # 2 images for a base of 4


# --- launchers and devices ----------------------------------------------------------------------

@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(('SLURM_', 'OMPI_')) or name in (
                'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize('launcher, part', [
    ('mpi', 'OMPI_COMM_WORLD_RANK'), ('slurm', 'SLURM_PROCID'), ('pytorch', 'RANK')])
def test_launcher_without_its_environment(refused, environment, launcher, part):
    for argv in (['--launcher', launcher], ['--cfg-options', f'launcher={launcher}']):
        text = refused(*argv)
        assert f'--launcher {launcher} needs the environment variable(s)' in text and part in text


def test_launcher_said_twice(refused, environment):
    assert '--launcher says slurm, --cfg-options launcher= says mpi' in refused(
        '--launcher', 'slurm', '--cfg-options', 'launcher=mpi')
    assert "Unknown launcher 'ssh'" in refused('--cfg-options', 'launcher=ssh')


def test_launcher_of_a_dumped_config_gives_way(tmp_path, environment, capfd):
    """The config that a run writes into its work directory names the launcher of that run."""
    environment.chdir(tmp_path)
    config = small_runs.write(tmp_path, "\nlauncher = 'pytorch'\n")
    assert small_runs.run(capfd, run_train, config, '--cfg-options',
                          'train_cfg.max_epochs=1').code == 0


@pytest.mark.parametrize('change, part', [
    (dict(RANK='first'), "RANK is 'first'"),
    (dict(RANK='-1'), "RANK is '-1'"),
    (dict(WORLD_SIZE='0'), "WORLD_SIZE is '0'"),
    (dict(RANK='2'), 'RANK is 2, but there are 2 processes'),
    (dict(MASTER_PORT='http'), "MASTER_PORT is 'http'"),
    (dict(LOCAL_RANK=''), "LOCAL_RANK is ''")])
def test_odd_environment(environment, change, part):
    for name, value in {**dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='localhost',
                               MASTER_PORT='29511'), **change}.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=part):
        prepare_launch(Config(dict()), 'pytorch')


def test_odd_environment_without_launcher(refused, environment):
    environment.setenv('RANK', 'x')
    environment.setenv('WORLD_SIZE', 'many')
    assert "WORLD_SIZE is 'many'" in refused()


def test_mpi_without_local_rank(environment):
    for name, value in dict(OMPI_COMM_WORLD_RANK='0', OMPI_COMM_WORLD_SIZE='1',
                            MASTER_ADDR='localhost').items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match='OMPI_COMM_WORLD_LOCAL_RANK'):
        prepare_launch(Config(dict()), 'mpi')


@pytest.mark.parametrize('value, said', [
    ('7', True), ('GPU-1234', True), ('zero', True), ('', False), ('-1', False),
    ('NoDevFiles', False)])
def test_gpus_that_are_not_there(config, environment, capfd, value, said):
    import torch
    if torch.cuda.is_available():
        pytest.skip('needs a machine without a GPU')
    environment.setenv('CUDA_VISIBLE_DEVICES', value)
    result = small_runs.run(capfd, run_train, config, '--cfg-options', 'train_cfg.max_epochs=1')
    assert result.code == 0
    text = f'CUDA_VISIBLE_DEVICES={value} names no GPU that PyTorch finds'
    assert (text in result.output) == said
