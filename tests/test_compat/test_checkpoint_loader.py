"""All of mmengine's ways to load a checkpoint read it without running anything in it."""
import os
import pickle

import numpy as np
import pytest
import torch
import toy
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

import mmhybrid.plugin  # noqa: F401  (its import installs what is tested)
from mmhybrid.compat import checkpoint_loader
from mmhybrid.weights import WeightsError


class Hostile:
    """Leaves a file behind when it is executed."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture
def hostile(tmp_path):
    torch.save(dict(state_dict=dict(weight=torch.ones(2, 2)), extra=Hostile(tmp_path / 'ran')),
               tmp_path / 'hostile.pth')
    yield tmp_path / 'hostile.pth'
    assert not (tmp_path / 'ran').exists()


def test_load_checkpoint_is_ours(hostile, tmp_path):
    with pytest.raises(WeightsError, match=r'hostile.pth .*contains \w+\.mkdir.*MMHYBRID_TRUST'):
        load_checkpoint(nn.Linear(2, 2), str(hostile))


def test_trust_is_explicit(tmp_path, monkeypatch):
    torch.save(dict(state_dict={}, extra=Hostile(tmp_path / 'ran')), tmp_path / 'w.pth')
    monkeypatch.setenv('MMHYBRID_TRUST_CHECKPOINTS', '1')
    CheckpointLoader.load_checkpoint(str(tmp_path / 'w.pth'))
    assert (tmp_path / 'ran').is_dir()  # so the refusals above are refusals of something real


@pytest.mark.parametrize('route', ['load_from', 'resume'])
def test_runs_refuse_it(route, hostile, tmp_path):
    with pytest.raises(WeightsError, match='could run code'):
        toy.run(tmp_path / 'run', dict(type='EpochBasedTrainLoop', max_epochs=1),
                dict(interval=1), resume=str(hostile))


def test_a_config_in_the_checkpoint_is_not_run(tmp_path):
    code = f'import os\nos.mkdir({str(tmp_path / "ran")!r})\n'
    first = toy.run(tmp_path / 'a', dict(type='EpochBasedTrainLoop', max_epochs=1),
                    dict(interval=1))
    saved = CheckpointLoader.load_checkpoint(f'{first.work_dir}/epoch_1.pth')
    saved['meta']['config'] = code
    torch.save(saved, tmp_path / 'w.pth')
    toy.run(tmp_path / 'b', dict(type='EpochBasedTrainLoop', max_epochs=2), dict(interval=1),
            resume=str(tmp_path / 'w.pth'))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('place', ['meta', 'message_hub'])
@pytest.mark.parametrize('text', [
    "import os\nos.mkdir('x')\n", "model = __import__('os').mkdir('x')\n",
    "model = dict(**{'a': open('x')})\n", "model = [y for y in open('x')]\n", 'x = (\n',
    'x.y = 1\n', "model = dict(open('x'))\n", "dict = float = open\nx = dict('x')\n",
    'dict(a=1)\n', "model = f'{open(1)}'\n", 'model = ' + 50 * '[' + 'print()' + 50 * ']'])
def test_inferencers_find_no_config_that_runs(place, text, tmp_path, monkeypatch):
    def saved():
        return dict(state_dict={}, **{'meta': dict(cfg=text)} if place == 'meta' else {
            'message_hub': dict(runtime_info=dict(cfg=text))})

    def kept():
        read = CheckpointLoader.load_checkpoint(str(tmp_path / 'w.pth'))
        return 'cfg' in (read['meta'] if place == 'meta' else read['message_hub']['runtime_info'])

    torch.save(saved(), tmp_path / 'w.pth')
    assert not kept()
    monkeypatch.setenv('MMHYBRID_TRUST_CHECKPOINTS', '1')
    assert kept()


def test_configs_of_training_stay(tmp_path):
    from pathlib import Path

    from mmengine.config import Config
    for path in sorted((Path(__file__).parents[2] / 'configs').glob('*_t_*.py')):
        text = Config.fromfile(path).pretty_text + "x = [float('inf'), -1e-05, {3: None}, {1}]\n"
        torch.save(dict(state_dict={}, meta=dict(cfg=text)), tmp_path / 'w.pth')
        assert CheckpointLoader.load_checkpoint(str(tmp_path / 'w.pth'))['meta']['cfg'] == text


def test_own_checkpoints_come_back_whole(tmp_path):
    first = toy.run(tmp_path / 'a', dict(type='EpochBasedTrainLoop', max_epochs=1),
                    dict(interval=1))
    path = f'{first.work_dir}/epoch_1.pth'
    ours = CheckpointLoader.load_checkpoint(path)
    theirs = torch.load(path, weights_only=False)
    assert _plain(ours) == _plain(theirs)
    curves = ours['message_hub']['log_scalars']
    assert curves and all(type(curve) is HistoryBuffer for curve in curves.values())
    curve = next(iter(curves.values()))
    assert curve.mean() == np.mean(curve.data[0])
    # and it may be saved again, as mmengine does when it publishes
    torch.save(ours, tmp_path / 'again.pth')
    assert _plain(CheckpointLoader.load_checkpoint(str(tmp_path / 'again.pth'))) == _plain(theirs)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, HistoryBuffer):
        return [each.tolist() for each in value.data]
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value


def test_every_scheme_is_ours():
    theirs = {'modelzoo://', 'torchvision://', 'mmcls://'}  # they end in load_from_http
    for prefix, loader in CheckpointLoader._schemes.items():
        assert loader.__module__ == checkpoint_loader.__name__ or prefix in theirs, prefix
    from mmengine.runner import checkpoint
    assert checkpoint.load_from_http is checkpoint_loader.load_from_http
    checkpoint_loader.install()
    assert list(CheckpointLoader._schemes)[-1] == ''


def test_other_addresses(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match='cannot be read safely'):
        CheckpointLoader.load_checkpoint('pavi://x')
    with pytest.raises(WeightsError, match='not in the list of OpenMMLab'):
        CheckpointLoader.load_checkpoint('open-mmlab://no-such-model')
    with pytest.raises(FileNotFoundError, match="Did you mean 'mambavision-t-1k'"):
        CheckpointLoader.load_checkpoint('mambavision-t1k')
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    (tmp_path / 'open_mmlab.json').write_text('{"mine": "mine.pth"}')
    (tmp_path / 'mine.pth').write_bytes(pickle.dumps(Hostile(tmp_path / 'ran'), protocol=2))
    with pytest.raises(WeightsError, match='mkdir'):
        CheckpointLoader.load_checkpoint('open-mmlab://mine')


def test_a_module_of_another_package(hostile):
    from mmengine.model import BaseModule

    class Other(BaseModule):
        def __init__(self):
            super().__init__(dict(type='Pretrained', checkpoint=str(hostile)))
            self.linear = nn.Linear(2, 2)

    with pytest.raises(WeightsError):
        Other().init_weights()
