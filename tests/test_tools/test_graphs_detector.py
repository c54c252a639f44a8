"""``--cuda-graphs`` on a whole detector and a whole segmentor, with the recorder without a GPU."""
import re

import pytest
from graph_stand_in import Recorder

from mmhybrid.cli.actions.training import test as run_test
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine import faster, graphs


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    for module in (faster, graphs):
        monkeypatch.setattr(module, 'missing', lambda: None)
    monkeypatch.setattr(graphs, 'CudaRecorder', Recorder)


def losses(text):
    return re.findall(r' loss: (\S+)', text)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['det', 'seg'])
def test_training_and_evaluation(task, kind, tmp_path, capfd):
    """The same losses and scores as without graphs, as long as nothing is padded."""
    it, said = task(kind), {}
    options = [*it.options, f'data_root={it.data}', 'default_hooks.logger.interval=1']
    for name, more in dict(eager=[], graphs=['--cuda-graphs']).items():
        run_train([it.config, '--work-dir', str(tmp_path / name), *options, *more])
        run_test([it.config, str(tmp_path / name / it.last), '--work-dir', str(tmp_path / name),
                  *options, *more])
        said[name] = capfd.readouterr().out
    assert len(losses(said['eager'])) >= 4
    assert losses(said['graphs']) == losses(said['eager'])
    scores = [re.findall(r'(?:segm_mAP_50|mIoU): (\S+)', text) for text in said.values()]
    assert scores[0] and scores[0] == scores[1]
    assert 'which adds 0.0 % pixels; ' in said['graphs']
    assert ' 0 graphs recorded' not in said['graphs'].rpartition('CUDA graphs:')[2]
    assert 'No further CUDA graphs' not in said['graphs']


@pytest.mark.slow
def test_a_detector_on_padded_images(task, tmp_path, capfd):
    it = task('det')
    run_train([it.config, '--work-dir', str(tmp_path), '--cuda-graphs', *it.options,
               f'data_root={it.data}', 'train_dataloader.dataset.pipeline.2.scale=(300,280)'])
    said = capfd.readouterr().out
    more = float(re.findall(r'which adds (\S+) % pixels', said)[-1])
    assert more > 5 and 'No further CUDA graphs' not in said
