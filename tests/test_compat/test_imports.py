"""What an import changes in other packages, and what leaves them alone.

Each case runs in a fork of one process that has mmengine, but nothing of ours.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mmhybrid import compat

pytest.importorskip('mmengine')
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
ROOT = Path(__file__).resolve().parents[2]
AT_IMPORT = list(compat.NAMES[:-1])
SERVER = """
    import json, os, sys, traceback
    sys.meta_path[:] = [finder for finder in sys.meta_path
                        if type(finder).__name__ != 'ConfigSchemeHook']  # `install-hook` was here
    import mmengine.runner, mmengine.dataset, mmengine.hooks.checkpoint_hook, torch
    from mmengine.config import Config
    from mmengine.hooks import CheckpointHook
    from mmengine.runner import CheckpointLoader
    try:
        from mmcv.transforms import Compose
    except ImportError:
        Compose = mmengine.dataset.Compose
    assert not [name for name in sys.modules if name.startswith('mmhybrid')]

    def state():
        schemes = {scheme: id(load) for scheme, load in CheckpointLoader._schemes.items()}
        return [list(map(id, sys.meta_path)), schemes,
                *(id(getattr(kind, name)) for kind, name in (
                    (Config, '_get_cfg_path'), (Compose, '__init__'), (Compose, '__call__'),
                    (mmengine.dataset.Compose, '__init__'), (mmengine.dataset.Compose, '__call__'),
                    (CheckpointHook, '_save_checkpoint_with_step'),
                    (CheckpointHook, '_save_best_checkpoint'), (CheckpointHook, 'before_train'))),
                id(mmengine.runner.save_checkpoint), id(mmengine.runner.checkpoint.load_from_http),
                hasattr(mmengine.hooks.checkpoint_hook, 'open')]

    before = state()
    for line in sys.stdin:
        code, environment = json.loads(line)
        if not os.fork():
            os.environ.update(environment)
            try:
                exec(code, {'__name__': 'somebody'})
                same, active = state() == before, []
                if 'mmhybrid.compat' in sys.modules:
                    from mmhybrid.compat.at_import import PATCHES
                    active = [patch.name for patch in PATCHES if patch.is_active()]
                answer = [same, active]
            except BaseException as error:
                answer = [f'{type(error).__name__}: {error}', traceback.format_exc()]
            print('answer ' + json.dumps(answer), flush=True)
            os._exit(0)
        os.wait()
"""


@pytest.fixture(scope='module')
def after():
    """``after(code)``: whether mmengine is as before, and which patches are active."""
    server = subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(SERVER)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def ask(code, **environment):
        server.stdin.write(json.dumps([code, environment]) + '\n')
        server.stdin.flush()
        for line in server.stdout:
            if line.startswith('answer '):
                return json.loads(line.removeprefix('answer '))
        raise AssertionError('the process ended')

    yield ask
    server.stdin.close()
    server.wait(timeout=60)


@pytest.mark.parametrize('code', [
    'import mmhybrid.ops, mmhybrid.layers', 'from mmhybrid.layers import SS2D',
    'from mmhybrid.ops.selective_scan import selective_scan',
    "from importlib import import_module; import_module('mmhybrid.layers.attention')",
    "from importlib.util import find_spec; assert find_spec('mmhybrid.models')",
    'import mmhybrid.weights, mmhybrid.datasets.annotations, mmhybrid.compat',
    'import mmhybrid.cli; mmhybrid.cli.names()', 'import mmhybrid.ops; import mmhybrid',
    "import mmhybrid.ops as ops, threading; t = threading.Thread(target=lambda: __import__("
    "'mmhybrid.layers')); t.start(); t.join()",
])
def test_parts_change_nothing(after, code):
    assert after(code) == [True, []]


@pytest.mark.parametrize('code', [
    'import mmhybrid', 'from mmhybrid import __version__', 'import mmhybrid.models',
    'from mmhybrid import models', 'from mmhybrid.models.backbones import MambaVision',
    "from importlib import import_module; import_module('mmhybrid')",
    'import mmhybrid.ops; import mmhybrid.plugin',
    "from mmengine.registry import MODELS; assert MODELS.get('mmhybrid.MambaVision')",
    "import mmhybrid; from mmengine.registry import MODELS; assert MODELS.get('MambaVision')",
    "from mmengine.config import Config\n"
    "Config.fromstring(\"custom_imports = dict(imports=['mmhybrid'])\", '.py')\n"
    "from mmengine.registry import HOOKS, MODELS\n"
    "assert MODELS.get('VMamba') and HOOKS.get('RandomStateHook')",
    "import mmhybrid.layers\nfrom mmengine.config import Config\n"
    "Config.fromstring(\"custom_imports = dict(imports=['mmhybrid.plugin'])\", '.py')\n"
    "from mmengine.registry import HOOKS, MODELS\n"
    "assert MODELS.get('VMamba') and HOOKS.get('RandomStateHook')",
])
def test_the_plugin_applies_all(after, code):
    assert after(code) == [False, AT_IMPORT]


@pytest.mark.parametrize('name', AT_IMPORT)
def test_each_patch_has_an_off_switch(after, name):
    others = [each for each in AT_IMPORT if each != name]
    assert after('import mmhybrid', MMHYBRID_WITHOUT=f' {name} ,') == [False, others]


def test_all_switched_off_is_nothing_changed(after):
    code = 'import mmhybrid.datasets.loading.pipeline_guard as guard; guard.guard_image_files()'
    assert after(code, MMHYBRID_WITHOUT=','.join(compat.NAMES)) == [True, []]
    assert after(code, MMHYBRID_WITHOUT=','.join(AT_IMPORT)) == [False, []]
    assert after('import mmhybrid', MMHYBRID_WITHOUT='') == [False, AT_IMPORT]


def test_an_unknown_name_is_refused(after):
    error, _ = after('import mmhybrid', MMHYBRID_WITHOUT='pipelines,checkpoints')
    assert error.startswith('ValueError: The environment variable MMHYBRID_WITHOUT=pipelines,'
                            'checkpoints switches off checkpoints, which')
    assert 'checkpoint-loader' in error


def test_installing_twice_changes_nothing(after):
    code = """
import mmhybrid
from mmengine.dataset import Compose
from mmengine.config import Config
import sys
first = [*sys.meta_path, Compose.__init__, Config._get_cfg_path]
from mmhybrid import compat
compat.install()
assert first == [*sys.meta_path, Compose.__init__, Config._get_cfg_path]
"""
    assert after(code) == [False, AT_IMPORT]


def test_the_page_has_every_patch():
    from mmhybrid.compat.at_import import PATCHES
    from mmhybrid.datasets.loading.pipeline_guard import PATCH

    page = (ROOT / 'docs/patches.md').read_text()
    patches = [*PATCHES, PATCH]
    assert [patch.name for patch in patches] == list(compat.NAMES)
    rows = [line for line in page.splitlines() if line.startswith('| `')]
    for patch, row in zip(patches, rows, strict=False):
        why = patch.why.rstrip('.').replace("'mmhybrid::'", '`mmhybrid::`')
        start = f'| `{patch.name}` | {why[0].lower()}{why[1:]} | '
        assert row.replace('`', '').startswith(start.replace('`', '')), row
        for name in patch.touches:
            assert re.split(r'[ (.]', name.split(' (')[0])[-1] in row, name
