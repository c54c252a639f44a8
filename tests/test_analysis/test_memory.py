"""Memory of training steps, counted by hand for layers and held against measurements for models."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmengine.config import Config, ConfigDict
from torch import nn

from mmhybrid import cli
from mmhybrid.analysis.memory import Memory, Peak
from mmhybrid.analysis.models import memory
from mmhybrid.analysis.models.source import ModelSource, find_model
from mmhybrid.analysis.pretended_gpu import MINIMUM_TORCH, backward, pretended_gpu
from mmhybrid.errors import UserError
from mmhybrid.ops import triton_support

pytest.importorskip('triton', reason='the kernels need Triton')
if triton_support.interpreting():
    pytest.skip('interpreted kernels are not launched', allow_module_level=True)
if tuple(map(int, torch.__version__.split('.')[:2])) < MINIMUM_TORCH:
    pytest.skip('fake tensors on a GPU ask this PyTorch for a driver', allow_module_level=True)

pytestmark = pytest.mark.plain_empty

CONFIGS = Path(__file__).parents[2] / 'configs'
MIB = 1 << 20

# Backbones' training steps on an H200 at commit 03c1dbf, max_memory_allocated in MiB
# (tools/benchmark/results/official_gpu.csv, ours_peak_MB of eager training steps).
MEASURED = {
    'mambavision_det': ('MambaVision', {'window_size': (8, 8, 112, 56)}, 2, (832, 1344), 'float16',
                        3482),
    'mambavision_seg': ('MambaVision', {'window_size': (8, 8, 64, 32)}, 2, (512, 512), 'float16',
                        1126),
    'mambavision_cls': ('MambaVision', {}, 64, (224, 224), 'bfloat16', 2408),
    'vmamba_seg': ('VMamba', {}, 2, (512, 512), 'bfloat16', 1053),
    'vmamba_det': ('VMamba', {}, 2, (832, 1344), 'bfloat16', 4171),
}
# What this predicted for the code of that commit, which is what was measured.
PREDICTED_THEN = {'mambavision_det': 3450, 'mambavision_seg': 1197, 'mambavision_cls': 2367,
                  'vmamba_seg': 1119, 'vmamba_det': 4145}


def backbone(name, **optimizer):
    """A source with a config of nothing but a backbone and an optimizer."""
    cls, arguments, *_ = MEASURED[name]
    cfg = ConfigDict(type=f'mmhybrid.{cls}', drop_path_rate=0.0, **arguments)
    config = Config(dict(model=cfg, optim_wrapper=dict(optimizer=dict(optimizer, type='SGD'))))
    return ModelSource(name, cfg, config)


def step(name, **options):
    _, _, batch, size, dtype, _ = MEASURED[name]
    return memory.Step(batch, size, getattr(torch, dtype), tuple(options.items()))


@pytest.mark.parametrize('name', MEASURED)
def test_what_was_predicted_is_what_was_measured(name):
    assert PREDICTED_THEN[name] == pytest.approx(MEASURED[name][-1], rel=0.1)


@pytest.mark.parametrize('name', [
    'mambavision_seg',
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ('mambavision_det', 'mambavision_cls', 'vmamba_seg', 'vmamba_det')),
])
def test_backbones_take_no_more_than_measured(name):
    """The present code was made to keep less; see PREDICTED_THEN for the code that was measured."""
    peak = memory.predict(backbone(name), step(name)).peak.bytes / MIB
    assert 0.5 * PREDICTED_THEN[name] < peak <= PREDICTED_THEN[name]


@pytest.mark.slow
@pytest.mark.parametrize(('config', 'size', 'positive', 'measured'), [
    # small images of 160 x 120 and few objects, 4.8 GB in mmengine's log
    ('cascade_mambavision_t_coco', (800, 1088), 0.03, 4800),
    # 2 crops, 4.4 GB; cuDNN's benchmark is what it is fitted to
    ('upernet_vmamba_t_ade20k', None, None, 4400),
])
def test_whole_trainings(config, size, positive, measured):
    source = find_model(str(CONFIGS / f'{config}.py'))
    found = memory.predict(source, memory.step_of(source, size=size), positive)
    assert found.peak.bytes / MIB == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_a_cascade_that_samples_once():
    """Its later stages relabel the regions of the first, whose number counts for them."""
    source = find_model(str(CONFIGS / 'cascade_vim_ti_coco.py'))
    peaks = [memory.predict(source, memory.step_of(source, 1), share).peak.bytes
             for share in (0.0, 0.25)]
    assert peaks[0] < peaks[1] < 4 << 30


def followed(module, size):
    """Peak of a step in float32, and what holds it."""
    found = Memory()
    with pretended_gpu():
        module.to_empty(device='cuda')
        found.hold([*module.parameters()], 'model')
        x = torch.empty(size, device='cuda')
        found.hold(x, 'images')
        with found:
            backward(module(x).mean())
    return found


def test_a_chain_of_layers_by_hand():
    """Two linear layers of 256 x 256 on 1024 tokens: everything is a multiple of a block."""
    linear = nn.Sequential(nn.Linear(256, 256, bias=False), nn.GELU(),
                           nn.Linear(256, 256, bias=False))
    weight, map_ = 4 * 256 * 256, 4 * 1024 * 256
    found = followed(linear, (1024, 256))
    # When the last layer runs backwards: what GELU read and wrote, the gradient of the result,
    # which the mean has expanded into a map, the new gradient, and that of the weight.
    assert found.peak.operator == 'aten::mm'
    kept = found.peak.bytes - 2 * weight - map_
    assert kept == pytest.approx(4 * map_ + weight, abs=2048)
    assert found.peak.parts['model'] == 2 * weight and found.peak.parts['images'] == map_


def test_blocks_of_512_bytes():
    found = followed(nn.Linear(1, 1), (1, 1))
    assert found.peak.parts['model'] == 2 * 512


def test_everything_is_gone_after_a_step():
    found = Memory()
    module = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    with pretended_gpu():
        module.to_empty(device='cuda')
        found.hold([*module.parameters(), *module.buffers()], 'model')
        before = found.in_use
        with found:
            backward(module(torch.empty(128, 64, device='cuda')).mean())
        found.bury()
        gradients = sum(-(-4 * p.numel() // 512) * 512 for p in module.parameters())
        assert found.in_use - before == gradients


def test_recomputing_and_lean_mixers_save():
    arch = dict(dim=80, stem_width=32, depths=(1, 1, 2, 2), num_heads=(2, 4, 8, 16),
                window_size=(8, 8, 14, 7))

    def peak(**options):
        shallow = step('mambavision_seg', arch=arch, **options)
        return memory.predict(backbone('mambavision_seg'), shallow).peak.bytes

    assert peak(with_cp=True) < peak(with_cp=(0, 1)) < peak()
    assert peak(with_cp=True) < peak(lean_mixer=True) < peak()


def test_frozen_weights_have_no_gradients_and_no_states():
    source = backbone('vmamba_seg')
    options = ('arch', dict(dim=96, depths=(1, 1, 1, 1))),

    def persistent(optimizer, *more):
        source.config.optim_wrapper.optimizer.type = optimizer
        step = memory.Step(1, (64, 64), torch.float16, options + more)
        return memory.predict(source, step).persistent

    weights = persistent('SGD')
    assert persistent('AdamW') == pytest.approx(3 * weights, rel=0.01)
    assert persistent('AdamW8bit') == pytest.approx(1.5 * weights, rel=0.03)
    assert persistent('AdamW', ('lora', dict(rank=8))) == pytest.approx(1.06 * weights, rel=0.03)


@pytest.mark.parametrize(('optimizer', 'values'), [
    (dict(type='SGD'), 0), (dict(type='SGD', momentum=0.9), 1), (dict(type='AdamW'), 2),
    (dict(type='AdamW', amsgrad=True), 3), (dict(type='PagedAdamW8bit'), 2),
    (dict(type='Lion8bit'), 1), (dict(type='mmhybrid.Unknown'), 2),
])
def test_values_that_an_optimizer_keeps(optimizer, values):
    assert memory.states_per_value(Config(dict(optim_wrapper=dict(optimizer=optimizer)))) == values


@pytest.mark.parametrize(('config', 'batch', 'size', 'dtype'), [
    ('cascade_mambavision_t_coco', 2, (800, 1344), torch.float16),
    ('mask_rcnn_vmamba_t_coco', 2, (800, 1344), torch.float32),
    ('upernet_vmamba_t_ade20k', 2, (512, 512), torch.float32),
    ('classification/localvim_t_imagenet', 128, (224, 224), torch.float32),
])
def test_the_step_of_a_config(config, batch, size, dtype):
    found = memory.step_of(find_model(str(CONFIGS / f'{config}.py')))
    assert found == memory.Step(batch, size, dtype)


def test_every_config_says_its_step():
    for path in sorted(CONFIGS.glob('*.py')):
        found = memory.step_of(find_model(str(path)))
        assert found.batch >= 1 and min(found.size) >= 32, path


def test_a_step_that_the_command_line_says():
    source = find_model('VMamba:tiny')
    assert memory.step_of(source, 3, (64, 96), 'bfloat16') == memory.Step(
        3, (64, 96), torch.bfloat16)
    with pytest.raises(UserError, match='VMamba:tiny has no train_dataloader.batch_size'):
        memory.step_of(source)
    with pytest.raises(UserError, match='names no size of its images; give --size'):
        memory.step_of(source, 3)


def test_the_command(capsys):
    config = CONFIGS / 'upernet_mambavision_mini_ade20k.py'
    assert cli.main(['memory', str(config), '--gpu', '24', '--dtype', 'float16']) == 0
    printed = ' '.join(capsys.readouterr().out.split())
    assert re.search(r'mini_ade20k: a training step on \d+ images of \d+ x \d+ in float16', printed)
    for line in ('as configured', 'lean_mixer=True', 'with_cp=True', 'the CUDA context'):
        assert line in printed


@pytest.mark.parametrize(('arguments', 'words'), [
    (('VMamba:tiny', '--gpu', '24'), 'has no train_dataloader.batch_size; give --batch'),
    (('VMamba:tiny', '--gpu', '-1'), '--gpu takes GiB above 0'),
    (('VMamba:tiny', '--gpu', '1', '--batch', '0'), '--batch at least 1'),
    (('nowhere', '--gpu', '24'), 'nowhere is neither a config file'),
    (('VMamba:tiny', '--gpu', '24', '--batch', '2', '--size', '64', '--cfg-options', 'x'),
     '--cfg-options takes KEY=VALUE'),
])
def test_wrong_use_of_the_command(capsys, arguments, words):
    assert cli.main(['memory', *arguments]) == 1
    printed = capsys.readouterr().err
    assert words in printed and 'Traceback' not in printed


def test_what_fits():
    """Peaks of 2 GiB and 1 more for each image beyond two, on GPUs of several sizes."""
    def predicted(source, step):
        return memory.Prediction(step, Peak(step.batch << 30, 'aten::mm'), 1 << 28)

    source = find_model('VMamba:tiny')
    step = memory.Step(2, (64, 64), torch.float16)
    with mock.patch.object(memory, 'predict', predicted):
        for gib, most in ((24, 22), (2, 1), (1, 0)):
            plain, recomputed = memory.proposals(source, step, gib)
            assert plain.largest == recomputed.largest == most
            assert plain.at_largest == most << 30 <= memory.usable(gib)
            assert recomputed.prediction.step.options == (('with_cp', True),)
        text = memory.format_proposals('VMamba', memory.proposals(source, step, 1), 1)
    assert 'none fits' in text


def test_a_divided_model():
    """Two processes keep half of weights and states; the rest of a step is the same."""
    source = find_model('MambaVision:tiny', backbone_only=True)
    step = memory.Step(2, (64, 64), torch.float32)
    alone, divided = (memory.predict(source, memory.replace(step, ranks=n)) for n in (1, 2))
    assert divided.persistent == pytest.approx(alone.persistent / 2, rel=0.02)
    assert 0.5 * alone.peak.bytes < divided.peak.bytes < 0.8 * alone.peak.bytes
