"""Spellings of a type, each in a fresh interpreter with the working directory elsewhere."""
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BUILD = """
import sys
from importlib import import_module
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
scopes, spellings, imports = (word.split(',') for word in sys.argv[1:])
text = "backbones = [" + ', '.join(f"dict(type='{s}', arch='tiny')" for s in spellings) + "]\\n"
if imports == ['custom_imports']:
    text += "custom_imports = dict(imports=['mmhybrid'], allow_failed_imports=False)\\n"
config = Config.fromstring(text, '.py')
for scope in scopes:
    registry = MODELS
    if scope != 'none':
        init_default_scope(scope)
        registry = import_module(scope + '.registry').MODELS
    for backbone in config.backbones:
        net = registry.build(backbone)
        print('built', scope, backbone.type, type(net).__module__, net.out_channels)
"""


def run(code, cwd, *args):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-c', code, *args], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize('scopes, spellings, imports', [
    ('mmdet,mmseg,none', 'MambaVision,mmhybrid.MambaVision', 'custom_imports'),
    ('mmseg', 'mmhybrid.MambaVision', 'nothing'),
    ('none', 'mmhybrid.MambaVision', 'nothing'),
])
def test_spelling(scopes, spellings, imports, tmp_path):
    for scope in scopes.split(','):
        if scope != 'none' and find_spec(scope) is None:
            pytest.skip(f'{scope} is not installed')
    done = run(BUILD, tmp_path, scopes, spellings, imports)
    if done.returncode and scopes == 'mmseg' and run('import mmseg.models', tmp_path).returncode:
        pytest.skip('this mmseg cannot be imported without the operators of mmcv')
    assert done.returncode == 0, done.stderr
    built = [line for line in done.stdout.splitlines() if line.startswith('built')]
    assert built == [
        f'built {scope} {spelling} mmhybrid.models.backbones.mambavision (80, 160, 320, 640)'
        for scope in scopes.split(',') for spelling in spellings.split(',')]


def test_importing_twice_registers_once(tmp_path):
    done = run("""
import importlib, sys
import mmhybrid
from mmhybrid.registry import MODELS
from mmengine.registry import MODELS as ROOT
before = (len(MODELS.module_dict), len(ROOT.module_dict))
import mmhybrid
importlib.reload(sys.modules['mmhybrid.models.backbones.mambavision'])
importlib.reload(mmhybrid)
assert before == (len(MODELS.module_dict), len(ROOT.module_dict))
assert ROOT.get('MambaVision') is MODELS.get('MambaVision')
assert MODELS.get('MambaVision') is sys.modules[
    'mmhybrid.models.backbones.mambavision'].MambaVision
try:
    MODELS.register_module(name='MambaVision')(dict)
except KeyError as error:
    print(error)
""", tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'MambaVision is already registered' in done.stdout


def test_layers_and_ops_need_no_mm_package(tmp_path):
    done = run("""
import sys
import mmhybrid.ops, mmhybrid.layers
""" if find_spec('mmengine') is None else """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'torchvision', 'timm'):
            raise ModuleNotFoundError(name, name=name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'mmengine' else real(name, *a)
sys.meta_path.insert(0, Absent())
import mmhybrid.ops, mmhybrid.layers
print('fine')
""", tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'fine' in done.stdout
