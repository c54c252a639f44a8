"""``--cuda-graphs`` and ``--compile`` of the tools, with the recorder that needs no GPU."""
import re

import pytest
import small_runs
import torch
from graph_stand_in import Recorder
from mmengine.registry import MODELS
from torch import nn

from mmhybrid.cli.actions.training import test as run_test
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine import faster, graphs
from mmhybrid.layers import DropPath
from mmhybrid.models import MambaVision

MODEL = "\nmodel = dict(type='SmallWithBackbone')\n"
HALF = "\noptim_wrapper['accumulative_counts'] = 2\n"
EVERY_5 = """
default_hooks['checkpoint'] = dict(type='CheckpointHook', by_epoch=False, interval=5)
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
"""


@MODELS.register_module(force=True)
class SmallWithBackbone(small_runs.SmallModel):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3),
                                      nn.Dropout(0.2), DropPath(0.2))

    def forward(self, inputs, target, mode='tensor'):
        return super().forward(self.backbone(torch.stack(list(inputs))), target, mode)


@pytest.fixture
def recorders(monkeypatch):
    made = []

    def make():
        made.append(Recorder())
        return made[-1]

    for module in (faster, graphs):
        monkeypatch.setattr(module, 'missing', lambda: None)
    monkeypatch.setattr(graphs, 'CudaRecorder', make)
    return made


def weights(folder, name):
    loaded = torch.load(folder / name, weights_only=False)
    return {**loaded['state_dict'], **{
        f'ema {key}': value for key, value in loaded.get('ema_state_dict', {}).items()}, **{
        f'{key} {name}': value for key, state in loaded['optimizer']['state'].items()
        for name, value in state.items()}}


def different(one, other):
    assert one.keys() == other.keys()
    return [key for key, value in one.items() if not torch.equal(value, other[key])]


@pytest.mark.parametrize('extra', ['', HALF], ids=['every step', 'accumulated'])
def test_training_is_the_same_with_graphs(tmp_path, capfd, recorders, extra):
    config = small_runs.write(tmp_path, MODEL + EVERY_5 + extra)
    said = {}
    for name, options in dict(eager=[], graphs=['--cuda-graphs']).items():
        run = small_runs.run(capfd, run_train, config, '--work-dir', tmp_path / name, *options)
        assert run.code == 0, run.output
        said[name] = run.output
    assert not different(*(weights(tmp_path / name, 'iter_15.pth') for name in said))
    scores = [re.findall(r'toy/mean: (\S+)', text) for text in said.values()]
    assert len(scores[0]) == 3 and scores[0] == scores[1]
    assert 'CUDA graphs:' not in said['eager'] and len(recorders) == 1
    # 3 epochs of 6 batches and 5 images for validation, in two modes, each once eagerly
    assert said['graphs'].count('CUDA graphs:') == 4
    assert '2 graphs recorded, 0 dropped; 31 of 33 calls replayed' in said['graphs']


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, capfd, recorders):
    config = small_runs.write(tmp_path, MODEL + EVERY_5 + HALF)
    whole = small_runs.run(capfd, run_train, config, '--work-dir', tmp_path / 'a', '--cuda-graphs')
    again = small_runs.run(capfd, run_train, config, '--work-dir', tmp_path / 'b', '--cuda-graphs',
                           '--resume', tmp_path / 'a' / 'iter_5.pth')
    assert whole.code == again.code == 0, again.output
    assert not different(*(weights(tmp_path / name, 'iter_15.pth') for name in 'ab'))


def test_evaluation(tmp_path, capfd, recorders):
    config = small_runs.write(tmp_path, MODEL)
    assert small_runs.run(capfd, run_train, config, '--work-dir', tmp_path).code == 0
    said = [small_runs.run(capfd, run_test, config, tmp_path / 'epoch_3.pth', '--work-dir',
                           tmp_path, *options) for options in ([], ['--cuda-graphs'])]
    means = [re.findall(r'toy/mean: (\S+)', run.output) for run in said]
    assert means[0] and means[0] == means[1]
    assert '1 graphs recorded, 0 dropped; 4 of 5 calls replayed' in said[1].output


def test_settings_of_a_config(tmp_path, capfd, recorders):
    config = small_runs.write(tmp_path, MODEL + 'cuda_graphs = dict(max_graphs=1)\n')
    run = small_runs.run(capfd, run_train, config, '--work-dir', tmp_path)
    assert run.code == 0 and '2 graphs recorded' not in run.output
    assert re.search(r'\d graphs recorded, [1-9] dropped', run.output)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('tool', [run_train, run_test])
def test_without_a_gpu_is_one_sentence(tmp_path, capfd, tool):
    config = small_runs.write(tmp_path)
    given = [config, '--work-dir', tmp_path / 'new', '--cuda-graphs']
    run = small_runs.run(capfd, tool, *given[:1], *(['x.pth'] * (tool is run_test)), *given[1:])
    assert run.code == 1
    assert run.error == ('CUDA graphs need an NVIDIA GPU, and PyTorch finds none: leave '
                         '--cuda-graphs (cuda_graphs of the config) out.')
    assert not (tmp_path / 'new').exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_hook_without_a_gpu(tmp_path, capfd):
    config = small_runs.write(
        tmp_path, MODEL + "custom_hooks = [dict(type='mmhybrid.CudaGraphsHook')]\n")
    run = small_runs.run(capfd, run_train, config, '--work-dir', tmp_path)
    assert run.code == 1 and run.error.startswith('CUDA graphs need an NVIDIA GPU')


@pytest.mark.parametrize(('line', 'options', 'error'), [
    ('cuda_graphs = dict(divisor=100)', [], 'cuda_graphs: got divisor=100, expected a multiple'),
    ('cuda_graphs = dict(divisors=128)', [], "cuda_graphs.divisors=128: nothing reads this. Did "
                                             "you mean 'divisor'?"),
    ('cuda_graphs = 128', [], 'cuda_graphs must be a dict of settings, True or None, got 128.'),
    ("compile_backbone = dict(backend='inducter')", [],
     "compile_backbone: got backend='inducter', expected one of torch.compile: "),
    ("compile_backbone = dict(mode='fast')", [], "compile_backbone: got mode='fast'"),
    ('cuda_graphs = True', ['--compile'], '--cuda-graphs (cuda_graphs) and --compile '
                                          '(compile_backbone) do not go together.'),
    ('compile = True', ['--cuda-graphs'], "--cuda-graphs (cuda_graphs) and mmengine's setting "
                                          'compile do not go together.'),
    ("model = dict(type='SmallModel')", ['--cuda-graphs'], 'model (SmallModel) has no backbone'),
])
def test_settings_that_make_no_sense(tmp_path, capfd, recorders, line, options, error):
    config = small_runs.write(tmp_path, MODEL + line + '\n')
    run = small_runs.run(capfd, run_train, config, '--work-dir', tmp_path, *options)
    assert run.code == 1 and error in run.error, run.error
    assert not recorders


def test_settings_that_switch_off(tmp_path, capfd, recorders):
    config = small_runs.write(tmp_path, MODEL + 'cuda_graphs = None\ncompile_backbone = False\n')
    assert small_runs.run(capfd, run_train, config, '--work-dir', tmp_path).code == 0
    assert not recorders


def test_batch_norm_across_processes_is_refused(monkeypatch, recorders):
    monkeypatch.setattr(faster, 'get_world_size', lambda: 2)
    backbone = nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3))
    with pytest.raises(faster.UserError, match=r'model.backbone.1 synchronises BatchNorm'):
        faster.CudaGraphsHook()._begin(backbone)
    monkeypatch.setattr(faster, 'get_world_size', lambda: 1)
    faster.CudaGraphsHook()._begin(backbone).remove()


def test_compiled(tmp_path, capfd):
    """The option trains; PyTorch's own interpreter stands in for the compiler."""
    extra = MODEL + EVERY_5 + "compile_backbone = dict(backend='eager')\n"
    for name, text, options in (('eager', MODEL + EVERY_5, []), ('compiled', extra, ['--compile'])):
        config = small_runs.write(tmp_path, text, f'{name}.py')
        run = small_runs.run(capfd, run_train, config, '--work-dir', tmp_path / name, *options)
        assert run.code == 0, run.output
    found, expected = (weights(tmp_path / name, 'iter_15.pth') for name in ('compiled', 'eager'))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], msg=key)


def graphs_compiled(backbone, sizes, **settings):
    """How often the compiler is asked when training meets these sizes."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    expected = [[y.shape for y in backbone(torch.rand(2, 3, *size))] for size in sizes]
    replaced = faster.CompileHook(backend='eager', **settings)._begin(backbone)
    try:
        for size, shapes in zip(sizes, expected, strict=True):
            maps = backbone(torch.rand(2, 3, *size))
            assert [y.shape for y in maps] == shapes
            sum(y.sum() for y in maps).backward()
    finally:
        replaced.remove()
        torch._dynamo.reset()
    assert 'forward' not in backbone.__dict__
    return counters['stats']['unique_graphs']


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 8, 2, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        return x, self.down(x)


SCALES = [(96, 160), (128, 96), (160, 128), (192, 224)]


@pytest.mark.parametrize(('dynamic', 'graphs'), [(True, 1), (False, len(SCALES))])
def test_one_compilation_for_all_sizes(dynamic, graphs):
    assert graphs_compiled(Pair(), SCALES, dynamic=dynamic) == graphs


@pytest.mark.slow
def test_one_compilation_of_a_backbone_for_all_sizes():
    """Windows are larger than the maps, as in the recipes with many scales."""
    backbone = MambaVision(
        dict(dim=8, stem_width=4, depths=(1, 1, 1, 2), num_heads=(1, 1, 2, 4),
             window_size=(8, 8, 32, 16)), drop_path_rate=0.2).train()
    assert graphs_compiled(backbone, SCALES) == 1
