"""Released files to clean ones and back; slim files of training."""
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import toy
from mmengine.runner import CheckpointLoader
from released_files import FAMILIES, NESTINGS, Hostile, dense, weights

from mmhybrid import cli
from mmhybrid.models.checkpoints import load_backbone
from mmhybrid.weights import WeightsError, sha256_of
from mmhybrid.weights.conversion import convert, provenance_of, publish, restore

# The others hold tensors beside the model.
CLEAN = [name for name in NESTINGS if name not in ('module.encoder', 'detectron2', 'mmengine')]


def suffixes():
    have = importlib.util.find_spec('safetensors') is not None
    return ['.pth', pytest.param('.safetensors', marks=pytest.mark.skipif(
        not have, reason='safetensors is not installed'))]


@pytest.mark.parametrize('suffix', suffixes())
@pytest.mark.parametrize('nesting', CLEAN)
def test_there_and_back(nesting, suffix, tmp_path):
    right = weights('VMamba')
    source, target = tmp_path / 'vssm.pth', tmp_path / f'clean{suffix}'
    torch.save(NESTINGS[nesting](right), source)
    facts = convert(source, target, licence='MIT')
    assert facts == provenance_of(target) and facts['sha256'] == sha256_of(source)
    assert (facts['source'], facts['licence'], facts['kind'], facts['family']) == (
        'vssm.pth', 'MIT', 'classification', 'VMamba')
    clean = torch.load(target, weights_only=True)['state_dict'] if suffix == '.pth' else (
        __import__('safetensors.torch').torch.load_file(target))
    assert clean.keys() == right.keys()
    assert load_backbone(dense('VMamba'), target).comparison.share == 1
    restore(target, tmp_path / 'back.pth')
    back = torch.load(tmp_path / 'back.pth', weights_only=True)
    original = NESTINGS[nesting](right)
    entry = {'state_dict', 'model'} & set(original)
    assert set(back) == (entry or set(original))
    inner, theirs = (back[entry.pop()], None) if entry else (back, original)
    theirs = theirs or original.get('state_dict', original.get('model'))
    assert inner.keys() == theirs.keys()
    assert all(torch.equal(inner[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family(family, tmp_path):
    torch.save(NESTINGS['timm'](weights(family)), tmp_path / 'w.pth.tar')
    assert convert(tmp_path / 'w.pth.tar', tmp_path / 'w.pth')['family'] == family


def test_averaged_weights_and_names_of_published_files(tmp_path):
    source = tmp_path / 'vssm1_tiny_0230s_ckpt_epoch_264.pth'
    torch.save(NESTINGS['deit'](weights('VMamba')), source)
    facts = convert(source, tmp_path / 'ema.pth', key='model_ema')
    assert facts['licence'] == 'MIT' and facts['published'].endswith(source.name)
    assert facts['repository'] == 'https://github.com/MzeroMiko/VMamba'
    state = torch.load(tmp_path / 'ema.pth', weights_only=True)['state_dict']
    assert all(not tensor.any() for tensor in state.values())
    restore(tmp_path / 'ema.pth', tmp_path / 'back.pth')
    assert set(torch.load(tmp_path / 'back.pth', weights_only=True)) == {'model_ema'}


def test_whole_models_stay_whole_and_nothing_is_lost_silently(tmp_path):
    torch.save(NESTINGS['mmengine'](weights('Vim')), tmp_path / 'det.pth')
    assert convert(tmp_path / 'det.pth', tmp_path / 'clean.pth')['kind'] == 'detector'
    assert 'neck.lateral.conv.weight' in torch.load(
        tmp_path / 'clean.pth', weights_only=True)['state_dict']
    torch.save(NESTINGS['module.encoder'](weights('Vim')), tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match=r'beside the model .*\(module.fc.weight\)'):
        convert(tmp_path / 'w.pth', tmp_path / 'x.pth')
    with pytest.raises(WeightsError, match='does not say how it was named'):
        restore(tmp_path / 'w.pth', tmp_path / 'x.pth')
    with pytest.raises(WeightsError, match='ends in .safetensors or .pth'):
        convert(tmp_path / 'w.pth', tmp_path / 'x.onnx')


def test_publishing(tmp_path, monkeypatch):
    runner = toy.run(tmp_path / 'run', dict(type='EpochBasedTrainLoop', max_epochs=1),
                     dict(interval=1))
    trained = Path(runner.work_dir) / 'epoch_1.pth'
    slim = publish(trained, tmp_path / 'toy.pth')
    assert re.fullmatch(r'toy-[0-9a-f]{8}\.pth', slim.name)
    assert sha256_of(slim).startswith(slim.stem[-8:]) and not (tmp_path / 'toy.pth').exists()
    assert slim.stat().st_size < 0.7 * trained.stat().st_size
    checkpoint = CheckpointLoader.load_checkpoint(str(slim))
    assert set(checkpoint) == {'meta', 'state_dict'}
    assert checkpoint['meta']['dataset_meta'] == dict(classes=('one', 'two'))
    for name, tensor in runner.model.state_dict().items():
        assert torch.equal(checkpoint['state_dict'][name], tensor), name


def test_the_command(tmp_path, capfd):
    torch.save(NESTINGS['timm'](weights('Vim')), tmp_path / 'w.pth')
    clean = str(tmp_path / 'clean.pth')
    assert cli.main(['convert', str(tmp_path / 'w.pth'), clean, '--licence', 'Apache-2.0']) == 0
    output = capfd.readouterr().out
    assert f'wrote {clean}' in output and 'licence     Apache-2.0' in output
    assert cli.main(['convert', clean, str(tmp_path / 'back.pth'), '--restore']) == 0
    for argv, message in (
            (['gone.pth', clean], 'ERROR: there is no checkpoint file'),
            ([clean, 'no/such/x.pth'], 'ERROR: The folder no/such of the target does not exist'),
            ([clean, str(tmp_path / 'x.bin')], 'ERROR: got .*expected a name that ends in')):
        assert cli.main(['convert', *argv]) == 1
        error = capfd.readouterr().err
        assert re.search(message, error) and 'Traceback' not in error


def test_trust_is_an_option_of_the_command(tmp_path, capfd):
    torch.save(dict(state_dict=weights('Vim'), more=Hostile(tmp_path / 'ran')), tmp_path / 'w.pth')
    argv = [str(tmp_path / 'w.pth'), str(tmp_path / 'clean.pth')]
    assert cli.main(['convert', *argv]) == 1 and '--trust' in capfd.readouterr().err
    assert not (tmp_path / 'ran').exists() and not (tmp_path / 'clean.pth').exists()
    assert cli.main(['convert', *argv, '--trust']) == 0
    assert (tmp_path / 'ran').exists()
    torch.load(tmp_path / 'clean.pth', weights_only=True)  # clean for everyone
