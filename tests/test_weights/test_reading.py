"""Reading files: by content, completely, and without running anything."""
import argparse
import collections
import io
import json
import pathlib
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from released_files import Hostile

from mmhybrid.weights import WeightsError, check_file, read_file, safetensors_metadata
from mmhybrid.weights.allowed import allowed_names


def saved(value, path, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


HARMLESS = dict(
    namespace=argparse.Namespace(a=1, b=['x']), numbers=[np.float64(1.5), np.int64(3), np.bool_(1)],
    array=np.arange(6.).reshape(2, 3), words=np.float32([1]), counter=collections.Counter({8: 2}),
    ordered=collections.OrderedDict(a=1), path=pathlib.PosixPath('/data/x'), some={1, 2},
    half=torch.ones(2, dtype=torch.bfloat16), parameter=torch.nn.Parameter(torch.ones(2)),
    device=torch.device('cpu'), size=torch.Size([2, 3]), dtype=torch.float16,
    curve=HistoryBuffer([1., 2.], [1, 1]))


@pytest.mark.parametrize('legacy', [False, True])
def test_what_trainers_save_comes_back(legacy, tmp_path):
    back = read_file(saved(HARMLESS, tmp_path / 'w.pth', legacy))
    assert back['namespace'] == HARMLESS['namespace'] and back['numbers'] == [1.5, 3, True]
    assert np.array_equal(back['array'], HARMLESS['array']) and back['words'].dtype == np.float32
    assert back['counter'] == {8: 2} and back['ordered'] == dict(a=1) and back['some'] == {1, 2}
    assert str(back['path']) == '/data/x'
    assert torch.equal(back['half'], HARMLESS['half'])
    assert torch.equal(back['parameter'], HARMLESS['parameter'])
    assert [back[k] for k in ('device', 'size', 'dtype')] == [
        HARMLESS[k] for k in ('device', 'size', 'dtype')]
    assert back['curve'].mean() == 1.5 and back['curve'].statistics('max') == 2


def test_options_of_other_trainers_come_back_as_dictionaries(tmp_path):
    import sys
    import types
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    sys.modules['yacs'], sys.modules['yacs.config'] = types.ModuleType('yacs'), module
    try:
        node = module.CfgNode(MODEL=module.CfgNode(NAME='vssm'))
        node.__dict__['frozen'] = True
        saved(dict(config=node), tmp_path / 'w.pth')
    finally:
        del sys.modules['yacs'], sys.modules['yacs.config']
    assert read_file(tmp_path / 'w.pth') == dict(config=dict(MODEL=dict(NAME='vssm')))
    from mmengine.config import ConfigDict
    saved(dict(config=ConfigDict(a=dict(b=1))), tmp_path / 'w.pth')
    assert read_file(tmp_path / 'w.pth') == dict(config=dict(a=dict(b=1)))


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def _hostile_ways(trace):
    """Ways to make a directory that a reader might overlook."""
    import importlib
    import runpy
    yield 'os', Hostile(trace)
    yield 'eval', Call(eval, f'__import__("os").mkdir({trace!r})')
    yield 'getattr', Call(getattr, argparse.Namespace, '__init__')
    yield 'import', Call(importlib.import_module, 'antigravity')
    yield 'run', Call(runpy.run_path, 'x.py')
    yield 'load', Call(torch.load, 'x.pth')
    yield 'hub', Call(torch.hub.load, 'a/b', 'c')
    yield 'numpy', Call(np.load, 'x.npy')
    yield 'method', Call(getattr, HistoryBuffer, '__init__')


@pytest.mark.parametrize('legacy', [False, True])
def test_nothing_runs(legacy, tmp_path):
    for what, value in _hostile_ways(str(tmp_path / 'ran')):
        with pytest.raises(WeightsError, match='could run code'):
            read_file(saved(dict(a=torch.ones(1), b=value), tmp_path / 'w.pth', legacy))
        assert not (tmp_path / 'ran').exists(), what


@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4])
def test_plain_pickles_are_refused(protocol, tmp_path):
    (tmp_path / 'w.pth').write_bytes(pickle.dumps(Hostile(tmp_path / 'ran'), protocol=protocol))
    with pytest.raises(WeightsError):
        read_file(tmp_path / 'w.pth')
    (tmp_path / 'w.pth').write_bytes(pickle.dumps([dict(a=1)] * 5, protocol=2) * 5)
    with pytest.raises(WeightsError, match='torch.save did not write'):
        read_file(tmp_path / 'w.pth')
    assert not (tmp_path / 'ran').exists()


def test_a_second_program_in_the_archive_is_refused(tmp_path):
    saved(dict(a=torch.ones(1)), tmp_path / 'w.pth')
    with zipfile.ZipFile(tmp_path / 'w.pth', 'a') as archive:
        archive.writestr('other/data.pkl', pickle.dumps(Hostile(tmp_path / 'ran'), protocol=2))
    with pytest.raises(WeightsError, match='not one that torch.save wrote'):
        read_file(tmp_path / 'w.pth')


def test_torch_script_and_tar_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'script.pt', 'w') as archive:
        for name in ('s/data.pkl', 's/constants.pkl', 's/code/a.py'):
            archive.writestr(name, b'')
    with pytest.raises(WeightsError, match='TorchScript'):
        read_file(tmp_path / 'script.pt')
    with tarfile.open(tmp_path / 'old.pth', 'w') as archive:
        info = tarfile.TarInfo('pickle')
        info.size = 3
        archive.addfile(info, io.BytesIO(b'abc'))
    with pytest.raises(WeightsError, match='tar archive'):
        read_file(tmp_path / 'old.pth')


@pytest.mark.parametrize(('content', 'message'), [
    (b'', 'is empty; fetch it again'),
    (b'<!DOCTYPE html>', r'is a web page \(<!DOCTYPE html>\)'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:1', 'git lfs pull'),
    (b'{"error": "Repository not found"}', 'is text .*not weights'),
    (b'\x89PNG\r\n\x1a\n' + bytes(600), 'begins with the bytes 89 50'),
    (b'PK\x03\x04' + bytes(600), 'cut off: its end is missing'),
    (b'\x80\x02}q\x00.', 'is a plain pickle that torch.save did not write'),
    (b'\x80\x02}q\x00', 'is cut off: it ends in the middle of its pickle'),
    (b'\x80\x02' + bytes(100), 'damaged|instruction'),
    (struct.pack('<Q', 10 ** 6) + b'{"a"', 'header should have 1,000,000 bytes'),
    (struct.pack('<Q', 6) + b'{"a":x', 'header is not JSON'),
    (struct.pack('<Q', 8) + b'{"a": 1}', 'not the header of a safetensors'),
])
def test_no_weights(content, message, tmp_path):
    (tmp_path / 'w.pth').write_bytes(content)
    with pytest.raises(WeightsError, match=f'w.pth.*({message})') as caught:
        read_file(tmp_path / 'w.pth')
    assert '\n' not in str(caught.value)


def test_safetensors(tmp_path):
    save_file = pytest.importorskip('safetensors.torch').save_file
    save_file(dict(a=torch.arange(3)), tmp_path / 'w.bin', metadata=dict(licence='MIT'))
    assert torch.equal(read_file(tmp_path / 'w.bin')['a'], torch.arange(3))
    assert torch.equal(read_file(io.BytesIO((tmp_path / 'w.bin').read_bytes()))['a'],
                       torch.arange(3))
    assert safetensors_metadata(tmp_path / 'w.bin') == dict(licence='MIT')
    assert check_file(tmp_path / 'w.bin') == 'safetensors'
    header = json.dumps(dict(a=dict(dtype='F32', shape=[2], data_offsets=[0, 4]))).encode()
    (tmp_path / 'w.bin').write_bytes(struct.pack('<Q', len(header)) + header + bytes(4))
    with pytest.raises(WeightsError, match='damaged'):
        read_file(tmp_path / 'w.bin')


def test_the_list_is_short_and_stays_with_us(tmp_path):
    assert 'builtins.eval' not in allowed_names() and len(allowed_names()) < 45
    saved(dict(a=argparse.Namespace(x=1)), tmp_path / 'w.pth')
    read_file(tmp_path / 'w.pth')
    with pytest.raises(Exception, match='argparse.Namespace'):
        torch.load(tmp_path / 'w.pth', weights_only=True)


def test_trust_runs_everything(tmp_path):
    saved(dict(a=Hostile(tmp_path / 'ran')), tmp_path / 'w.pth')
    read_file(tmp_path / 'w.pth', trust=True)
    assert (tmp_path / 'ran').is_dir()
